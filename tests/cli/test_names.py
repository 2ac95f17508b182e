from pathlib import Path

import pytest
import torch
from helpers import RUN, TINY, Capsys, Command, fails, results, scalars, write_tiny_mnist
from torch import Tensor, nn

from lit_mnist.network import NETWORKS

MORE = ["--trainer.max_epochs", "3", "--model.ema_decay", "0"]


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
    ("flags", "parameters"), [(["mlp", "--model.layers", "32 16"], 25866), (["foreign"], 784 * 10 + 1)]
)
def test_another_network(flags: list[str], parameters: int, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "foreign", Foreign)
    assert command("fit", *TINY, *MORE, "--model.network", *flags) == 0
    assert (results()["fit"]["steps"], results()["fit"]["parameters"]) == (21, parameters)
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    assert results()["test"][-1]["test/accuracy"] > 0.3  # of chance 0.1


def test_own_data_with_twelve_classes(command: Command, tmp_path: Path, capsys: Capsys) -> None:
    write_tiny_mnist(tmp_path / "own", 240, 60, classes=12)
    own = ["--data.root", str(tmp_path / "own")]
    assert command("fit", *TINY, *MORE, "--data.name", "idx", "--data.val_size", "24", *own) == 0
    fit = results()["fit"]
    assert (fit["parameters"], fit["model"]["classes"]) == (100 + 8 + 288 + 16 + 8 * 12 + 12, 12)
    assert (fit["data"]["name"], {"root", "download"} & set(fit["data"])) == ("idx", set())
    assert command("test", "--ckpt_path", "last", *own) == 0
    assert "/60 (" in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", *own) == 0
    assert (results()["fit"]["epochs"], results()["fit"]["model"]["classes"]) == (4, 12)
    write_tiny_mnist(tmp_path / "other", 240, 40, classes=12)
    assert command("test", "--ckpt_path", "last", "--data.root", str(tmp_path / "other")) == 0
    assert [step for step, _ in scalars(RUN)["test/loss"]] == [15]  # of the run's own data


def test_more_classes_than_the_model_has(trained: Path, tmp_path: Path, capsys: Capsys) -> None:
    write_tiny_mnist(tmp_path / "own", classes=12)
    args = ["test", "--ckpt_path", "last", "--data.root", str(tmp_path / "own"), "--data.name", "idx"]
    assert "data.name idx has 12 classes" in fails(capsys, *args)
