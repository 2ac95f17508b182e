"""docs/your-own-experiment.md: each diff is applied to a copy of the package, and the commands under it are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import several
import torch
import yaml
from conftest import REPOSITORY, write_tiny_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAGE = (REPOSITORY / "docs" / "your-own-experiment.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
TINY = {
    "--data.name": "idx",
    "--data.root": "tiny",
    "--data.batch_size": "50",
    "--data.val_size": "50",
    "--model.layers": "4x5/2 8/2",
    "--model.dropout": "0.1",
    "--model.lr": "0.05",
    "--trainer.max_epochs": "2",
    "--trainer.log_every_n_steps": "2",
    "--trainer.accelerator": "cpu",
    "--checkpoint.every_n_steps": "1",
}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.M | re.S)


def commands(section: str) -> list[list[str]]:
    lines = re.findall(r"^    python -m lit_mnist (.+)$", SECTIONS[section], re.M)
    assert lines
    return [shlex.split(line) for line in lines]


def small(command: list[str]) -> list[str]:
    """On a tiny set of one's own, in place of what the command does not say itself."""
    if command[0] == "runs":
        return command
    if "--ckpt_path" in command:
        flags = {"--data.root": TINY["--data.root"]}
    else:
        flags = {key: value for key, value in TINY.items() if key not in command}
    return [*command, *(part for pair in flags.items() for part in pair)]


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the package with the diffs of the section, and the section's files beside it."""
    section = request.param
    home = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "lit_mnist", home / "lit_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    write_tiny_mnist(home / "tiny")
    for diff in blocks(section, "diff"):
        subprocess.run(["git", "apply", "-p1", "-"], input=diff, text=True, cwd=home, check=True)
    for text in blocks(section, "yaml"):
        (home / text.split()[1]).write_text(text)
    for code in blocks(section, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=home, check=True)
    return home


