"""benchmarks/gpu.py in small on the processor, so that it works when it is needed."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY, Capsys

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import gpu

    return gpu


def test_all_measures_of_a_gpu(
    gpu: ModuleType, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_measure_that_fails_does_not_stop_the_others(gpu: ModuleType, tiny_root: Path, capsys: Capsys) -> None:
    assert gpu.main(["--cpu", "nothing", "busy", "--root", str(tiny_root)]) == 1
    printed = capsys.readouterr()
    assert "nothing failed" in printed.err
    assert "busy_milliseconds" in printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(gpu: ModuleType, capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code == 2
    assert "--cpu" in capsys.readouterr().err


def test_what_a_profile_says_of_a_step(gpu: ModuleType) -> None:
    def event(key: str, device: str, count: int, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        own = {"key": key, "count": count, "is_user_annotation": annotation, "self_device_time_total": microseconds}
        return SimpleNamespace(**own, device_type=SimpleNamespace(name=device))

    events = [
        event("Optimizer.step#SGD.step", "CPU", 2, 0, annotation=True),
        event("Optimizer.step#SGD.step", "CUDA", 2, 9000),
        event("cudaLaunchKernel", "CPU", 3, 0),
        event("cudaLaunchKernelExC", "CPU", 1, 0),
        event("cudaStreamSynchronize", "CPU", 1, 0),
        event("cudaDeviceSynchronize", "CPU", 1, 0),  # the timer's
        event("add_kernel", "CUDA", 3, 4000),
        event("Memcpy DtoD (Device -> Device)", "CUDA", 1, 1000),
    ]
    found = gpu.counts(SimpleNamespace(key_averages=lambda: events), 2)
    assert found == {"busy_milliseconds": 2.5, "kernels": 2, "launches": 2, "waits": 0.5}
