import os
import re
from pathlib import Path

import pytest
import torch

from lit_mnist import runs
from lit_mnist.runs import RunError


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
    checkpoint(tmp_path / "version_9", "last-epoch=02-accuracy=0.9800.ckpt")
    checkpoint(tmp_path / "version_10", "last-epoch=00.ckpt", age=50)
    last = checkpoint(tmp_path / "version_10", "last-epoch=01.ckpt", age=20)
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
    with pytest.raises(RunError, match=f"--ckpt_path {re.escape(wanted)}.*{reason}"):
        runs.find_checkpoint(wanted, tmp_path)


def test_only_plain_settings_are_taken() -> None:
    hostile = {"lr": 0.1, "name": "x", "flag": True, "_class_path": ["os.system"], "init": {"class_path": "os.system"}}
    assert runs.plain_settings("model", hostile) == {"model.lr": 0.1, "model.name": "x", "model.flag": True}
    settings = {"trainer.max_epochs": 3, "checkpoint.every_seconds": 1.5}
    poison = {
        "trainer.logger": "os.system",
        "trainer.strategy": "x.Y",
        "model.lr": 3,
        "trainer.precision": ["os.system"],
    }
    assert runs.run_settings(settings | poison) == settings
