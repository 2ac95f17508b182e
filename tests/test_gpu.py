"""What must hold on a GPU, tested on the processor and on an imitation; `pytest -m gpu` takes the GPU alone."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from helpers import RUN, TINY, Capsys, Command, Killed, Patch, assert_same, at_call, fail, outcome, results, watch
from torch import Tensor
from torch.testing import assert_close

from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.module import LitMNIST

# torch reads it once in a process, at the first matrix product; Lightning sets it when it makes a deterministic Trainer
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

FLAGS = {"cpu": ["--trainer.accelerator=cpu", "--trainer.strategy=auto"], "cuda": ["--trainer.accelerator=gpu"]}
FLAGS["lazy"] = fake_device.FLAGS
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])
# 7 batches of 50 an epoch, and whatever has a state
SETTINGS = [*TINY, "--model.layers", "crop2 8x5v/2 8d 8d+ again 16/2", "--model.ema_decay", "0.5"]
SETTINGS += ["--model.label_smoothing", "0.1", "--trainer.enable_model_summary", "false"]
SETTINGS += ["--data.rotation", "8", "--data.scale", "0.1", "--data.augmented", "0.7", "--board.every_n_epochs", "0"]
BOARD = "--board.every_n_epochs", "1"


@pytest.fixture(params=["cpu", "lazy", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with fake_device.fake_device() if request.param == "lazy" else nullcontext():
        yield request.param


@pytest.fixture
def fit(command: Command, device: str) -> Command:
    return lambda *flags: command("fit", *SETTINGS, *FLAGS[device], *flags)


def test_a_fit_sees_the_processors_batches(fit: Command, device: str, tiny_root: Path, monkeypatch: Patch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: LitMNIST, batch: tuple[Tensor, Tensor]) -> None:
        data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        kept = [state for metric in module.train_metrics.values() for state in metric.metric_state.values()]
        tensors = [*batch, *data.sets["train"], *module.parameters(), *module.buffers(), *kept]
        assert {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} == {device}
        seen.append((batch[0].cpu(), batch[1].cpu()))

    watch(monkeypatch, look)
    assert fit() == 0
    data = MNISTDataModule(str(tiny_root), batch_size=50, val_size=50, rotation=8, scale=0.1, augmented=0.7)
    data.setup("fit")
    loader = data.train_dataloader()
    expected = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected += [data.augment(*batch) for batch in loader]
    assert len(seen) == len(expected) == 14
    for ours, theirs in zip(seen, expected, strict=True):
        # two neighbours differ by up to 255, and a position is exact to some 1e-5 of a pixel
        assert_close(ours[0], theirs[0], atol=0.05, rtol=0)
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("device", ["lazy", CUDA], indirect=True)
def test_no_step_waits_for_the_device(fit: Command, device: str, monkeypatch: Patch, request: Any) -> None:
    mode, steps = (torch.cuda if device == "cuda" else fake_device).set_sync_debug_mode, list[int]()
    request.addfinalizer(lambda: mode("default"))

    def look(*_: Any) -> None:
        steps.append(1)
        if len(steps) in (2, 102):
            mode("error" if len(steps) == 2 else "default")

    watch(monkeypatch, look)
    seldom = ["--trainer.log_every_n_steps", "1000", "--checkpoint.every_seconds", "3600"]
    assert fit(*seldom, *BOARD, "--data.batch_size", "3", "--trainer.max_epochs", "1", "--data.shares", "[1]") == 0
    assert len(steps) == 117


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense: waits for": lambda images: float(images[0, 0]),
    "_to_copy: waits for": lambda images: torch.ones(5).to(images.device),
    "index: waits for": lambda images: images[images > 3],
    "mul: tensors of two devices": lambda images: images * torch.zeros(3),
}


def test_faults_are_found() -> None:
    with fake_device.fake_device():
        images = torch.ones(2, 3).to("lazy")
        fake_device.set_sync_debug_mode("error")
        for message, wait in FAULTS.items():
            with pytest.raises(fake_device.DeviceError, match=message):
                wait(images)


@pytest.mark.parametrize("own", ["precision=32-true", "precision=bf16-mixed", "strategy=ddp"])
def test_a_run_that_is_cut_short_is_resumed(command: Command, fit: Command, device: str, own: str) -> None:
    if device == "lazy" and own != "precision=32-true":
        pytest.skip("not imitated")
    flags = [f"--trainer.{own}", "--trainer.devices", "1", "--trainer.deterministic", "true"]
    flags += ["--model.dropout", "0.1", "--checkpoint.every_n_steps", "1", "--data.shares", "[1, 0.8]"]
    assert fit(*flags) == 0
    with at_call(10, partial(fail, Killed()), LitMNIST, "training_step"), pytest.raises(Killed):
        fit(*flags)  # which stops within the second epoch
    torch.rand(3, device=device)  # another process has another random state
    assert command("fit", "--ckpt_path", "last", FLAGS[device][0]) == 0
    whole, ours = (outcome(RUN.with_name(f"version_{version}")) for version in (0, 1))
    assert ("cuda" in ours["state"]["processes"][0]["random"]) == (device == "cuda")
    assert_same(ours, whole)
    if own == "strategy=ddp":
        assert torch.distributed.get_backend() == {"cpu": "gloo", "cuda": "nccl"}[device]


@pytest.mark.parametrize("device", [CUDA], indirect=True)
def test_precision_auto_is_what_the_gpu_has(fit: Command, capsys: Capsys, device: str) -> None:
    units = torch.cuda.is_bf16_supported(including_emulation=False)
    assert fit("--trainer.precision", "auto", "--trainer.max_epochs", "1") == 0
    chosen, name, fit_results = "bf16-mixed" if units else "32-true", torch.cuda.get_device_name(), results()["fit"]
    assert f"Precision: {chosen}\n" in capsys.readouterr().out
    assert fit_results["settings"]["trainer.precision"] == chosen
    assert fit_results["hardware"]["device"] == name


def test_a_checkpoint_serves_every_device(command: Command, fit: Command, device: str, capsys: Capsys) -> None:
    assert fit(*BOARD) == 0
    losses = []
    for name in {"cpu", device}:
        chosen = ["--ckpt_path", "best", *FLAGS[name]]
        assert command("validate", *chosen) == 0
        assert command("test", *chosen) == 0
        losses.append(results()["test"][-1]["test/loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)  # convolutions on a GPU are TF32's
    assert command("export", "--ckpt_path", "best", "--output", "digits.pt2") == 0
    assert "Exported: digits.pt2, " in capsys.readouterr().out
    for epochs, name in ((3, "cpu"), (4, device)):
        assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", str(epochs), *FLAGS[name]) == 0
    assert (results()["fit"]["epochs"], results()["fit"]["steps"]) == (4, 28)
