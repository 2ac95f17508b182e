"""A PyTorch Lightning project template, worked out on MNIST: copy it and change it."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
HOMES = {"DigitNet": "network", "LitMNIST": "module", "MNISTDataModule": "data.datamodule"}


def __getattr__(name: str) -> Any:
    # importing torch takes seconds, and `lit-mnist --version` needs none of it
    if name in HOMES:
        return getattr(import_module(f"lit_mnist.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
