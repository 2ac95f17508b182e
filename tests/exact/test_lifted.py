"""exact/ in another project, with a module, data and loggers that it has never seen: killed, resumed, compared."""

import csv
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, assert_same, in_processes, kill_before, last_checkpoint, scalars
from several import environments


def test_it_imports_nothing_else_of_the_package() -> None:
    for path in (REPOSITORY / "lit_mnist" / "exact").glob("*.py"):
        assert not re.search(r"^\s*(from|import) +(\.\.|lit_mnist)", path.read_text(), re.MULTILINE), path


def project(folder: str, devices: int, kill_at: int, variables: dict[str, str]) -> int:
    """Run one process of the other project, until a step in front of which it is killed, counted from 1."""
    sys.path.insert(0, str(Path.cwd()))
    os.environ |= variables if devices > 1 else {}
    import foreign

    kill_before(kill_at, foreign.Regression)
    foreign.fit(folder, devices)
    return 0


def run(home: Path, folder: str, devices: int = 1, kill_at: int = 0) -> list[int | None]:
    calls = [(folder, devices, kill_at * (n == devices - 1), own) for n, own in enumerate(environments(devices))]
    return [outcome.status for outcome in in_processes(home, project, *calls)]


def outcome(run: Path) -> dict[str, Any]:
    """Return every tensor of the last checkpoint, every logged value, and the names of the files."""
    loaded = last_checkpoint(run)
    del loaded["conditions"], loaded["curves"]
    del loaded["callbacks"]["Results"], loaded["callbacks"]["Progress"]  # commands and timings
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
