"""docs/your-own-experiment.md: each diff is applied to a copy of the package, and the commands under it are run."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, TINY, assert_alike, in_processes, kill_before, results, scalars, write_tiny_mnist

pytestmark = pytest.mark.slow
PAGE = (REPOSITORY / "docs" / "your-own-experiment.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
SETTINGS = dict(zip(TINY[::2], TINY[1::2], strict=True)) | {"--data.name": "idx", "--data.root": "tiny"}
SETTINGS |= {"--model.dropout": "0.1", "--checkpoint.every_n_steps": "1"}
RESUME = ["fit", "--ckpt_path", "last", "--data.root", "tiny"]


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.M | re.S)


def commands(section: str) -> list[list[str]]:
    """The commands of a section, on a tiny set in place of what they do not say themselves."""
    found = [shlex.split(line) for line in re.findall(r"^    python -m lit_mnist (.+)$", SECTIONS[section], re.M)]
    assert found
    for command in found:
        resumed = command[0] == "runs" or "--ckpt_path" in command
        flags = {"--data.root": "tiny"} if resumed else {k: v for k, v in SETTINGS.items() if k not in command}
        command += [part for pair in flags.items() for part in pair if command[0] != "runs"]
    return found


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the package with the diffs of the section, and the section's files beside it."""
    shutil.copytree(REPOSITORY / "lit_mnist", tmp_path / "lit_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    write_tiny_mnist(tmp_path / "tiny")
    for diff in blocks(request.param, "diff"):
        subprocess.run(["git", "apply", "-p1", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    for text in blocks(request.param, "yaml"):
        (tmp_path / text.split()[1]).write_text(text)
    for code in blocks(request.param, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    return tmp_path


def main_of_copy(args: list[str], kill_at: int) -> int:
    """Run a command with the package of the current folder in place of the one that the tests use."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lit_mnist"]:
        del sys.modules[name]
    sys.path.insert(0, str(Path.cwd()))
    from lit_mnist import module
    from lit_mnist.__main__ import main

    assert str(module.__file__).startswith(str(Path.cwd()))
    kill_before(kill_at, module.LitMNIST)
    return main(args)


def run(home: Path, args: list[str], kill_at: int = 0, processes: int = 1) -> str:
    """Run a command in a copy, on all processes, and give what the first prints."""
    args = [*args, "--trainer.devices", str(processes)] if processes > 1 else args
    outcomes = in_processes(home, main_of_copy, *[(args, kill_at)] * processes)
    assert {outcome.status for outcome in outcomes} == {-signal.SIGKILL if kill_at else 0}, outcomes[0].err
    return outcomes[0].out


def version(home: Path, number: int) -> Path:
    return home / "lightning_logs" / f"version_{number}"


def train_and_kill(home: Path, command: list[str]) -> None:
    """Compare two runs, of which the second is killed within its first epoch, at its end and within its second."""
    for kill_at, flags in ((0, command), (4, command), (5, RESUME), (3, RESUME), (0, RESUME)):
        run(home, flags, kill_at)
    assert_alike(version(home, 1), version(home, 0))


@pytest.mark.parametrize("copy", ["Another network", "Another loss", "Another metric"], indirect=True)
def test_a_change_of_the_model(copy: Path, request: pytest.FixtureRequest) -> None:
    section = request.node.callspec.params["copy"]
    first, *others = commands(section)
    train_and_kill(copy, first)
    printed = [run(copy, command) for command in others]
    ours = results(version(copy, 1))
    if section == "Another network":
        assert ours["fit"]["model"]["network"] == "strided"
    if section == "Another metric":
        assert {"train/f1", "val/f1"} <= ours["fit"]["metrics"].keys()
        assert float(printed[1].split()[-1]) == pytest.approx(ours["test"][-1]["test/f1"], rel=1e-3)


@pytest.mark.parametrize("copy", ["Mixup, and whatever else mixes the images of a batch"], indirect=True)
def test_mixup_is_the_same_on_several_processes(copy: Path, request: pytest.FixtureRequest) -> None:
    (command,) = commands(request.node.callspec.params["copy"])
    command += ["--model.dropout", "0", "--trainer.precision", "64-true"]
    train_and_kill(copy, command)
    run(copy, command, processes=2)
    one, two = (scalars(version(copy, number)) for number in (0, 2))
    for tag in ("train/loss_step", "val/loss", "train/accuracy"):
        assert [value for _, value in two[tag]] == pytest.approx([value for _, value in one[tag]], abs=1e-6)


@pytest.mark.parametrize("copy", ["Another data set"], indirect=True)
def test_another_data_set(copy: Path) -> None:
    (documented,) = re.findall(r"^    python -m lit_mnist (.+)$", SECTIONS["Another data set"], re.M)
    run(copy, shlex.split(documented))  # the default recipe
    run(copy, ["test", "--ckpt_path", "best", "--data.root", "digits"])
    assert results(version(copy, 0))["fit"]["metrics"]["val/accuracy"] >= 0.97
    assert results(version(copy, 0))["test"][-1]["samples"] == 297


@pytest.mark.parametrize("copy", ["Another logger"], indirect=True)
def test_another_logger(copy: Path) -> None:
    def rows(number: int) -> list[list[str]]:
        lines = [line.split(",") for line in (version(copy, number) / "metrics.csv").read_text().splitlines()]
        return [[v for name, v in zip(lines[0], line, strict=True) if "per_second" not in name] for line in lines]

    first, longer = commands("Another logger")
    train_and_kill(copy, first)
    assert not list(version(copy, 0).glob("events*"))
    run(copy, longer)
    assert rows(1)[: len(rows(0))] == rows(0)
    assert len(rows(1)) > len(rows(0))


@pytest.mark.parametrize("copy", ["A callback"], indirect=True)
def test_a_callback(copy: Path) -> None:
    first, again = commands("A callback")
    run(copy, [*first, "--model.schedule", "constant", "--model.warmup", "0", "--model.lr", "1e-9"])
    before = results(version(copy, 0))["fit"]
    run(copy, again)
    assert before["state"] == "finished"
    assert results(version(copy, 0))["fit"]["epochs"] == before["epochs"] < 5  # it had been stopped
