#!/usr/bin/env bash
# jsonargparse 4.53.0, pydantic 2.14.4, Python 3.11: `from __future__ import annotations` switches constraints off.
#
# Likely guess: a signature means the same with postponed annotations: jsonargparse resolves them, as pydantic's own
#               `validate_call` does.
# Behaviour:    `Annotated[float, Field(gt=0)]` of a class or function is enforced without the import. With it, only
#               `float` is left of the annotation: a value out of range is accepted, silently.
# Seen:
#   as written: jsonargparse refuses rate -1, refuses rate "fast"; pydantic refuses rate -1
#   postponed: jsonargparse ACCEPTS rate -1, refuses rate "fast"; pydantic refuses rate -1
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jsonargparse[signatures]==4.53.0' 'pydantic==2.14.4' 'PyYAML==6.0.3'
cd "$folder"
cat >as_written.py <<'P'
from typing import Annotated

from pydantic import Field


def train(rate: Annotated[float, Field(gt=0)] = 0.1):
    return rate
P
cat <(echo "from __future__ import annotations") as_written.py >postponed.py
PYTHONPATH=. venv/bin/python - <<'P' | tee seen
import as_written
import postponed
from jsonargparse import ArgumentError, ArgumentParser
from pydantic import ValidationError, validate_call


def judge(call, *values):
    try:
        call(*values)
        return "ACCEPTS"
    except (ArgumentError, ValidationError):
        return "refuses"


for title, module in (("as written", as_written), ("postponed", postponed)):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(module.train)
    range_, type_ = (judge(parser.parse_args, [f"--rate={value}"]) for value in ("-1", "fast"))
    own = judge(validate_call(module.train), -1)
    print(f'{title}: jsonargparse {range_} rate -1, {type_} rate "fast"; pydantic {own} rate -1')
P
diff seen <(sed -n '/^# Seen:/,/^set /s/^#   //p' "$script")
