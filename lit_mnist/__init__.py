"""A PyTorch Lightning project template, worked out on MNIST: copy it and change it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_mnist.data.datamodule import MNISTDataModule
    from lit_mnist.module import LitMNIST
    from lit_mnist.network import DigitNet

__version__ = "0.1.0"
__all__ = ["DigitNet", "LitMNIST", "MNISTDataModule", "__version__"]

_HOMES = {
    "DigitNet": "lit_mnist.network",
    "LitMNIST": "lit_mnist.module",
    "MNISTDataModule": "lit_mnist.data.datamodule",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, and `lit-mnist --version` needs none of it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
