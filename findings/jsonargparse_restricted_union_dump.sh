#!/usr/bin/env bash
# jsonargparse 4.53.0, Python 3.11: a union of two of its restricted number types is parsed right and dumped wrong.
#
# Likely guess: what `dump` writes (LightningCLI's config.yaml) parses to the value that was dumped.
# Behaviour:    `PositiveInt | ClosedUnitInterval` takes 0.5, and dumps it as 0, silently; the plain union `int | float`
#               dumps 0.5. The dump then means another value: 0.0.
# Seen:
#   restricted union: parsed 0.5, dumped "interval: 0", parsed again 0.0
#   plain union: parsed 0.5, dumped "interval: 0.5", parsed again 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jsonargparse==4.53.0' 'PyYAML==6.0.3'
"$folder/venv/bin/python" - <<'P' | tee "$folder/seen"
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

for title, kind in (("restricted union", PositiveInt | ClosedUnitInterval), ("plain union", int | float)):
    parser = ArgumentParser()
    parser.add_argument("--interval", type=kind, default=1)
    parsed = parser.parse_args(["--interval", "0.5"])
    text = parser.dump(parsed)
    again = parser.parse_string(text).interval
    print(f'{title}: parsed {parsed.interval}, dumped "{text.strip()}", parsed again {again}')
P
diff "$folder/seen" <(sed -n '/^# Seen:/,/^set /s/^#   //p' "$0")
