"""LitMNIST: the loss, the metrics, the optimizer and its schedule around a network."""

import math
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_mnist.exact.averaging import MovingAverage
from lit_mnist.exact.progress import total_steps
from lit_mnist.network import DIGITS, NETWORKS, Batch, Shape, make_network


class CrossEntropy(MeanMetric):
    """The mean cross-entropy of logits, float (N, C), and targets, int64 (N,)."""

    def update(self, logits: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update(F.cross_entropy(logits, targets, reduction="none"))


class LitMNIST(LightningModule):
    """A digit classifier and how it is trained; the defaults are the recipe of a plain `fit`.

    Args:
        layers: layers of the network: for `digitnet` its convolutions (see `DigitNet`), for `mlp` its widths.
        dropout: probability of dropout after each layer but the last.
        activation: activation after each layer.
        optimizer: sgd, or adamw with betas 0.9 and 0.99.
        lr: highest learning rate of the schedule; each step's is `train/learning_rate` in TensorBoard.
        momentum: momentum of sgd; adamw ignores it.
        nesterov: whether sgd uses Nesterov momentum (https://proceedings.mlr.press/v28/sutskever13.html).
        weight_decay: weight decay of convolutions and linear layers, never of biases and batch norm.
        schedule: how the learning rate falls after the warm-up: not at all, or to zero.
        warmup: share of all steps, 0 to 1, in which the learning rate rises linearly from a tenth of `lr`.
        label_smoothing: share of the target that the loss spreads evenly over the classes
            (https://arxiv.org/abs/1512.00567). The metrics `*/loss` are cross-entropy without it, so they compare.
        ema_decay: decay of the weights' exponential moving average, which is validated, tested and kept; 0 for none.
            It averages over 1 / (1 - ema_decay) steps, and begins after as many.
        network: name of the network, from `network.NETWORKS`.
        classes: number of classes, or 1 for a value. The command line takes it and `image_shape` from the data.
        image_shape: channels, height and width.
        views: answers average the logits of the image alone (1), or also moved by up to a pixel (9), or two (25).
    """

    def __init__(
        self,
        layers: str = "16x5v/2 16v 20/2 24 24v",
        dropout: float = 0.0,
        activation: Literal["relu", "silu"] = "silu",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.4,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        schedule: Literal["constant", "linear", "cosine"] = "linear",
        warmup: float = 0.2,
        label_smoothing: float = 0.0,
        ema_decay: float = 0.99,
        network: str = "digitnet",
        classes: int = 10,
        image_shape: Shape = DIGITS,
        views: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_ranges(self.hparams)
        self.network = make_network(self.hparams)
        # neither checks the values it is given, which would wait for the device in every step
        metrics: dict[str, Metric | MetricCollection] = {
            "loss": CrossEntropy(nan_strategy="disable"),
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
        }
        # which torchmetrics would otherwise group by their values
        self.train_metrics = MetricCollection(metrics, prefix="train/", compute_groups=False)
        self.val_metrics = self.train_metrics.clone(prefix="val/")
        self.test_metrics = self.train_metrics.clone(prefix="test/")

    def forward(self, images: Tensor) -> Tensor:
        """Map raw images, uint8 (B, 1, 28, 28), to logits, float (B, C) for C classes."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        logits = self(images)
        self.train_metrics.update(logits, targets)
        loader: Any = self._trainer and self.trainer.train_dataloader
        if getattr(loader, "shares", None):  # its next epoch takes the hardest images
            loader.keep_losses(F.cross_entropy(logits, targets, reduction="none"))
        return F.cross_entropy(logits, targets, label_smoothing=self.hparams["label_smoothing"])

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        logits: Tensor = self(images)
        self.val_metrics.update(logits, targets)
        return logits

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        self.test_metrics.update(self(images), targets)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics)  # which Lightning resets once they are logged

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics, prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics)

    def configure_callbacks(self) -> list[Callback]:
        return [MovingAverage(self.hparams["ema_decay"])] if self.hparams["ema_decay"] else []

    def configure_optimizers(self) -> Any:
        hp: Any = self.hparams
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": hp.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=hp.lr, betas=(0.9, 0.99))
        if hp.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=hp.lr, momentum=hp.momentum, nesterov=hp.nesterov)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, self.lr_factor), "interval": "step"}]

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of `lr`."""
        hp: Any = self.hparams
        if step == 0 or (hp.schedule == "constant" and hp.warmup == 0):
            return 0.1 if hp.warmup > 0 else 1.0  # at step 0 the trainer does not know yet how many steps there are
        total = total_steps(self.trainer)
        warmup_steps = hp.warmup * total
        if step < warmup_steps:
            return 0.1 + 0.9 * step / warmup_steps
        share = min(1.0, (step - warmup_steps) / max(1.0, total - warmup_steps))
        return {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[hp.schedule]


def check_ranges(hp: Any) -> None:
    """Raise one ValueError for all settings out of range but the layers."""
    checks = (
        *((name, "in [0, 1)", 0 <= hp[name] < 1) for name in ("dropout", "momentum", "label_smoothing", "ema_decay")),
        ("lr", "in (0, 1e30]", 0 < hp.lr <= 1e30),
        ("nesterov", "false without momentum", not hp.nesterov or hp.momentum > 0 or hp.optimizer != "sgd"),
        ("weight_decay", "in [0, 1e6]", 0 <= hp.weight_decay <= 1e6),
        ("warmup", "in [0, 1]", 0 <= hp.warmup <= 1),
        ("network", " or ".join(NETWORKS), hp.network in NETWORKS),
        ("views", "1, 9 or 25", hp.views in (1, 9, 25)),
    )
    if problems := [f"model.{name} must be {allowed}, got {hp[name]}" for name, allowed, ok in checks if not ok]:
        raise ValueError("; ".join(problems))