def in_copy(home: str, args: list[str], kill_at: int, environment: dict[str, str]) -> None:
    """One process, from which the package that the tests use is taken away; killed before a step, counted from 1."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lit_mnist"]:
        del sys.modules[name]
    os.environ |= environment
    sys.path.insert(0, home)
    os.chdir(home)
    rank = environment.get("LOCAL_RANK", "0")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f".{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    import lit_mnist
    from lit_mnist.__main__ import main

    assert str(lit_mnist.__file__).startswith(home)
    if kill_at:
        original, left = lit_mnist.LitMNIST.training_step, [kill_at]

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch, batch_idx)

        lit_mnist.LitMNIST.training_step = training_step  # type: ignore[method-assign]
    raise SystemExit(main(args))


def run(home: Path, args: list[str], kill_at: int = 0, processes: int = 1) -> str:
    """Run a command in a copy, on all processes, and give what the first prints."""
    port = str(several.free_port())
    started = []
    for rank in range(processes):
        several_of = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = several_of if processes > 1 else {}
        flags = ["--trainer.devices", str(processes)] if processes > 1 else []
        started.append(several.CONTEXT.Process(target=in_copy, args=(str(home), [*args, *flags], kill_at, environment)))
        started[-1].start()
    for process in started:
        process.join(several.LONGEST)
        process.kill()
    expected = -signal.SIGKILL if kill_at else 0
    assert [process.exitcode for process in started] == [expected] * processes, (home / ".err-0").read_text()
    return (home / ".out-0").read_text()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    of_fit = [tag for tag in events.Tags()["scalars"] if not tag.startswith("test/") and tag != "epoch"]
    tags = [tag for tag in of_fit if "per_second" not in tag]
    return {tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in tags}


def weights(run: Path) -> dict[str, torch.Tensor]:
    (last,) = run.glob("checkpoints/last-*.ckpt")
    loaded: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
    return loaded


def results(home: Path, version: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((home / f"lightning_logs/version_{version}/results.json").read_text())
    return loaded


def kill_and_compare(home: Path, flags: list[str]) -> None:
    """A second run, killed within its first epoch, at its end and within its second, is the first."""
    for kill_at in (4, 5, 3):
        run(home, flags if kill_at == 4 else ["fit", "--ckpt_path", "last", "--data.root", "tiny"], kill_at)
    run(home, ["fit", "--ckpt_path", "last", "--data.root", "tiny"])
    ours, theirs = home / "lightning_logs/version_1", home / "lightning_logs/version_0"
    assert weights(ours).keys() == weights(theirs).keys()
    assert all(torch.equal(weights(ours)[name], tensor) for name, tensor in weights(theirs).items())
    assert scalars(ours) == scalars(theirs)


@pytest.mark.parametrize("copy", ["Another network", "Another loss", "Another metric"], indirect=True)
def test_a_change_of_the_model(copy: Path, request: pytest.FixtureRequest) -> None:
    section = request.node.callspec.params["copy"]
    first, *others = commands(section)
    run(copy, small(first))
    printed = [run(copy, small(command)) for command in others]
    if section == "Another network":
        assert results(copy)["fit"]["model"]["network"] == "strided"
    if section == "Another metric":
        assert {"train/f1", "val/f1"} <= results(copy)["fit"]["metrics"].keys()
        assert "f1 0." in printed[0]
        assert "test/f1" in results(copy)["test"]
        assert printed[1].split()[-1] == str(results(copy)["test"]["test/f1"])
        assert len(scalars(copy / "lightning_logs/version_0")["train/f1"]) == 2
    kill_and_compare(copy, small(first))


@pytest.mark.parametrize("copy", ["Mixup, and whatever else mixes the images of a batch"], indirect=True)
def test_mixup_is_the_same_on_several_processes(copy: Path, request: pytest.FixtureRequest) -> None:
    (command,) = commands(request.node.callspec.params["copy"])
    flags = [*small(command), "--model.dropout", "0", "--trainer.precision", "64-true"]
    run(copy, flags)
    run(copy, flags, processes=2)
    one, two = (scalars(copy / f"lightning_logs/version_{version}") for version in (0, 1))
    assert len(one["train/loss_step"]) == 7
    for tag in ("train/loss_step", "val/loss", "train/accuracy"):
        assert [value for _, value in two[tag]] == pytest.approx([value for _, value in one[tag]], abs=1e-6)
    plain = [*(part for part in flags if part != "fit")]
    (copy / "lightning_logs/version_1").rename(copy / "two")
    kill_and_compare(copy, ["fit", *plain])


@pytest.mark.parametrize("copy", ["Another data set"], indirect=True)
def test_another_data_set(copy: Path) -> None:
    (command,) = commands("Another data set")
    run(copy, small(command))
    assert "accuracy" in run(copy, ["test", "--ckpt_path", "best", "--data.root", "digits"])
    assert results(copy)["test"]["samples"] == 297


@pytest.mark.parametrize("copy", ["Another logger"], indirect=True)
def test_another_logger(copy: Path) -> None:
    first, again = commands("Another logger")
    run(copy, small(first))
    folder = copy / "lightning_logs/version_0"
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert not list(folder.glob("events*"))
    lines = (folder / "metrics.csv").read_text().splitlines()

    def kept(line: str) -> list[str]:
        pairs = zip(lines[0].split(","), line.split(","), strict=True)
        return [value for name, value in pairs if "per_second" not in name]

    run(copy, small(first), kill_at=5)
    assert "From the run's config.yaml: CSVLogger\n" in run(copy, ["fit", "--ckpt_path", "last", "--data.root", "tiny"])
    resumed = (copy / "lightning_logs/version_1/metrics.csv").read_text().splitlines()
    assert [kept(line) for line in resumed] == [kept(line) for line in lines]
    printed = run(copy, small(again))
    assert "From the run's config.yaml: CSVLogger\n" in printed
    assert (copy / "lightning_logs/version_1/metrics.csv").read_text().splitlines()[: len(lines)] == resumed
    assert len((copy / "lightning_logs/version_1/metrics.csv").read_text().splitlines()) > len(lines)


@pytest.mark.parametrize("copy", ["A callback"], indirect=True)
def test_a_callback(copy: Path) -> None:
    first, again = commands("A callback")
    printed = run(copy, [*small(first), "--model.schedule", "constant", "--model.warmup", "0", "--model.lr", "1e-9"])
    assert "Metric val/accuracy improved." in printed + (copy / ".err-0").read_text()  # verbose
    before = results(copy)["fit"]
    assert before["state"] == "finished"
    assert before["epochs"] < 5
    printed = run(copy, small(again))
    assert "From the run's config.yaml: EarlyStopping\n" in printed
    assert "Nothing to train: this run has finished" in printed  # it had been stopped
    assert results(copy)["fit"]["epochs"] == before["epochs"]
    config = yaml.safe_load((copy / "lightning_logs/version_0/config.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["class_path"].endswith("EarlyStopping")
