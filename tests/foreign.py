"""Three projects in the style of Lightning's tutorials, with lit_mnist's exact/ among them as `machinery`.

Nothing here is of lit_mnist. tests/exact/test_lifted.py and benchmarks/kill.py copy both to a folder and kill them.
"""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machinery.assembly import hold, make_callbacks, make_logger, make_plugins
from machinery.checkpoints import BestSettings, Run, SaveSettings
from machinery.ddp import ExactDDP
from machinery.runs import newest, read_checkpoint
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, softplus
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAccuracy


class Bars(Dataset[Tensor]):
    """Images, float (1, 8, 8) in 0..1, of a bright row each; for training turned and shifted at random."""

    def __init__(self, size: int, train: bool) -> None:
        self.size, self.train = size, train

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        image = torch.zeros(1, 8, 8)
        image[0, index % 8] = 0.9
        if self.train:
            image = image.rot90(random.randrange(4), (1, 2)).roll(int(torch.randint(8, ())), 1)
            image += 0.1 * np.random.rand()  # noqa: NPY002
        return image


class Autoencoder(LightningModule):
    """Learns a code of a few numbers for an image, at a lower rate once the validation is no better."""

    def __init__(self, code: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        encoder = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64, code)
        decoder = nn.Linear(code, 64), nn.GELU(), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 1, 2, stride=2)
        self.network = nn.Sequential(*encoder, *decoder)
        self.val_error = MeanSquaredError()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        loss = mse_loss(self(images), images)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        return loss

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        self.val_error(self(images), images)
        self.log("val_loss", self.val_error)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class GAN(LightningModule):
    """A network that draws images and one that tells them from real ones, with an optimizer each."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent, 64), nn.Unflatten(1, (4, 4, 4)), nn.BatchNorm2d(4), nn.ReLU())
        self.generator.append(nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1))
        self.discriminator = nn.Sequential(nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten())
        self.discriminator.extend([nn.Dropout(0.3), nn.Linear(64, 1)])
        self.examples = torch.randn(2, latent)

    def forward(self, noise: Tensor) -> Tensor:
        return torch.sigmoid(self.generator(noise))

    def loss(self, images: Tensor, real: int) -> Tensor:
        return softplus((1 - 2 * real) * self.discriminator(images)).mean()

    def training_step(self, images: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        draws, judges = optimizers
        drawn = self(torch.randn(len(images), self.examples.shape[1]).type_as(images))
        for optimizer, name in ((draws, "generator"), (judges, "discriminator")):
            self.toggle_optimizer(optimizer)
            loss = self.loss(drawn, 1) if optimizer is draws else self.loss(images, 1) + self.loss(drawn.detach(), 0)
            self.log(f"{name}_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        pictures: Any = self.logger
        pictures.experiment.add_images("examples", self(self.examples.to(self.device)), self.current_epoch)

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        optimizers = [torch.optim.Adam(part.parameters(), lr=2e-3, betas=(0.5, 0.999)) for part in parts]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in optimizers]


def sentences(size: int) -> list[tuple[Tensor, bool]]:
    """Return texts of 3 to 12 of the words 1 to 19, int64 (T,), and whether their first word comes again."""
    chosen = random.Random(size)
    texts = [chosen.choices(range(1, 20), k=chosen.randint(3, 12)) for _ in range(size)]
    return [(torch.tensor(text), text[0] in text[1:]) for text in texts]


def pad(samples: list[tuple[Tensor, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return texts, padded with 0 to the longest, int64 (B, T), their lengths, int64 (B,), and classes, bool (B,)."""
    texts, classes = zip(*samples, strict=True)
    return pad_sequence([*texts], batch_first=True), torch.tensor([*map(len, texts)]), torch.tensor(classes)


class TextClassifier(LightningModule):
    """Reads embedded words one after the other, and decides between two classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(20, width, padding_idx=0)
        self.reader = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * width, 1))
        self.scores: Any = nn.ModuleDict({f"{part}_acc": BinaryAccuracy() for part in ("train", "val")})

    def forward(self, texts: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(texts), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.reader(packed)[1][0].transpose(0, 1).flatten(1)).squeeze(1)

    def step(self, batch: tuple[Tensor, Tensor, Tensor], part: str) -> Tensor:
        *inputs, classes = batch
        logits = self(*inputs)
        loss = binary_cross_entropy_with_logits(logits, classes.float())
        self.scores[f"{part}_acc"](logits, classes)
        self.log(f"{part}_loss", loss, batch_size=len(classes), sync_dist=part == "val")
        self.log(f"{part}_acc", self.scores[f"{part}_acc"], on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


# module, data sets for training and, in two of them, for validation, and what else its loaders are given
PROJECTS: dict[str, tuple[type[LightningModule], list[Any], dict[str, Any]]] = {
    "autoencoder": (Autoencoder, [Bars(56, True), Bars(16, False)], {"num_workers": 2}),
    "gan": (GAN, [Bars(56, True)], {"drop_last": True}),
    "text": (TextClassifier, [sentences(60), sentences(20)], {"collate_fn": pad}),
}


def fit(name: str, folder: str, devices: int = 1) -> None:
    """Train in the folder, from its newest checkpoint on where there is one."""
    runs = Path(folder)
    seed_everything(5)
    kind, sets, settings = PROJECTS[name]
    module = kind()
    loaders: Any = [DataLoader(part, 8, shuffle=part is sets[0], **settings) for part in sets]
    checkpoint = newest(runs / "version_0")
    run = Run.resumed(checkpoint, read_checkpoint(checkpoint)) if checkpoint else Run().claim(runs)
    best = BestSettings("val_loss", "min", "val_loss") if len(loaders) > 1 else None
    own = [EarlyStopping("val_loss")] if best else []
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ExactDDP(60, True, start_method="popen") if devices > 1 else "auto",
        max_epochs=4,
        log_every_n_steps=2,
        enable_progress_bar=False,
        callbacks=make_callbacks(run, SaveSettings(every_n_steps=1), best, own=own),
        plugins=make_plugins(run),
        logger=make_logger(run),
    )
    with hold(run, trainer):
        trainer.fit(module, loaders[0], loaders[1:] or None, ckpt_path=checkpoint, weights_only=True)


if __name__ == "__main__":
    fit(sys.argv[1], sys.argv[2], int(sys.argv[3]))
