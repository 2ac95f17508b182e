"""What would fail or wait on a GPU, found without one."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fake_device import DEVICE, DeviceError, FakeTensor, fake_device
from helpers import RUN, Command, Patch, at_call, fail, last_checkpoint, results
from torch import Tensor

from lit_mnist.module import LitMNIST

TINY = ["--trainer.max_epochs", "2", "--model.layers", "crop2 8x5v/2 8d 8d+ again 16/2", "--model.lr", "0.05"]
TINY += ["--data.batch_size", "20", "--data.val_size", "100", "--data.rotation", "5", "--data.augmented", "0.5"]
TINY += ["--model.label_smoothing", "0.1", "--trainer.log_every_n_steps", "1000"]


@pytest.fixture
def device() -> Iterator[list[str]]:
    with fake_device() as flags:
        yield flags


def weights() -> list[Any]:
    return [last_checkpoint(RUN.with_name(f"version_{version}"))["state_dict"] for version in (1, 0)]


def test_tensors_know_their_device(device: list[str]) -> None:
    there = torch.arange(6.0).view(2, 3).to(DEVICE)
    assert isinstance(there, FakeTensor)
    assert there.device == torch.zeros(3, device=DEVICE).device == (2 * there).sum().device == DEVICE
    assert float((there + torch.tensor(1.0)).sum()) == 21  # a number of the processor's may meet it
    with pytest.raises(DeviceError, match="two devices"):
        there + torch.ones(2, 3)
    with pytest.raises(DeviceError, match="two devices"):
        torch.ones(3, 2) @ there
    there[0] = 7
    assert there.cpu().tolist() == [[7, 7, 7], [3, 4, 5]]


@pytest.mark.slow
def test_a_fit_and_the_scores_are_those_of_the_processor(command: Command, device: list[str]) -> None:
    scores = []
    for version, flags in enumerate(([], device)):
        assert command("fit", *TINY, "--trainer.accelerator", "cpu", *flags) == 0
        for name in ("validate", "test"):
            assert command(name, "--ckpt_path", "last", "--trainer.accelerator", "cpu", *flags) == 0
        found = results(RUN.with_name(f"version_{version}"))
        metrics = found["fit"]["metrics"] | found["test"][-1]
        scores.append({name: value for name, value in metrics.items() if "/" in name})
    assert found["fit"]["hardware"]["device"] == DEVICE.type
    assert {"train/loss", "val/accuracy", "test/loss", "test/accuracy"} <= scores[0].keys()
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    torch.testing.assert_close(*weights(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [7, pytest.param(16, marks=pytest.mark.slow)])  # an epoch has 15
def test_a_run_that_is_cut_short_is_resumed(command: Command, device: list[str], step: int) -> None:
    flags = [*TINY, *device, "--checkpoint.every_n_steps", "1000"]
    assert command("fit", *flags) == 0
    with at_call(step + 1, partial(fail, KeyboardInterrupt()), LitMNIST, "training_step"):
        assert command("fit", *flags) == 130
    assert command("fit", "--ckpt_path", "last", *device) == 0
    torch.testing.assert_close(*weights(), rtol=0, atol=0)


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "_local_scalar_dense: waits for": lambda images, loss: loss * float(loss.detach()),
    "_to_copy: waits for": lambda images, loss: loss.detach().cpu() * 0 + loss,
    "_to_copy: waits for .*": lambda images, loss: loss * torch.ones(5).to(images.device).mean(),
    "index: waits for": lambda images, loss: loss + images[images > 3].sum() * 0,
    "mul: tensors of two devices": lambda images, loss: loss + (images.mean(0) * torch.zeros(1, 28, 28)).sum(),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_found(command: Command, device: list[str], monkeypatch: Patch, message: str) -> None:
    original = LitMNIST.training_step

    def training_step(self: LitMNIST, batch: Any, batch_idx: int) -> Tensor:
        return FAULTS[message](batch[0], original(self, batch, batch_idx))

    monkeypatch.setattr(LitMNIST, "training_step", training_step)
    with pytest.raises(DeviceError, match=message):
        command("fit", *TINY, *device)
