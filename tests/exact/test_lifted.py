"""exact/ in other projects, with modules, data and loggers that it has never seen: killed, resumed, compared."""

import multiprocessing
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, assert_alike, in_processes, kill_before, scalars
from torch.utils.data._utils import worker


def test_it_imports_nothing_else_of_the_package() -> None:
    for path in (REPOSITORY / "lit_mnist" / "exact").glob("*.py"):
        assert not re.search(r"^\s*(from|import) +(\.\.|lit_mnist)", path.read_text(), re.MULTILINE), path


def project(name: str, folder: str, devices: int, kill_at: int) -> int:
    """Run one process of another project, until a step in front of which it is killed, counted from 1."""
    sys.path.insert(0, str(Path.cwd()))
    import foreign

    multiprocessing.set_start_method("fork", force=True)  # of workers: those of a fork server outlive a killed process
    vars(worker)["MP_STATUS_CHECK_INTERVAL"] = 0.1  # seconds, and others do for so long
    kill_before(kill_at, foreign.PROJECTS[name][0])
    foreign.fit(name, folder, devices)
    return 0


CASES = [("autoencoder", 1, (3, 8)), ("gan", 1, (1, 2, 7, 7, 7)), ("gan", 2, (3, 5)), ("text", 2, (4, 7))]


@pytest.mark.parametrize(("name", "devices", "kills"), CASES)
def test_a_foreign_project_resumes_exactly(tmp_path: Path, name: str, devices: int, kills: tuple[int, ...]) -> None:
    def run(folder: str, kill_at: int = 0) -> list[int | None]:
        calls = [(name, folder, devices, kill_at * (rank == devices - 1)) for rank in range(devices)]
        return [ended.status for ended in in_processes(tmp_path, project, *calls)]

    shutil.copytree(REPOSITORY / "lit_mnist" / "exact", tmp_path / "machinery")
    shutil.copy(REPOSITORY / "tests" / "foreign.py", tmp_path)
    assert run("whole") == [0] * devices, (tmp_path / ".err-0").read_text()
    for kill_at in kills:
        assert run("killed", kill_at)[-1] == -signal.SIGKILL, (tmp_path / ".err-0").read_text()
    assert run("killed") == [0] * devices, (tmp_path / ".err-0").read_text()
    ours, theirs = (tmp_path / folder / "version_0" for folder in ("killed", "whole"))
    assert len(scalars(ours)) > 3
    assert_alike(ours, theirs)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["version_0"]
