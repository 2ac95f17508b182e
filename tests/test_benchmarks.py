"""benchmarks/gpu.py in small on the processor, so that it works when it is needed, and a few kills of kill.py."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, Capsys, Patch

pytestmark = pytest.mark.slow


def test_all_measures_of_a_gpu(tiny_root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    gpu: Any = import_module("gpu")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--cpu", "--record", "--seeds", "1", "--root", str(tiny_root)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["measure"] for line in lines} == {"tests", "runs", "steps", "busy"}
    assert all(torch.__version__.startswith(line["versions"]["torch"]) for line in lines)
    runs = {line["recipe"]: line for line in lines if line["measure"] == "runs"}
    configs = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert runs.keys() == configs - {"smoke", "ddp"} | {"default"}
    assert all(0 < run["train_seconds"] < run["wall_seconds"] < 60 for run in runs.values())
    assert gpu.main(["--cpu", "nothing", "busy", "--root", str(tiny_root)]) == 1
    assert "busy_milliseconds" in capsys.readouterr().out  # a measure that fails does not stop the others


def test_killed_and_resumed_processes_end_as_if_nothing_had_been(real_root: Path) -> None:
    command = [sys.executable, "benchmarks/kill.py", "smoke", "--kills", "3", "--root", str(real_root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 runs differ" in done.stdout
