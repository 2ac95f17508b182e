#!/usr/bin/env bash
# jsonargparse 4.53.0, Python 3.11: a saved configuration turns `cache: false` into a path named "False".
#
# Likely guess: what `dump`, `save` or --print_config writes parses to the value that was dumped. It does for
#               jsonargparse's own path types (`Path_fc | bool`), and for `bool | Path`.
# Behaviour:    in a union, `dump` applies the first member that can serialize the value, and for types that are
#               registered by a converter to and from text (pathlib.Path, timedelta, ...) this is `str`, which takes
#               anything. `Path | bool` and `str | Path | bool` with the value False become the text 'False', which is
#               true when it is read again. No error, no warning. The order of the union decides.
# Seen:
#   Path | bool: parsed False, dumped "cache: 'False'", parsed again PosixPath('False')
#   str | Path | bool: parsed False, dumped "cache: 'False'", parsed again 'False'
#   Path | int: parsed 5, dumped "cache: '5'", parsed again PosixPath('5')
#   str | timedelta | float: parsed 1.5, dumped "cache: '1.5'", parsed again '1.5'
#   bool | Path: parsed False, dumped "cache: false", parsed again False
#   Path_fc | bool: parsed False, dumped "cache: false", parsed again False
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jsonargparse==4.53.0' 'PyYAML==6.0.3'
"$folder/venv/bin/python" - <<'P' | tee "$folder/seen"
from datetime import timedelta
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fc

for title, kind, text in (
    ("Path | bool", Path | bool, "false"),
    ("str | Path | bool", str | Path | bool, "false"),
    ("Path | int", Path | int, "5"),
    ("str | timedelta | float", str | timedelta | float, "1.5"),
    ("bool | Path", bool | Path, "false"),
    ("Path_fc | bool", Path_fc | bool, "false"),
):
    parser = ArgumentParser()
    parser.add_argument("--cache", type=kind)
    parsed = parser.parse_string(f"cache: {text}")
    dumped = parser.dump(parsed)
    again = parser.parse_string(dumped).cache
    print(f'{title}: parsed {parsed.cache!r}, dumped "{dumped.strip()}", parsed again {again!r}')
P
diff "$folder/seen" <(sed -n '/^# Seen:/,/^set /s/^#   //p' "$script")
