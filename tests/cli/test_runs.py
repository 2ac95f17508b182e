import csv
import io
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import RUN, TINY, Capsys, Command, fails, results, scalars, write_tiny_mnist
from torch import nn

from lit_mnist.__main__ import main
from lit_mnist.data import datamodule
from lit_mnist.exact.runs import only_process


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of four runs: finished, in training or interrupted, failed, without results."""
    fit = {"recipe": "tiny", "parameters": 7976, "epochs": 3, "train_seconds": 12.34, "metrics": {"val/accuracy": 0.5}}
    same = {"layers": "8", "momentum": 0.9}
    best = {"best": {"step": 9, "val/accuracy": 0.75, "val/loss": 1.5}, "settings": {"trainer.max_epochs": 2}}
    best |= {"model": {"lr": 0.1, **same}, "test_set": "mnist", "metrics": {"val/accuracy": 0.5, "val/loss": 2.5}}
    test = {"step": 9, "test_set": "mnist", "whole": True, "test/accuracy": 0.625}
    others = [{**test, "test/accuracy": 0.9, **of} for of in ({"step": 8}, {"test_set": "idx"}, {"whole": False})]
    running = {"state": "running", "best": None, "recipe": "seed", "model": {"lr": 0.4, **same}}
    for number, content in {
        2: {"fit": fit | {"state": "finished", **best}, "test": [*others, test, *others]},
        10: {"fit": fit | running, "test": "edited by hand"},
        11: {"fit": fit | {"state": "failed", "metrics": {}, "parameters": 500}},
        12: "half a fi",
    }.items():
        folder = tmp_path / "lightning_logs" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(content))
    return tmp_path


def test_table(root: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.delenv("COLUMNS", raising=False)  # which pytest-xdist sets
    assert main(["runs"]) == 0
    header, first, *_, last = (line.split() for line in capsys.readouterr().out.splitlines())
    columns = ["run", "val_accuracy", "test_accuracy", "state", "model.lr", "epochs"]  # they differ in one setting
    assert header == [*columns, "seconds", "recipe", "parameters"]
    assert first == ["version_2", "75.00%", "62.50%", "finished", "0.1", "3", "12.3", "tiny", "7,976"]
    assert last == ["version_12", "-", "-", "unknown", *"-----"]
    monkeypatch.setenv("COLUMNS", "70")  # of a narrow terminal
    assert main(["runs"]) == 0
    narrow, *rows = capsys.readouterr().out.splitlines()
    assert narrow.split() == [*columns, "\\"]
    assert max(map(len, [narrow, *rows])) <= 70


def test_values_and_order(root: Path, capsys: Capsys) -> None:
    held = only_process(root / "lightning_logs/version_10")
    for context, state in ((held, "running"), (nullcontext(), "interrupted")):
        with context:
            assert main(["runs", "--root_dir", str(root), "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["state"] for row in rows] == ["finished", state, "failed", "unknown"]
    assert [row["val_accuracy"] for row in rows] == [0.75, 0.5, None, None]
    assert [row["test_accuracy"] for row in rows] == [0.625, None, None, None]
    assert rows[0] == rows[0] | {"parameters": 7976, "epochs": 3, "seconds": 12.34}
    where = ["--root_dir", str(root), "--format", "csv"]
    assert main(["runs", *where, "--sort", "parameters"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["parameters"] for row in rows] == ["", "500", "7976", "7976"]
    columns = ["--columns", "run, model.layers,val/accuracy,val/loss", "--sort", "model.lr"]
    assert main(["runs", *where, *columns]) == main(["runs", *where, *columns, "--descending"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run,model.layers,val/accuracy,val/loss"
    assert lines[3:5] == lines[7:5:-1] == ["version_2,8,0.75,1.5", "version_10,8,0.5,"]  # of one checkpoint


@pytest.mark.parametrize("flag", ["--root_dir=nowhere", "--sort=colour", "--columns=model.colour", "--best=1"])
def test_bad_flags(root: Path, flag: str, capsys: Capsys) -> None:
    error = fails(capsys, "runs", "--root_dir", str(root), flag)
    assert [part for part in flag.split("=") if part not in error] == []


def test_every_evaluation_is_kept_and_one_is_the_test_score(
    command: Command, trained: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score() -> object:
        capsys.readouterr()
        assert main(["runs", "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)[0]["test_accuracy"]

    monkeypatch.setattr(datamodule, "EVALUATION_BATCH_SIZE", 40)
    write_tiny_mnist(tmp_path / "other", 100, 60)
    test = ["test", "--trainer.accelerator", "cpu", "--ckpt_path", "best"]
    assert command(*test, "--trainer.limit_test_batches", "1") == 0
    assert "40 samples of mnist" in capsys.readouterr().out
    assert score() is None
    assert command(*test) == command(*test, "--trainer.limit_test_batches", "2") == 0
    whole = next(one["test/accuracy"] for one in results()["test"] if one["samples"] == 100)
    assert main([*test, "--data.name", "idx", "--data.root", str(tmp_path / "other")]) == command(*test) == 0
    assert score() == whole
    found = [(one["test_set"].split()[0], one["samples"], one["whole"]) for one in results()["test"]]
    assert found == [("mnist", 40, False), ("mnist", 80, False), ("idx", 60, True), ("mnist", 100, True)]


def test_best_says_which_run_is_more_accurate(network: nn.Module, capsys: Capsys) -> None:
    logs = Path("lightning_logs")
    for number, accuracy, data in ((5, 0.1, "mnist"), (4, 0.8, "mnist"), (3, 0.9, "mnist"), (2, 0.99, "kmnist")):
        run = shutil.copytree(logs / "version_0", logs / f"version_{number}")
        (run / "results.json").write_text(json.dumps({"fit": {"best": {"val/accuracy": accuracy}, "test_set": data}}))
    for wanted, expected in (("best", ["version_5", "version_3"]), (f"{logs}/version_5", ["version_5"])):
        assert main(["demo", "--port", "99999", "--ckpt_path", wanted]) == 2
        assert re.findall(r"version_\d", capsys.readouterr().out) == expected


def test_own_data_with_twelve_classes(command: Command, tmp_path: Path, capsys: Capsys) -> None:
    write_tiny_mnist(tmp_path / "own", 240, 60, classes=12)
    own, more = ["--data.root", str(tmp_path / "own")], ["--trainer.max_epochs", "3", "--model.ema_decay", "0"]
    assert command("fit", *TINY, *more, "--data.name", "idx", "--data.val_size", "24", *own) == 0
    fit = results()["fit"]
    assert (fit["parameters"], fit["model"]["classes"]) == (100 + 8 + 288 + 16 + 8 * 12 + 12, 12)
    assert (fit["data"]["name"], {"root", "download"} & set(fit["data"])) == ("idx", set())
    assert command("test", "--ckpt_path", "last", *own) == 0
    assert "/60 (" in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", *own) == 0
    assert (results()["fit"]["epochs"], results()["fit"]["model"]["classes"]) == (4, 12)
    write_tiny_mnist(tmp_path / "other", 240, 40, classes=12)
    assert command("test", "--ckpt_path", "last", "--data.root", str(tmp_path / "other")) == 0
    assert [step for step, _ in scalars(RUN)["test/loss"]] == [15]  # of the run's own data
    write_tiny_mnist(tmp_path / "more", classes=13)
    args = ["test", "--ckpt_path", "last", "--data.root", str(tmp_path / "more")]
    assert "data.name idx has 13 classes" in fails(capsys, *args)
