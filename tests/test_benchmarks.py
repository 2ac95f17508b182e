"""benchmarks/gpu.py in small on the processor, so that it works when it is needed, and a few kills of kill.py."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, Capsys, Patch

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu(monkeypatch: Patch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return import_module("gpu")


def test_all_measures_of_a_gpu(gpu: Any, tiny_root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--cpu", "--record", "--seeds", "1", "--root", str(tiny_root)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["measure"] for line in lines} == {"tests", "runs", "steps", "busy"}
    assert all(torch.__version__.startswith(line["versions"]["torch"]) for line in lines)
    runs = {line["recipe"]: line for line in lines if line["measure"] == "runs"}
    configs = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert runs.keys() == configs - {"smoke", "ddp"} | {"default"}
    for run in runs.values():
        assert 0 < run["train_seconds"] < run["wall_seconds"] < 60
        assert run["test_accuracy"] < 1
    assert gpu.main(["--cpu", "nothing", "busy", "--root", str(tiny_root)]) == 1
    assert "busy_milliseconds" in capsys.readouterr().out  # a measure that fails does not stop the others


def test_what_a_profile_says_of_a_step(gpu: ModuleType) -> None:
    def event(key: str, device: str, count: int, microseconds: float = 0, annotation: bool = False) -> SimpleNamespace:
        own = {"key": key, "count": count, "is_user_annotation": annotation, "self_device_time_total": microseconds}
        return SimpleNamespace(**own, device_type=SimpleNamespace(name=device))

    kernels = [event("add_kernel", "CUDA", 3, 4000), event("Memcpy DtoD (Device -> Device)", "CUDA", 1, 1000)]
    launches = [event("cudaLaunchKernel", "CPU", 3), event("cudaLaunchKernelExC", "CPU", 1)]
    waits = [event("cudaStreamSynchronize", "CPU", 1), event("cudaDeviceSynchronize", "CPU", 1)]  # the timer's
    step = "Optimizer.step#SGD.step"
    events = [event(step, "CPU", 2, annotation=True), event(step, "CUDA", 2, 9000), *kernels, *launches, *waits]
    found = gpu.counts(SimpleNamespace(key_averages=lambda: events), 2)
    assert found == {"busy_milliseconds": 2.5, "kernels": 2, "launches": 2, "waits": 0.5}


def test_killed_and_resumed_processes_end_as_if_nothing_had_been(real_root: Path) -> None:
    command = [sys.executable, "benchmarks/kill.py", "smoke", "--kills", "3", "--root", str(real_root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 runs differ" in done.stdout
