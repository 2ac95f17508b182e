"""exact/ in another project, with a module, data and loggers that it has never seen: killed, resumed, compared."""

import ast
import csv
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, assert_same, in_processes, kill_before, last_checkpoint, scalars
from several import free_port


def test_it_imports_nothing_else_of_the_package() -> None:
    for path in (REPOSITORY / "lit_mnist" / "exact").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and not str(node.module).startswith("lit_mnist")), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("lit_mnist") for name in node.names), path


def project(folder: str, rank: int, devices: int, kill_at: int, port: int) -> int:
    """Run one process of the other project, until a step in front of which it is killed, counted from 1."""
    sys.path.insert(0, str(Path.cwd()))
    if devices > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import foreign

    kill_before(kill_at if rank == devices - 1 else 0, foreign.Regression)
    foreign.fit(folder, devices)
    return 0


def run(home: Path, folder: str, devices: int = 1, kill_at: int = 0) -> list[int | None]:
    port = free_port()
    calls = [(folder, rank, devices, kill_at, port) for rank in range(devices)]
    return [outcome.status for outcome in in_processes(home, project, *calls)]


def outcome(run: Path) -> dict[str, Any]:
    """Return every tensor of the last checkpoint, every logged value, and the names of the files."""
    loaded = last_checkpoint(run)
    for name in ("conditions", "curves"):
        del loaded[name]
    for name in ("Results", "Progress"):  # commands and timings
        del loaded["callbacks"][name]
    with (run / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if "per_second" not in key} for row in csv.DictReader(file)]
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*.ckpt"))
    return {"state": loaded, "curves": scalars(run), "rows": rows, "files": files}


@pytest.mark.parametrize(("devices", "kills"), [(1, (3, 5, 1, 8, 14)), (1, (1, 2, 7, 7, 7)), (2, (4, 12))])
def test_a_foreign_project_resumes_exactly(tmp_path: Path, devices: int, kills: tuple[int, ...]) -> None:
    shutil.copytree(REPOSITORY / "lit_mnist" / "exact", tmp_path / "machinery")
    shutil.copy(REPOSITORY / "tests" / "foreign.py", tmp_path)
    assert run(tmp_path, "whole", devices) == [0] * devices, (tmp_path / ".err-0").read_text()
    for kill_at in kills:
        assert run(tmp_path, "killed", devices, kill_at)[-1] == -signal.SIGKILL, (tmp_path / ".err-0").read_text()
    assert run(tmp_path, "killed", devices) == [0] * devices, (tmp_path / ".err-0").read_text()
    ours, theirs = outcome(tmp_path / "killed" / "version_0"), outcome(tmp_path / "whole" / "version_0")
    assert {"loss_epoch", "worst", "mse", "rank", "recent", "least", "own", "val/mse"} <= ours["curves"].keys()
    assert len(ours["rows"]) > 20
    assert_same(ours, theirs)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["version_0"]
