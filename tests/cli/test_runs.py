import csv
import io
import json
import os
from pathlib import Path

import pytest
from helpers import Capsys, fails

from lit_mnist.__main__ import main
from lit_mnist.exact import runs
from lit_mnist.exact.reader import find_checkpoint
from lit_mnist.exact.runs import only_process


def checkpoint(run: Path, name: str, age: int = 0) -> Path:
    path = run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_best_and_last_are_of_the_newest_run_that_has_one(tmp_path: Path) -> None:
    best = checkpoint(tmp_path / "version_9", "best-epoch=01-accuracy=0.9900.ckpt")
    checkpoint(tmp_path / "version_9", "last-epoch=02-step=000900-accuracy=0.9800.ckpt")
    checkpoint(tmp_path / "version_10", "last-epoch=00-step=000001.ckpt", age=50)
    last = checkpoint(tmp_path / "version_10", "last-epoch=01-step=000002.ckpt", age=20)
    assert runs.claim_version(tmp_path) == tmp_path / "version_11"
    assert find_checkpoint("best", tmp_path) == find_checkpoint(str(best), tmp_path) == best
    assert find_checkpoint("last", tmp_path) == last
    assert runs.run_folder(last) == tmp_path / "version_10"
    assert runs.run_folder(tmp_path / "some.ckpt") is None


@pytest.mark.parametrize("wanted", ["best", "last", "nowhere.ckpt", ".", "https://example.org/digits.ckpt"])
def test_a_missing_checkpoint(tmp_path: Path, wanted: str, capsys: Capsys) -> None:
    args = ["test", "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", wanted]
    assert f"--ckpt_path {wanted}" in fails(capsys, *args)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of four runs: finished, in training or interrupted, failed, without results."""
    fit = {"recipe": "tiny", "parameters": 7976, "epochs": 3, "train_seconds": 12.34, "metrics": {"val/accuracy": 0.5}}
    same = {"layers": "8", "momentum": 0.9}
    best = {"best": {"val/accuracy": 0.75}, "model": {"lr": 0.1, **same}, "settings": {"trainer.max_epochs": 2}}
    for number, results in {
        2: {"fit": fit | {"state": "finished", **best}, "test": {"test/accuracy": 0.625}},
        10: {"fit": fit | {"state": "running", "best": None, "recipe": "seed", "model": {"lr": 0.4, **same}}},
        11: {"fit": fit | {"state": "failed", "metrics": {}, "parameters": 500}},
        12: "half a fi",
    }.items():
        folder = tmp_path / "lightning_logs" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_table(root: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert main(["runs"]) == 0
    header, first, *_, last = (line.split() for line in capsys.readouterr().out.splitlines())
    columns = ["run", "recipe", "parameters", "epochs", "val_accuracy", "test_accuracy", "seconds", "state"]
    assert header == [*columns, "model.lr"]  # the one setting in which they differ
    assert first == ["version_2", "tiny", "7,976", "3", "75.00%", "62.50%", "12.3", "finished", "0.1"]
    assert last == ["version_12", *"------", "unknown", "-"]


def test_states_and_values(root: Path, capsys: Capsys) -> None:
    def table() -> list[dict[str, object]]:
        assert main(["runs", "--root_dir", str(root), "--format", "json"]) == 0
        rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
        return rows

    with only_process(root / "lightning_logs/version_10"):
        assert [row["state"] for row in table()] == ["finished", "running", "failed", "unknown"]
    rows = table()
    assert [row["state"] for row in rows] == ["finished", "interrupted", "failed", "unknown"]
    assert [row["val_accuracy"] for row in rows] == [0.75, 0.5, None, None]
    assert rows[0] == rows[0] | {"parameters": 7976, "epochs": 3, "seconds": 12.34, "test_accuracy": 0.625}


def test_columns_and_order(root: Path, capsys: Capsys) -> None:
    where = ["--root_dir", str(root), "--format", "csv"]
    assert main(["runs", *where, "--sort", "parameters"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["parameters"] for row in rows] == ["", "500", "7976", "7976"]
    assert main(["runs", *where, "--columns", "run, model.layers,val/accuracy", "--sort", "model.lr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run,model.layers,val/accuracy"
    assert lines[-2:] == ["version_2,8,0.5", "version_10,8,0.5"]


@pytest.mark.parametrize(
    "flags", [("--root_dir", "nowhere"), ("--sort", "colour"), ("--columns", "model.colour"), ("--best",)]
)
def test_bad_flags(root: Path, flags: tuple[str, ...], capsys: Capsys) -> None:
    error = fails(capsys, "runs", "--root_dir", str(root), *flags)
    assert [part for part in flags if part not in error] == []
