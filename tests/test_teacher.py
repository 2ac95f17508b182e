"""Learning from a trained network."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch.nn import functional as F
from torch.testing import assert_close

from lit_mnist.module import LitMNIST
from lit_mnist.teacher import Teacher
from lit_mnist.training.runs import RunError

Command = Callable[..., int]
SMALL = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
SMALL += ["--data.batch_size", "50", "--data.val_size", "0", "--board.every_n_epochs", "0"]

ONE_PROCESS = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.fixture
def trained(command: Command) -> Path:
    """The checkpoint of a network other than its pupils', outside any run."""
    assert command("fit", *SMALL, "--model.layers", "4/2 8/2", "--model.activation", "silu") == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*.ckpt")
    shutil.move(last, "teacher.ckpt")
    shutil.rmtree("lightning_logs")
    return Path("teacher.ckpt")


def test_its_probabilities_are_the_targets(trained: Path) -> None:
    teacher = Teacher(str(trained), 10, temperature=3.0)
    teacher.setup(ONE_PROCESS, LitMNIST(), "fit")
    weights = torch.load(trained, weights_only=True)["state_dict"]
    model = LitMNIST("4/2 8/2", activation="silu").eval()
    model.load_state_dict(weights)
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    expected = (model(images) / 3).softmax(dim=1).detach()

    torch.manual_seed(0)
    pupil = LitMNIST("4/2", teacher=str(trained))
    pupil.teacher = teacher
    logits = pupil(images)
    expected_loss = -9 * (expected * (logits / 3).log_softmax(dim=1)).sum(dim=1).mean()
    loss = pupil.training_step((images, torch.zeros(6, dtype=torch.int64)), 0)
    assert_close(loss, expected_loss)
    loss.backward()
    assert not [weight for weight in teacher.network.parameters() if weight.grad is not None]
    assert_close(
        pupil.train_metrics.compute()["train/loss"], F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    )
    assert not [name for name in pupil.state_dict() if "teacher" in name]


def test_it_is_needed_for_training_alone(command: Command, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *SMALL, "--model.layers", "4/2", "--model.teacher", str(trained)) == 0
    trained.unlink()
    assert command("test", "--ckpt_path", "last") == 0
    capsys.readouterr()
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 2
    assert capsys.readouterr().err == (
        "lit_mnist: error: model.teacher teacher.ckpt: that must be the checkpoint of a trained run\n"
    )


def test_a_resumed_run_learns_from_it_too(command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LitMNIST.training_step

    def killed(self: LitMNIST, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 5:
            raise ZeroDivisionError
        return original(self, batch, batch_idx)

    flags = [*SMALL, "--model.layers", "4/2", "--model.teacher", str(trained), "--checkpoint.every_n_steps", "1"]
    assert command("fit", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(LitMNIST, "training_step", killed)
        with pytest.raises(ZeroDivisionError):
            command("fit", *flags)
    assert command("fit", "--ckpt_path", "last") == 0
    assert command("fit", *flags[:-4], "--checkpoint.every_n_steps", "1") == 0  # without a teacher
    files = [next(Path(f"lightning_logs/version_{n}/checkpoints").glob("last-*step=000008.ckpt")) for n in range(3)]
    whole, resumed, alone = (torch.load(path, weights_only=True)["state_dict"] for path in files)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["network.head.weight"], alone["network.head.weight"])


def test_another_one_of_that_name_is_refused(
    command: Command, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", *SMALL, "--model.layers", "4/2", "--model.teacher", str(trained)) == 0
    changed = torch.load(trained, weights_only=True)
    changed["state_dict"]["network.head.bias"] += 1
    torch.save(changed, trained)
    before = sorted(Path("lightning_logs").rglob("*"))
    capsys.readouterr()
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 2
    assert capsys.readouterr().err == (
        "lit_mnist: error: model.teacher teacher.ckpt: that network is not the one that this run had\n"
    )
    assert sorted(Path("lightning_logs").rglob("*")) == before


def test_smoothed_targets_it_would_not_see_are_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *SMALL, "--model.teacher", "teacher.ckpt", "--model.label_smoothing", "0.1") == 2
    assert "model.label_smoothing must be 0 with a teacher, got 0.1\n" in capsys.readouterr().err
    assert command("fit", *SMALL, "--model.temperature", "0") == 2
    assert "model.temperature must be in (0, 1e6], got 0.0\n" in capsys.readouterr().err


def test_what_is_no_teacher(command: Command, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, classes, problem in (
        ("none.ckpt", 10, "model.teacher none.ckpt: that must be the checkpoint of a trained run"),
        (".", 10, r"model.teacher .: that must be the checkpoint of a trained run"),
        (str(trained), 26, "model.teacher teacher.ckpt: no network of 26 classes (Error(s) in loading"),
    ):
        with pytest.raises(RunError) as error:
            Teacher(path, classes).setup(ONE_PROCESS, LitMNIST(), "fit")
        assert str(error.value).startswith(problem)
    trained.write_bytes(b"spoilt")
    assert command("fit", *SMALL, "--model.teacher", str(trained)) == 2
    assert "model.teacher teacher.ckpt: that file is no intact checkpoint (" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()
