#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, beside 4.12.0.88, Python 3.11, Linux: strokes of cv2.putText.
#
# Likely guess: the thickness of `cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness)` is the
#               width of the strokes in pixels, so that digits to train on can be made in pens of all widths.
# Behaviour:    OpenCV 5 draws the Hershey fonts' names in an outline font, without a warning. A thickness of 1 is its
#               regular weight and any other its bold one: "pens" of 2, 5 and 10 pixels give the same picture, and one of
#               1 pixel gives strokes of 13. Strokes of a width that one chooses need cv2.polylines.
# Seen (version, the widest stroke in pixels by thickness, how many of the four pictures differ):
#   4.12.0 {1: 2.0, 2: 6.0, 5: 10.8, 10: 17.6} 4
#   5.0.0 {1: 13.2, 2: 20.0, 5: 20.0, 10: 20.0} 2
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > draw.py <<'PY'
import cv2
import numpy as np

widths, pictures = {}, set()
for thickness in (1, 2, 5, 10):
    image = np.zeros((120, 400), np.uint8)
    cv2.putText(image, "0179", (10, 90), cv2.FONT_HERSHEY_SIMPLEX, 3, 255, thickness, cv2.LINE_8)
    widths[thickness] = round(float(2 * cv2.distanceTransform(image, cv2.DIST_L2, 5).max()), 1)
    pictures.add(image.tobytes())
print(cv2.__version__, widths, len(pictures))
PY
for version in 4.12.0.88 5.0.0.93; do
    python3 -m venv "$version"
    "$version/bin/pip" install -q "opencv-python-headless==$version"
    "$version/bin/python" draw.py
done | tee seen
diff seen <(sed -n '/^# Seen/,/^set /s/^#   //p' "$script")
