"""Other data by `data.name`, and other networks by `model.network`, on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_mnist.network import NETWORKS

TINY = ["--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
TINY += ["--model.lr", "0.05", "--model.ema_decay", "0", "--data.batch_size", "50", "--data.val_size", "50"]
RUN = Path("lightning_logs/version_0")
Command = Callable[..., int]


def results() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads((RUN / "results.json").read_text())
    return loaded


class Foreign(nn.Module):
    """Neither convolution nor linear layer, a scalar among its parameters, and nothing that torch can trace."""

    def __init__(self, layers: str, dropout: float, activation: str, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(784, classes))
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        if torch._C._get_tracing_state():
            raise ValueError("no tracing")
        return self.gain * (images.flatten(1) / 255) @ self.weight


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        (["mlp", "--model.layers", "32 16"], 784 * 32 + 2 * 32 + 32 * 16 + 2 * 16 + 16 * 10 + 10),
        (["foreign"], 7841),
    ],
)
def test_another_network(flags: list[str], parameters: int, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "foreign", Foreign)
    assert command("fit", *TINY, "--model.network", *flags) == 0
    assert (results()["fit"]["steps"], results()["fit"]["parameters"]) == (21, parameters)
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    assert results()["test"]["test/accuracy"] > 0.3  # of chance 0.1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.network", "x"], "model.network must be "),
        (["--model.network", "mlp"], "model.layers must be widths"),
        (["--data.name", "x"], "data.name must be one of mnist, "),
        (["--data.name", "idx"], "data.root"),
    ],
)
def test_a_wrong_name(flags: list[str], said: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not RUN.exists()


def write_own(root: Path, classes: int) -> None:
    """Four IDX files, each class a bar in a row of its own."""
    root.mkdir(parents=True)
    for part, count in (("train", 20 * classes), ("t10k", 5 * classes)):
        labels = np.arange(count, dtype=np.uint8) % classes
        images = np.zeros((count, 28, 28), np.uint8)
        images[np.arange(count), 2 * labels + 1] = 255
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            (root / f"{part}-{name}").write_bytes(bytes((0, 0, 8, array.ndim)) + shape + array.tobytes())


def test_own_data_with_twelve_classes(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_own(tmp_path / "own", classes=12)
    before = {path: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    own = ["--data.root", str(tmp_path / "own")]
    flags = ["--model.layers", "4x5/2 8/2", "--data.shift", "0", "--data.name", "idx", "--data.val_size", "24"]
    assert command("fit", *TINY, *flags, *own) == 0
    fit = results()["fit"]
    assert (fit["parameters"], fit["model"]["classes"]) == (100 + 8 + 288 + 16 + 8 * 12 + 12, 12)
    assert (fit["data"]["name"], {"root", "download"} & set(fit["data"])) == ("idx", set())
    assert command("test", "--ckpt_path", "last", *own) == 0
    assert "/60 (" in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", *own) == 0
    assert (results()["fit"]["epochs"], results()["fit"]["model"]["classes"]) == (4, 12)
    assert {path: path.read_bytes() for path in before} == before


def test_more_classes_than_the_model_has(
    command: Command, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own(tmp_path / "own", classes=12)
    assert command("test", "--ckpt_path", "last", "--data.root", str(tmp_path / "own"), "--data.name", "idx") == 2
    assert "data.name idx has 12 classes" in capsys.readouterr().err
