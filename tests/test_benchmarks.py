"""benchmarks/gpu.py in small on the processor, so that it works where there is a GPU at last."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

PARTS = ("target", "fast", "busy", "steps", "recipes")  # and tests, which runs tests of this folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import gpu

    return gpu


def test_all_parts_run_in_small(
    gpu: ModuleType,
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = set()

    def append(options: Namespace, record: dict[str, Any], where: dict[str, Any]) -> None:
        measured.add(json.loads(json.dumps(record | where))["measure"])
        records.append(options, record, where)

    records = sys.modules["records"]
    monkeypatch.setattr(gpu, "append", append)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main([*PARTS, "--cpu", "--root", str(tiny_root)]) == 0
    printed = capsys.readouterr()
    assert "failed" not in printed.out + printed.err
    assert measured == set(PARTS)
    assert not (tmp_path / "gpu.jsonl").exists()
    for part in PARTS:
        assert re.search(rf"^\({part}: \d+ s\)$", printed.out, re.M)
    recipes = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} - {"smoke", "ddp"} | {"default"}
    assert set(re.findall(r"^(\w+) +[\d,]+ +\d +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d$", printed.out, re.M)) == recipes
    for line in ("fast, fit", "record, bare", "bfloat16", "fused optimizer", "batches of 256"):
        assert re.search(rf"^{line} +\d", printed.out, re.M), line
    assert "skipped on a processor: CUDA graph" in printed.out


def test_a_part_that_fails_does_not_take_the_others_along(
    gpu: ModuleType, tiny_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: object) -> list[dict[str, int]]:
        raise SystemExit("no such luck\nat all")

    monkeypatch.setattr(gpu, "PARTS", {"tests": fails, "steps": lambda bench: iter([{"round": 0}])})
    records: list[dict[str, int]] = []
    monkeypatch.setattr(gpu, "append", lambda options, record, where: records.append(record))
    assert gpu.main(["--cpu", "--root", str(tiny_root)]) == 1
    assert "tests failed: SystemExit: at all\n" in capsys.readouterr().err
    assert records == [{"measure": "steps", "round": 0}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code == 2
    assert "there is no CUDA device; --cpu runs the same code" in capsys.readouterr().err


def test_overlapping_kernels_are_counted_once(gpu: ModuleType) -> None:
    assert gpu.union([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert gpu.union([]) == 0


REPORT = """<testsuites><testsuite tests="4" failures="1" errors="0" skipped="1" time="7.5">
<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase><testcase name="d"/>
</testsuite></testsuites>"""


def test_tests_that_fail_are_recorded_by_name(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[3:5] == ["-m", "gpu"]
        (path,) = (flag.partition("=")[2] for flag in command if flag.startswith("--junitxml="))
        Path(path).write_text(REPORT)
        return SimpleNamespace(stdout="what pytest says", stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    records = gpu.tests(gpu.Bench("", torch.device("cuda"), 1, 0.0))
    assert next(records) == {"passed": 2, "failed": ["b"], "skipped": 1, "seconds": 7.5}
    with pytest.raises(RuntimeError, match="1 tests failed: b"):
        next(records)
    assert "2 passed, 1 failed, 1 skipped\nwhat pytest says" in capsys.readouterr().out


def test_what_a_profile_says_of_a_step(gpu: ModuleType) -> None:
    def event(name: str, device: str, start: float, end: float, annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotation)

    events = [
        event("Optimizer.step#SGD.step", "CPU", 0, 9000, annotation=True),
        event("Optimizer.step#SGD.step", "CUDA", 0, 9000),  # torch says of the one on the CPU alone what it is
        event("aten::add", "CPU", 0, 5),
        event("cudaLaunchKernel", "CPU", 1, 2),
        event("cudaLaunchKernelExC", "CPU", 2, 3),
        event("cudaStreamSynchronize", "CPU", 3, 4),
        event("cudaDeviceSynchronize", "CPU", 4, 5),  # the clock's
        event("add_kernel", "CUDA", 0, 3000),
        event("mul_kernel", "CUDA", 2000, 4000),
        event("Memcpy DtoD (Device -> Device)", "CUDA", 5000, 6000),
    ]
    found = gpu.counted(SimpleNamespace(events=lambda: events), 2)
    expected = {"operations": 0.5, "busy_milliseconds": 2.5, "kernels": 1, "copies": 0.5, "launches": 1, "waits": 0.5}
    assert found == expected


def test_a_run_is_left_out_where_there_is_no_time(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.steps_of("fast") == 3 * 469
    assert gpu.steps_of("seed") == 20 * 938
    bench = gpu.Bench("", torch.device("cuda"), 10, deadline=perf_counter() + 60, pace=0.01)
    assert bench.has_time(bench.expected("fast"), "fast")
    assert not bench.has_time(bench.expected("seed"), "seed")
    assert re.fullmatch(r"left out: seed, which may take 249 s, of (60|59) s that are left\n", capsys.readouterr().out)
