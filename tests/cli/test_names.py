"""Other data by `data.name`, and other networks by `model.network`, on the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lit_mnist import LitMNIST, MNISTDataModule
from lit_mnist.__main__ import main
from lit_mnist.network import NETWORKS

TINY = ["--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
TINY += ["--model.lr", "0.05", "--model.ema_decay", "0", "--data.batch_size", "50", "--data.val_size", "50"]
CPU = ["--trainer.accelerator", "cpu"]
Command = Callable[..., int]


@pytest.fixture
def command(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command with the tiny data set, from a folder of its own."""
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return lambda name, *flags: main([name, "--data.root", str(tiny_root), *flags])


def results() -> dict[str, dict[str, float]]:
    loaded: dict[str, dict[str, float]] = json.loads(Path("lightning_logs/version_0/results.json").read_text())
    return loaded


def tags() -> dict[str, list[str]]:
    events = EventAccumulator("lightning_logs/version_0")
    events.Reload()
    found: dict[str, list[str]] = events.Tags()
    return found


def rows(pattern: str) -> list[dict[str, str]]:
    (path,) = Path("lightning_logs/version_0").glob(pattern)
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_network_without_convolutions(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY, "--model.network", "mlp", "--model.layers", "32 16", "--model.dropout", "0.1") == 0
    fit = results()["fit"]
    assert (fit["epochs"], fit["steps"]) == (3, 21)
    assert fit["parameters"] == 784 * 32 + 2 * 32 + 32 * 16 + 2 * 16 + 16 * 10 + 10
    assert "filters/first layer" not in tags()["images"]
    assert "answers/confusion matrix" in tags()["images"]
    assert tags()["graph"]

    assert command("test", "--ckpt_path", "last", *CPU) == 0
    accuracy = results()["test"]["test/accuracy"]
    assert accuracy > 0.3  # of chance 0.1
    (features,) = Path("lightning_logs/version_0").glob("*/test/tensors.tsv")
    assert np.loadtxt(features).shape == (100, 16)  # what goes into the last layer

    assert command("predict", "--ckpt_path", "last", *CPU) == 0
    assert len(rows("predictions-*.csv")) == 100

    capsys.readouterr()
    assert command("export", "--ckpt_path", "last", "--output", "mlp.pt2") == 0
    assert f"accuracy {round(100 * accuracy)}/100" in capsys.readouterr().out
    assert Path("mlp.pt2").is_file()

    assert command("fit", "--ckpt_path", "last", "--model.network", "digitnet") == 2
    assert "model.network was mlp in this run and cannot become digitnet" in capsys.readouterr().err


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


def test_any_module_trains(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "foreign", Foreign)
    assert command("fit", *TINY, "--model.network", "foreign") == 0
    assert results()["fit"]["epochs"] == 3
    assert not tags()["graph"]
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*.ckpt")
    assert float(torch.load(last, weights_only=True)["state_dict"]["network.gain"]) != 1
    assert command("test", "--ckpt_path", "last", *CPU) == 0
    assert results()["test"]["test/accuracy"] > 0.3
    assert not list(Path("lightning_logs/version_0").glob("*/test/tensors.tsv"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.network", "x"], "model.network must be digitnet or mlp, got x"),
        (["--model.network", "mlp"], "model.layers must be widths from 1 to 9999 such as 128 64 for mlp, got '16x5v/2"),
        (["--data.name", "x"], "data.name must be one of mnist, fashion_mnist, kmnist, qmnist, emnist_digits, emnist_"),
        (["--data.name", "idx"], "data.root, where data.name idx looks for your own files: "),
    ],
)
def test_a_name_that_is_none_is_one_line(
    flags: list[str], message: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lit_mnist: error: {message}")
    assert error.count("\n") == 1
    assert not Path("lightning_logs").exists()


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
    own = tmp_path / "own"
    write_own(own, classes=12)
    before = {path: path.read_bytes() for path in own.iterdir()}
    here = ["--data.root", str(own)]
    layers = ["--model.layers", "4x5/2 8/2", "--data.shift", "0"]
    assert command("fit", *TINY, *layers, *here, "--data.name", "idx", "--data.val_size", "24") == 0
    fit = results()["fit"]
    assert (fit["epochs"], fit["parameters"]) == (3, 100 + 8 + 288 + 16 + 8 * 12 + 12)
    assert fit["model"]["classes"] == 12  # type: ignore[index]
    assert fit["data"]["name"] == "idx"  # type: ignore[index]
    assert not {"root", "download"} & set(fit["data"])  # type: ignore[call-overload]
    assert "val_class_accuracy/11" in tags()["scalars"]

    assert command("test", "--ckpt_path", "last", *CPU, *here) == 0
    assert "/60 (" in capsys.readouterr().out
    assert command("predict", "--ckpt_path", "last", *CPU, *here) == 0
    answers = rows("predictions-*.csv")
    assert len(answers) == 60
    assert list(answers[0])[2:] == [f"p{label}" for label in range(12)]
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", *here) == 0
    assert results()["fit"]["epochs"] == 4
    assert command("fit", "--config", "lightning_logs/version_0/config.yaml", "--trainer.max_epochs", "1", *here) == 0
    assert {path: path.read_bytes() for path in own.iterdir()} == before

    # a picture needs the checkpoint alone
    for path in own.iterdir():
        path.unlink()
    Image.fromarray(np.pad(np.full((40, 8), 255, np.uint8), 20)).save("bar.png")
    assert command("predict", "--ckpt_path", "last", *CPU, *here, "--data.images", "bar.png") == 0
    (csv_path,) = Path("lightning_logs").glob("version_*/pictures-*.csv")
    with csv_path.open() as file:
        assert next(csv.DictReader(file)).keys() >= {"p0", "p11"}

    capsys.readouterr()
    assert command("export", "--ckpt_path", "last", "--output", "own.pt2", *here) == 2
    assert "data.root, where data.name idx looks for your own files" in capsys.readouterr().err


def test_more_classes_than_the_model_has(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY, "--model.layers", "4x5/2 8/2", "--trainer.max_epochs", "1") == 0
    write_own(tmp_path / "own", classes=12)
    own = ["--data.root", str(tmp_path / "own"), "--data.name", "idx"]
    capsys.readouterr()
    assert command("test", "--ckpt_path", "last", *CPU, *own) == 2
    assert "data.name idx has 12 classes, and the model was made for 10" in capsys.readouterr().err
    for name in ("validate", "fit"):
        assert command(name, "--ckpt_path", "last", *CPU, *own) == 2
        assert "data.name was mnist in this run" in capsys.readouterr().err


def test_names_from_python(tmp_path: Path) -> None:
    assert MNISTDataModule().classes == LitMNIST().hparams["classes"] == 10
    assert MNISTDataModule(name="emnist_balanced").classes == 47
    model = LitMNIST("16", network="mlp", classes=47)
    assert model(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 47)
    with pytest.raises(ValueError, match=r"model\.network must be digitnet or mlp, got x; model\.classes must be"):
        LitMNIST(network="x", classes=1)
    write_own(tmp_path / "own", classes=5)
    assert MNISTDataModule(str(tmp_path / "own"), name="idx").classes == 5
