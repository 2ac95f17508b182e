"""Loggers of the user's: a run's folder stays its own, and a resumed run logs where it did."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.loggers import Logger

from lit_mnist.module import LitMNIST

TINY = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
TINY += ["--model.layers", "4x5/2", "--data.batch_size", "50", "--data.val_size", "50", "--board.every_n_epochs", "0"]
Command = Callable[..., int]


class Remote(Logger):
    """Logs to a run of its own elsewhere, as WandbLogger does, and has no folder."""

    def __init__(self, version: str | None = None, project: str = "digits") -> None:
        super().__init__()
        self.id = version or uuid.uuid4().hex[:8]

    @property
    def name(self) -> str:
        return "remote"

    @property
    def version(self) -> str:
        return self.id

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with Path(f"remote-{self.id}.txt").open("a") as file:
            file.writelines(f"{name} {step}\n" for name in metrics if name == "val/loss")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_remote_logger(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.logger", f"{__name__}.Remote"]
    assert command("fit", *TINY, *flags) == 0
    assert "tensorboard" not in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert "From the run's config.yaml: Remote\n" in capsys.readouterr().out
    (log,) = Path().glob("remote-*.txt")
    assert log.read_text() == "val/loss 6\nval/loss 13\nval/loss 20\n"
    assert command("fit", *TINY, *flags) == 0
    assert len(list(Path().glob("remote-*.txt"))) == 2
    for number in (0, 1):
        run = Path(f"lightning_logs/version_{number}")
        assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "results.json", ".lock"}
    assert sorted(path.name for path in Path().iterdir() if path != log) == [
        "lightning_logs",
        *(path.name for path in Path().glob("remote-*.txt") if path != log),
    ]
    # config.yaml repeats the run, and does not continue its log
    assert (
        yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["trainer"]["logger"]["init_args"][
            "version"
        ]
        is None
    )


def test_several_loggers_and_the_board(command: Command) -> None:
    both = """[{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "."}},
               {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}]"""
    assert command("fit", *TINY, "--trainer.logger", both, "--board.every_n_epochs", "1") == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    run = Path("lightning_logs/version_0")
    assert list(run.glob("events.out.tfevents.*"))
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    (table,) = Path("elsewhere").rglob("metrics.csv")
    steps = [line.split(",") for line in table.read_text().splitlines()]
    assert [row[steps[0].index("step")] for row in steps[1:] if row[steps[0].index("val/loss")]] == ["6", "13", "20"]


def test_a_plain_loader_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_mnist.data.datamodule import MNISTDataModule

    def plain(self: MNISTDataModule) -> Any:
        images, targets = self.sets["train"]
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), batch_size=50, shuffle=True)

    monkeypatch.setattr(MNISTDataModule, "train_dataloader", plain)
    assert command("fit", *TINY, "--data.shift", "0") == 2
    error = capsys.readouterr().err
    assert "train_dataloader gives a DataLoader, which has no state_dict and load_state_dict" in error
    assert error.count("\n") == 1
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_a_hook_that_a_resume_would_leave_out_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    monkeypatch.setattr(LitMNIST, hook, lambda *_: None, raising=False)
    assert command("fit", *TINY) == 2
    assert f"LitMNIST.{hook} comes after a checkpoint is saved" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()
