"""Another project with lit_mnist's exact/ in it, under the name `machinery`: its own module, metrics, data, loggers.

Nothing here is of lit_mnist. tests/exact/test_lifted.py copies both to a folder and kills it there.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
from machinery.assembly import hold, make_callbacks, make_logger, make_plugins, place_logger
from machinery.checkpoints import BestSettings, Run, SaveSettings
from machinery.ddp import ExactDDP
from machinery.reader import read_checkpoint
from machinery.runs import newest
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MinMaxMetric, SpearmanCorrCoef
from torchmetrics.wrappers import Running

STEPS = 7  # an epoch


class Regression(LightningModule):
    """Logs in each way that Lightning has, draws from each generator, and reduces its rate on a plateau."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 1))
        self.mse = MeanSquaredError()
        self.rank = SpearmanCorrCoef()  # keeps all that it has seen
        self.recent = Running(MeanSquaredError(), window=3)
        self.wrapped = {"range": MinMaxMetric(MeanSquaredError())}  # in a plain dict, as `unregistered`
        self.unregistered = {"own": MeanSquaredError()}
        self.val_mse = MeanSquaredError()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        noise = 0.01 * (np.random.rand() + random.random())  # noqa: NPY002
        answers = self.layers(batch["inputs"] + noise)[:, 0]
        loss = nn.functional.mse_loss(answers, batch["values"])
        for metric in (self.mse, self.rank, self.recent, self.wrapped["range"], *self.unregistered.values()):
            metric.update(answers.detach(), batch["values"])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.log("mse", self.mse, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = {"rank": self.rank, "recent": self.recent, "range": self.wrapped["range"], **self.unregistered}
        values = {name: metric.compute() for name, metric in metrics.items()}
        self.log_dict({"least": values.pop("range")["min"], **values})
        for metric in metrics.values():
            metric.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_mse(self.layers(batch["inputs"])[:, 0], batch["values"])
        self.log("val/mse", self.val_mse)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/mse"}}


class Shuffled:
    """A loader with a state of its own: a generator that goes on from epoch to epoch, and how far it has come."""

    def __init__(self, samples: list[dict[str, Tensor]], batch_size: int, shuffle: bool) -> None:
        self.samples, self.batch_size, self.shuffle = samples, batch_size, shuffle
        self.generator = torch.Generator().manual_seed(3)
        self.done = self.first = 0

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.begun, first, self.first = self.generator.get_state(), self.first, 0
        size = len(self.samples)
        order = torch.randperm(size, generator=self.generator) if self.shuffle else torch.arange(size)
        for self.done, batch in enumerate(order.split(self.batch_size)[first:], first + 1):  # noqa: B020
            yield {key: torch.stack([self.samples[i][key] for i in batch]) for key in self.samples[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "generator": self.begun if self.done % len(self) else self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.first = state["done"], state["done"] % len(self)
        self.begun = state["generator"]
        self.generator.set_state(self.begun)


class Numbers(LightningDataModule):
    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(8 * STEPS, 3, generator=generator)
        values = inputs[:, 0] - inputs[:, 1] * inputs[:, 2]
        self.samples = [{"inputs": x, "values": y} for x, y in zip(inputs, values, strict=True)]

    def train_dataloader(self) -> Shuffled:
        processes = self.trainer.world_size  # type: ignore[union-attr]
        return Shuffled(self.samples[self.trainer.global_rank :: processes], 8 // processes, shuffle=True)  # type: ignore[union-attr]

    def val_dataloader(self) -> Shuffled:
        return Shuffled(self.samples[:20], 10, shuffle=False)


def fit(folder: str, devices: int = 1) -> None:
    """Train in the folder, from its newest checkpoint on where there is one."""
    runs = Path(folder)
    seed_everything(5)
    checkpoint = newest(runs / "version_0")
    run = Run.resumed(checkpoint, read_checkpoint(checkpoint)) if checkpoint else Run.new(runs)
    arguments: dict[str, Any] = {"save_dir": folder, "name": "", "version": None}
    own: Any = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": arguments}
    place_logger(run, own, 1, runs)
    own_logger: Any = locate(own["class_path"])
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ExactDDP(60, True, start_method="popen") if devices > 1 else "auto",
        max_epochs=4,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=make_callbacks(
            run,
            SaveSettings(every_n_steps=1),
            BestSettings("val/mse", "min", "loss"),
            own=[EarlyStopping("val/mse", patience=3)],
            config="a: 1\n",
        ),
        plugins=make_plugins(run),
        logger=[make_logger(run), own_logger(**arguments)],
    )
    with hold(run, trainer):
        trainer.fit(Regression(), datamodule=Numbers(), ckpt_path=checkpoint, weights_only=True)
