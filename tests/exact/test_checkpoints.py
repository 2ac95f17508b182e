import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from lit_mnist.exact.checkpoint_io import CheckpointWriteError, DurableCheckpointIO, read_checkpoint
from lit_mnist.exact.checkpoints import BestCheckpoint, LastCheckpoint
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.run import Run


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, whole)
    spoilt = {
        "empty": b"",
        "text": b"hello",
        "truncated": whole.read_bytes()[:-200],
        "pickle": pickle.dumps(Hostile(tmp_path / "run by the pickle")),
    }
    for name, content in spoilt.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.ckpt: that file is no intact checkpoint") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    torch.save({"state_dict": Hostile(tmp_path / "run by the pickle")}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match=r"no intact checkpoint"):
        read_checkpoint(tmp_path / "hostile.ckpt")
    newer = {"state_dict": {}, "hyper_parameters": {}, "datamodule_hyper_parameters": {}, "lit_mnist_format": 3}
    torch.save(newer, tmp_path / "newer.ckpt")
    with pytest.raises(UserError, match=r"has the format 3, and this version reads 2; install a newer"):
        read_checkpoint(tmp_path / "newer.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"no checkpoint of lit_mnist"):
        read_checkpoint(tmp_path / "other.ckpt")
    assert not (tmp_path / "run by the pickle").exists()


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = DurableCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        writer.save_checkpoint({"step": 2}, path)
    assert writer.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_loading_is_with_weights_only_whatever_is_asked_for(tmp_path: Path) -> None:
    torch.save({"x": Hostile(tmp_path / "run by the pickle")}, tmp_path / "hostile.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        DurableCheckpointIO().load_checkpoint(tmp_path / "hostile.ckpt", weights_only=False)
    assert not (tmp_path / "run by the pickle").exists()


def test_bad_intervals() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every_seconds"):
        LastCheckpoint(every_seconds=-1)


def test_of_equal_scores_the_lower_loss_is_the_better(tmp_path: Path) -> None:
    class Scored(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            scores = [(0.5, 3.0), (0.5, 1.0), (0.5, 2.0), (0.4, 0.1), (0.6, 5.0), (0.6, 4.0), (0.6, 6.0)]
            accuracy, loss = scores[self.current_epoch]
            self.log_dict({"val/accuracy": accuracy, "val/loss": loss})

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    kept = []
    for epochs in (1, 2, 3, 4, 5, 7):
        best = BestCheckpoint()
        best.run = Run(tmp_path / str(epochs))
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            callbacks=[best],
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader: Any = torch.utils.data.DataLoader(torch.ones(2, 1))  # type: ignore[arg-type]
        trainer.fit(Scored(), loader, loader)
        kept.append([path.name for path in (tmp_path / str(epochs)).rglob("*.ckpt")])
    names = ["0", "1", "1", "1", "4", "5"]
    assert kept == [[f"best-epoch=0{name}-accuracy=0.{6 if name > '3' else 5}000.ckpt"] for name in names]
