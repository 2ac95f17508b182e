"""Checkpoints that were changed: what cannot be restored is refused in one line, and the run stays as it was."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lit_mnist.__main__ import main
from lit_mnist.exact.state import StateError, check, check_optimizer

TINY = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
TINY += ["--model.layers", "4x5/2", "--data.batch_size", "50", "--data.val_size", "50", "--board.every_n_epochs", "0"]
Command = Callable[..., int]
Change = Callable[[dict[str, Any]], object]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what it holds; the locks are no part of a run."""
    return {
        str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*") if path.name != ".lock"
    }


def loops(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["loops"]["fit_loop"]


def best(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return next(state for key, state in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint"))


CHANGES: dict[str, tuple[Change, str]] = {
    # each is first used at another moment of the restoring
    "version": (lambda c: c.update({"pytorch-lightning_version": None}), "pytorch-lightning_version is None"),
    "counter": (lambda c: c.update(global_step=2**63), "global_step is 9223372036854775808, expected a count"),
    "weights": (
        lambda c: c["state_dict"].update({"network.head.bias": torch.zeros(10, dtype=torch.int64)}),
        "tensor int64",
    ),
    "average": (lambda c: c.update(averaging_state={}), "averaging_state/n_averaged is missing"),
    "metric": (
        lambda c: c["processes"][0]["metrics"]["train_metrics.loss"].pop("weight"),
        "metrics/train_metrics.loss has other states",
    ),
    "callback": (lambda c: c["callbacks"].pop("Results"), "callbacks/Results is missing"),
    "seconds": (lambda c: c["callbacks"]["Progress"].update(train_seconds=float("nan")), "train_seconds is float nan"),
    "best": (lambda c: best(c).update(kth_best_model_path="nan"), "does not hold together"),
    "random": (
        lambda c: c["processes"][0]["random"].update(torch=torch.zeros(5056, dtype=torch.uint8)),
        "RuntimeError: ",
    ),
    "random form": (lambda c: c["processes"][0].update(random={}), "processes/0/random/numpy is missing"),
    "momentum": (
        lambda c: c["optimizer_states"][0]["state"][0].update(momentum_buffer=torch.zeros(3)),
        "momentum_buffer is",
    ),
    "group": (
        lambda c: c["optimizer_states"][0]["param_groups"].pop(),
        "param_groups is a list of 1, expected a list of 2",
    ),
    "schedule": (
        lambda c: c["lr_schedulers"][0].update(last_epoch="x"),
        "lr_schedulers/0/last_epoch is str 'x', expected int",
    ),
    "progress": (lambda c: loops(c)["epoch_progress"].pop("total"), "epoch_progress/total is missing"),
    "negative": (lambda c: loops(c)["epoch_progress"]["total"].update(ready=-1), "ready is int -1, expected a count"),
    "elsewhere": (
        lambda c: c.update(epoch=0),
        "loops/fit_loop is at epoch and step (2, 14), and the rest of it elsewhere",
    ),
    "loader": (lambda c: loops(c)["state_dict"].update(combined_loader=[1]), "expected the states of loaders"),
    "nested": (lambda c: c.update(lit_mnist_format=[[[["deep"] * 1000]]]), "has the format [[[['deep', 'deep', "),
    "setting": (lambda c: c["hyper_parameters"].update(lr=-1.0), "model.lr must be in (0, 1e30], got -1.0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_restored(command: Command, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, reason = CHANGES[name]
    assert command("fit", *TINY) == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    checkpoint = torch.load(last, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, last)
    before = tree(Path.cwd())
    capsys.readouterr()
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith("lit_mnist: error: ")
    assert error.count("\n") == 1
    assert len(error) < 500
    assert tree(Path.cwd()) == before


def test_weights_of_another_network_cost_nothing(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"]["network.head.weight"] = torch.zeros(10, 5)
    torch.save(checkpoint, last)
    before = tree(Path.cwd())
    for name, flags in (("fit", ["--trainer.max_epochs", "3"]), ("test", []), ("predict", []), ("validate", [])):
        assert command(name, "--ckpt_path", "last", *flags) == 2
        assert (
            "its weights do not fit the network of model.layers: 4x5/2 (state_dict/network.head.weight is a tensor"
            in (capsys.readouterr().err)
        )
    assert tree(Path.cwd()) == before


def test_where_data_lies_is_never_a_checkpoints_matter(
    command: Command, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", *TINY) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^Test it: .+\.ckpt --data\.root {re.escape(str(tiny_root))}$", out, re.M)
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    checkpoint = torch.load(last, weights_only=True)
    assert not {"root", "download"} & checkpoint["datamodule_hyper_parameters"].keys()
    checkpoint["datamodule_hyper_parameters"] |= {"root": str(tmp_path / "theirs"), "download": False}
    checkpoint["settings"]["trainer.default_root_dir"] = str(tmp_path / "theirs")
    torch.save(checkpoint, last)
    for name in ("test", "validate", "predict", "fit"):
        assert command(name, "--ckpt_path", "last") == 0
    assert main(["export", "--ckpt_path", "last", "--output", "a.pt2", "--data.root", str(tiny_root)]) == 0
    assert not (tmp_path / "theirs").exists()


def test_pipes_and_devices_are_not_waited_for(
    command: Command, tiny_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", *TINY) == 0
    pipes = Path("lightning_logs/version_1/checkpoints")
    pipes.mkdir(parents=True)
    for name in ("best-epoch=00-accuracy=0.5000.ckpt", "last-epoch=00-step=000001.ckpt", "../results.json"):
        os.mkfifo(pipes / name)
    (Path("lightning_logs/version_0/results.json")).unlink()
    os.mkfifo("lightning_logs/version_0/results.json")
    for name in ("test", "validate", "predict"):
        assert command(name, "--ckpt_path", "best") == 0  # that of version_0
        assert command(name, "--ckpt_path", str(pipes / "best-epoch=00-accuracy=0.5000.ckpt")) == 2
        assert "best-epoch=00-accuracy=0.5000.ckpt: that file is not a regular file" in capsys.readouterr().err
    assert command("fit", "--ckpt_path", "/dev/zero") == 2
    assert main(["export", "--ckpt_path", "/dev/zero", "--output", "a.pt2"]) == 2
    assert main(["runs", "--format", "csv"]) == 0
    assert "version_1,,,,,,,unknown\n" in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0


def test_checkpoints_of_versions_before(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["optimizer_states"][0]["param_groups"][0]["foreach"]  # as if torch had got it since
    checkpoint["lr_schedulers"][0]["kept_by_an_older_torch"] = 1
    torch.save(checkpoint, last)
    assert command("fit", "--ckpt_path", "last", "--model.network", "mlp") == 2
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    torch.save(torch.load(last, weights_only=True) | {"lit_mnist_format": 1}, last)
    capsys.readouterr()
    for name in ("fit", "test", "validate", "predict"):
        assert command(name, "--ckpt_path", "last") == 2
        assert "has the format 1, and this version reads 2; use the lit_mnist that wrote it" in capsys.readouterr().err


class Keeper(Callback):
    """A user's callback, which logs as soon as the training starts and keeps what it likes."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {"lr": [], "odd": ("loss", 0.5, None), "limit": float("inf")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.logger.experiment.add_scalar("keeper", 1.0, trainer.global_step)  # type: ignore[union-attr]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept[f"epoch {trainer.current_epoch}"] = [trainer.global_step]

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict


def test_a_users_callback(command: Command) -> None:
    flags = ["--trainer.callbacks", f"{__name__}.Keeper"]
    assert command("fit", *TINY, *flags) == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", *flags) == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    state = torch.load(last, weights_only=True)["callbacks"]["Keeper"]
    assert [key for key in state if key.startswith("epoch")] == ["epoch 0", "epoch 1", "epoch 2"]


def test_forms() -> None:
    check({"a": [1.0], "b": None, "c": {}}, {"a": [2, 3.0], "b": torch.zeros(()), "c": {"any": [1]}}, "state")
    for fresh, loaded, reason in (
        ({"a": 1}, {}, "state/a is missing"),
        ({"a": 1}, {"a": 1, "z": 1}, "state/z is unknown"),
        (1, True, "state is bool True, expected int 1"),
        (1, 2**60, "expected int 1"),
        (1.0, float("inf"), "state is float inf, expected float 1.0"),
        ((1, 2), (1,), "state is a tuple of 1, expected a tuple of 2"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.complex64), "a tensor complex64"),
        (torch.zeros(2), torch.zeros(2).to_sparse(), "a tensor float32"),
        ([0], [0, "x"], "state/1 is str 'x', expected int 0"),
    ):
        with pytest.raises(StateError, match=re.escape(reason)):
            check(fresh, loaded, "state")
    check(
        torch.zeros(2), torch.zeros(2, dtype=torch.float64), "state"
    )  # the restoring brings it to the run's precision


def test_states_of_an_optimizer() -> None:
    weight, gain = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([weight, gain])
    (weight.sum() * gain).backward()
    optimizer.step()
    check_optimizer(torch.optim.AdamW([weight, gain]), optimizer.state_dict(), "optimizer")
    for entry, value, reason in (
        ("step", torch.tensor(-1.0), "optimizer/state/0/step is a tensor float32 (), expected a count"),
        (
            "exp_avg",
            torch.zeros(4),
            "optimizer/state/0/exp_avg is a tensor float32 (4,), expected a tensor float32 (3,)",
        ),
        ("exp_avg", None, "exp_avg is None"),
    ):
        state = optimizer.state_dict()
        state["state"] = {0: {**state["state"][0], entry: value}}
        with pytest.raises(StateError, match=re.escape(reason)):
            check_optimizer(torch.optim.AdamW([weight, gain]), state, "optimizer")
    with pytest.raises(StateError, match="belongs to no parameter"):
        check_optimizer(optimizer, {**optimizer.state_dict(), "state": {7: {}}}, "optimizer")
