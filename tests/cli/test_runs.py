import csv
import io
import json
import os
import re
from pathlib import Path

import pytest
import torch

from lit_mnist.__main__ import main
from lit_mnist.cli.runs import everything_of
from lit_mnist.cli.settings import plain_settings, run_settings
from lit_mnist.exact import runs
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import only_process


def checkpoint(run: Path, name: str, age: int = 0) -> Path:
    path = run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "hyper_parameters": {}, "datamodule_hyper_parameters": {}}, path)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_claims_the_next_number(tmp_path: Path) -> None:
    (tmp_path / "version_2").mkdir()
    (tmp_path / "version_10").mkdir()
    (tmp_path / "version_x").mkdir()
    (tmp_path / "version_99").write_text("a file is no run")
    assert runs.claim_version(tmp_path) == 11
    assert runs.claim_version(tmp_path) == 12
    assert [run.name for run in runs.versions(tmp_path)] == ["version_12", "version_11", "version_10", "version_2"]
    assert runs.claim_version(tmp_path / "new" / "place") == 0


def test_best_and_last_are_of_the_newest_run_that_has_one(tmp_path: Path) -> None:
    best = checkpoint(tmp_path / "version_9", "best-epoch=01-accuracy=0.9900.ckpt")
    checkpoint(tmp_path / "version_9", "last-epoch=02-step=000900-accuracy=0.9800.ckpt")
    checkpoint(tmp_path / "version_10", "last-epoch=00-step=000001.ckpt", age=50)
    last = checkpoint(tmp_path / "version_10", "last-epoch=01-step=000002.ckpt", age=20)
    (tmp_path / "version_11").mkdir()
    assert runs.find_checkpoint("best", tmp_path) == best
    assert runs.find_checkpoint("last", tmp_path) == last
    assert runs.find_checkpoint(str(best), tmp_path) == best
    assert runs.run_folder(last) == tmp_path / "version_10"
    assert runs.run_folder(tmp_path / "some.ckpt") is None


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("best", "has a best checkpoint"),
        ("last", "has a last checkpoint"),
        ("nowhere.ckpt", "does not exist"),
        (".", "is a folder"),
        ("https://example.org/digits.ckpt", "only local files"),
    ],
)
def test_a_missing_checkpoint_is_an_error(tmp_path: Path, wanted: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"--ckpt_path {re.escape(wanted)}.*{reason}"):
        runs.find_checkpoint(wanted, tmp_path)


def test_only_plain_settings_are_taken() -> None:
    hostile = {"lr": 0.1, "name": "x", "flag": True, "_class_path": ["os.system"], "init": {"class_path": "os.system"}}
    assert plain_settings("model", hostile) == {"model.lr": 0.1, "model.name": "x", "model.flag": True}
    settings = {"trainer.max_epochs": 3, "checkpoint.every_seconds": 1.5}
    poison = {
        "trainer.logger": "os.system",
        "trainer.strategy": "x.Y",
        "model.lr": 3,
        "trainer.precision": ["os.system"],
    }
    assert run_settings(settings | poison) == settings


@pytest.fixture
def some_runs(tmp_path: Path) -> Path:
    """Ten runs and more: a finished one, one that says it is running, one that failed, one without results."""
    folder = tmp_path / "lightning_logs"
    fit = {"recipe": "tiny", "parameters": 7976, "epochs": 3, "train_seconds": 12.34, "metrics": {"val/accuracy": 0.5}}
    for number, results in {
        2: {"fit": fit | {"state": "finished", "best": {"val/accuracy": 0.75}}, "test": {"test/accuracy": 0.625}},
        10: {"fit": fit | {"state": "running", "best": None, "recipe": "seed"}},
        11: {"fit": fit | {"state": "failed", "metrics": {}, "parameters": 500}},
    }.items():
        (folder / f"version_{number}").mkdir(parents=True)
        (folder / f"version_{number}" / "results.json").write_text(json.dumps(results))
    (folder / "version_12").mkdir()
    (folder / "version_12" / "results.json").write_text("half a fi")
    return folder


def test_summaries(some_runs: Path) -> None:
    folders = list(reversed(runs.versions(some_runs)))
    with only_process(some_runs / "version_10"):
        rows = [everything_of(run) for run in folders]
        assert [row["state"] for row in rows] == ["finished", "running", "failed", "unknown"]
    assert [everything_of(run)["state"] for run in folders] == ["finished", "interrupted", "failed", "unknown"]
    assert [row["run"] for row in rows] == ["version_2", "version_10", "version_11", "version_12"]
    assert [row["val_accuracy"] for row in rows] == [0.75, 0.5, None, None]
    assert [row["test_accuracy"] for row in rows] == [0.625, None, None, None]
    assert rows[0] == rows[0] | {"recipe": "tiny", "parameters": 7976, "epochs": 3, "seconds": 12.34}


def test_runs_command(some_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(some_runs.parent)
    assert main(["runs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [
        ["val", "test"],
        ["run", "recipe", "parameters", "epochs", "accuracy", "accuracy", "seconds", "state"],
    ]
    assert lines[2] == ["version_2", "tiny", "7,976", "3", "75.00%", "62.50%", "12.3", "finished"]
    assert lines[5] == ["version_12", "-", "-", "-", "-", "-", "-", "unknown"]
    monkeypatch.chdir("/")
    where = ["--root_dir", str(some_runs.parent)]
    assert main(["runs", *where, "--format", "csv", "--sort", "parameters"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["parameters"] for row in rows] == ["", "500", "7976", "7976"]
    assert main(["runs", *where, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == ["version_2", "version_10", "version_11", "version_12"]
    assert rows[0]["val_accuracy"] == 0.75


def test_columns(some_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--root_dir", str(some_runs.parent), "--format", "csv"]
    for number, lr in ((2, 0.1), (10, 0.4)):
        path = some_runs / f"version_{number}" / "results.json"
        results = json.loads(path.read_text())
        results["fit"] |= {"model": {"lr": lr, "layers": "8"}, "data": {"seed": 1}}
        results["fit"]["settings"] = {"trainer.max_epochs": number}
        path.write_text(json.dumps(results))
    assert main(["runs", *where]) == 0
    header = capsys.readouterr().out.splitlines()[0].split(",")
    assert header[-2:] == ["model.lr", "trainer.max_epochs"]  # the two in which they differ
    assert main(["runs", *where, "--columns", "run, model.layers,val/accuracy", "--sort", "model.lr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run,model.layers,val/accuracy"
    assert lines[-2:] == ["version_2,8,0.5", "version_10,8,0.5"]
    assert main(["runs", *where, "--columns", "model.colour"]) == 2
    assert "--columns model.colour: no run has it; allowed are " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--root_dir", "nowhere"], "--root_dir nowhere: there is no folder lightning_logs in it"),
        (["--sort", "colour"], "--sort colour: no run has it; allowed are run, recipe, "),
        (["--best"], "unrecognized arguments: --best"),
    ],
)
def test_runs_command_told_wrong(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", *flags]) == 2
    assert reason in capsys.readouterr().err
    assert main(["runs", "--help"]) == 0
