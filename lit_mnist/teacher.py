"""A trained network that another one learns from (https://arxiv.org/abs/1503.02531)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lit_mnist.network import NETWORKS
from lit_mnist.training.checkpoints import read_checkpoint
from lit_mnist.training.console import shortened
from lit_mnist.training.runs import RunError


class Teacher(Callback):
    """The network of a checkpoint, which a fit reads. Its weights stay as they are and lie in no other checkpoint: a
    run that is resumed needs the file, and refuses another one in its place.

    Args:
        path: the checkpoint.
        classes: how many it must tell apart.
        temperature: what logits are divided by in `loss`.
    """

    def __init__(self, path: str, classes: int, temperature: float = 1.0) -> None:
        self.path = path
        self.classes = classes
        self.temperature = temperature
        self.network: nn.Module = nn.Identity()
        self.digest = ""

    @property
    def state_key(self) -> str:
        return f"Teacher: {self.path}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the checkpoint.

        Raises:
            RunError: it is none of a network with these classes.
        """
        if stage != "fit":
            return
        if not Path(self.path).is_file():
            raise RunError(f"model.teacher {shortened(self.path)}: that must be the checkpoint of a trained run")
        checkpoint = read_checkpoint(Path(self.path), "model.teacher")
        hp, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        try:
            network = NETWORKS[hp["network"]](hp["layers"], 0.0, hp["activation"], self.classes)
            network.load_state_dict({name.removeprefix("network."): weight for name, weight in weights.items()})
        except Exception as error:  # a setting of another kind fails wherever it is used first
            reason = shortened(" ".join(str(error).split()), 120)
            raise RunError(f"model.teacher {self.path}: no network of {self.classes} classes ({reason})") from error
        digest = hashlib.sha256()
        for weight in network.state_dict().values():
            digest.update(bytes(weight.contiguous().flatten().view(torch.uint8).tolist()))
        self.digest = digest.hexdigest()
        device = trainer.strategy.root_device
        self.network = network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("digest") != self.digest:
            raise RunError(f"model.teacher {self.path}: that network is not the one that this run had")

    def loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """The mean cross-entropy of a student's logits, float (B, C), and the probabilities that this network gives to
        the same raw images (B, 1, 28, 28), times the square of the temperature, which the gradient is divided by.
        """
        with torch.no_grad():
            probabilities = (self.network(images) / self.temperature).softmax(dim=1)
        targets = probabilities.to(logits.dtype)
        return self.temperature**2 * F.cross_entropy(logits / self.temperature, targets)
