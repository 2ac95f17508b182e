from pathlib import Path

import pytest
import torch
from torch import nn

from lit_mnist import DigitNet


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """An untrained network of 502 parameters, and in the current folder the checkpoint that Lightning would write."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = DigitNet("4x5/2 8/2", activation="silu").eval().to(memory_format=torch.channels_last)
    folder = Path("lightning_logs/version_0/checkpoints")
    folder.mkdir(parents=True)
    checkpoint = {
        "state_dict": {f"network.{name}": weights for name, weights in network.state_dict().items()},
        "hyper_parameters": {"layers": "4x5/2 8/2", "activation": "silu", "classes": 10},
        "datamodule_hyper_parameters": {"name": "mnist"},
        **{"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6"},
    }
    torch.save(checkpoint, folder / "best-epoch=00-accuracy=0.1000.ckpt")
    return network
