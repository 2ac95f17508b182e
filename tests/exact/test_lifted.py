"""exact/ in another project, with a module, data and loggers that it has never seen: killed, resumed, compared."""

from __future__ import annotations

import ast
import csv
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same

REPOSITORY = Path(__file__).parents[2]
CLOCKS = {"train_seconds", "validation_seconds"}


def test_it_imports_nothing_else_of_the_package() -> None:
    for path in (REPOSITORY / "lit_mnist" / "exact").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and not str(node.module).startswith("lit_mnist")), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("lit_mnist") for name in node.names), path


def project(home: str, folder: str, rank: int, devices: int, kill_at: int, port: int) -> None:
    """One process of the other project; it is killed in front of a step, counted from 1."""
    sys.path.insert(0, home)
    if devices > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(home)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    import foreign

    if kill_at and rank == devices - 1:
        original, left = foreign.Regression.training_step, [kill_at]

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch, batch_idx)

        foreign.Regression.training_step = training_step  # type: ignore[method-assign]
    foreign.fit(folder, devices)


def run(home: Path, folder: str, devices: int = 1, kill_at: int = 0) -> list[int | None]:
    port = several.free_port()
    processes = [
        several.CONTEXT.Process(target=project, args=(str(home), folder, rank, devices, kill_at, port))
        for rank in range(devices)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "lit_mnist" / "exact", tmp_path / "machinery")
    shutil.copy(REPOSITORY / "tests" / "foreign.py", tmp_path)
    return tmp_path


def outcome(run: Path) -> dict[str, Any]:
    """Every tensor of the last checkpoint, every logged value, and the names of the files."""
    (last,) = run.glob("checkpoints/last-*.ckpt")
    loaded = torch.load(last, weights_only=True)
    for name in ("conditions", "curves", "settings"):
        loaded.pop(name, None)
    loaded["callbacks"]["Progress"] = {k: v for k, v in loaded["callbacks"]["Progress"].items() if k not in CLOCKS}
    loaded["callbacks"].pop("Results")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves = {
        # files of the same second are read in the order of their process numbers, which may begin again at 1
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
        if "per_second" not in tag
    }
    with (run / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if "per_second" not in key} for row in csv.DictReader(file)]
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*.ckpt"))
    return {"state": loaded, "curves": curves, "rows": rows, "files": files}


@pytest.mark.parametrize(("devices", "kills"), [(1, (3, 5, 8, 14)), (1, (1, 2, 7, 7, 7)), (2, (4, 12))])
def test_a_foreign_project_resumes_exactly(home: Path, devices: int, kills: tuple[int, ...]) -> None:
    assert run(home, "whole", devices) == [0] * devices, (home / "whole.err-0").read_text()
    for kill_at in kills:
        assert run(home, "killed", devices, kill_at)[-1] == -signal.SIGKILL, (home / "killed.err-0").read_text()
    assert run(home, "killed", devices) == [0] * devices, (home / "killed.err-0").read_text()
    ours, theirs = outcome(home / "killed" / "version_0"), outcome(home / "whole" / "version_0")
    assert {"loss_epoch", "worst", "mse", "rank", "recent", "least", "val/mse"} <= ours["curves"].keys()
    assert len(ours["rows"]) > 20
    assert_same(ours, theirs)
    assert [path.name for path in (home / "killed").iterdir()] == ["version_0"]
