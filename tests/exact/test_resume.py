"""A run that is stopped anywhere and resumed is, bit for bit, the run that was not."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, RUN, TINY, Capsys, Command, Killed, Patch, assert_alike, at_call, fail, fails, results
from helpers import last as last_path
from helpers import last_checkpoint as load
from helpers import scalars as curve
from pytorch_lightning import LightningModule

from lit_mnist.data import datamodule
from lit_mnist.exact.runs import only_process
from lit_mnist.module import LitMNIST

# 7 batches of 50 an epoch, dropout, averaged weights, augmentation: whatever has a state
OFTEN = [*TINY[:6], "--trainer.enable_model_summary", "false", "--checkpoint.every_n_steps", "1"]  # the trainer's
SETTINGS = [*TINY, *OFTEN, "--model.dropout", "0.1", "--model.ema_decay", "0.5", "--model.activation", "relu"]
SETTINGS += ["--model.schedule", "cosine", "--board.every_n_epochs", "0"]
SETTINGS += ["--best.monitor", "val/loss", "--best.mode", "max"]  # the first epoch is best
RESUME = ["--ckpt_path", "last"]
LONGER = [*RESUME, "--trainer.max_epochs", "3"]
RECIPES = sorted({path.stem for path in REPOSITORY.glob("configs/*.yaml")} - {"ddp"})
UNINTERRUPTED: dict[tuple[str, ...], Path] = {}  # runs that were never stopped, each trained once


class Lab:
    """Runs commands on a tiny data set, kills them, and compares what comes of it."""

    def __init__(self, run: Command, keep: Callable[[str], Path], capsys: Capsys) -> None:
        self.run, self.fit, self.keep, self.capsys = run, partial(run, "fit"), keep, capsys

    def refused(self, *flags: str) -> str:
        """Return the one line that refuses a fit, which must leave its run as it was."""
        before = contents(RUN)
        error = fails(self.capsys, *flags, run=self.fit)
        assert re.fullmatch("lit_mnist: error: .{,580}\n", error)
        assert contents(RUN) == before
        return error

    def finished(self, *flags: str) -> Path:
        """Return a run with these settings that was never stopped."""
        flags = flags or tuple(SETTINGS)
        if flags not in UNINTERRUPTED:
            assert self.fit(*flags) == 0
            UNINTERRUPTED[flags] = Path(shutil.move(RUN, self.keep("run")))
        return UNINTERRUPTED[flags]

    def copy(self) -> dict[Path, bytes]:
        """Put a finished run here, and return its files."""
        shutil.copytree(self.finished(), RUN)
        return contents(RUN)

    def kill(self, flags: list[str], number: int, owner: Any = LitMNIST, hook: str = "training_step") -> None:
        with at_call(number, partial(fail, Killed()), owner, hook), pytest.raises(Killed):
            self.fit(*flags)

    def signal(self, signum: int, hook: str, call: int, *flags: str) -> int:
        with at_call(call, lambda: os.kill(os.getpid(), signum), LitMNIST, hook):
            return self.fit(*SETTINGS, *flags)

    def resume_and_compare(self, uninterrupted: Path, checkpoint: str = "last") -> None:
        torch.rand(3)  # another process has another random state
        assert self.fit("--ckpt_path", checkpoint) == 0
        assert_alike(RUN, uninterrupted)
        assert results()["fit"]["state"] == "finished"
        assert results()["fit"]["train_seconds"] < 60  # the timer of a run that is resumed within an epoch
        assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        checkpoint = load()
        change(checkpoint)
        torch.save(checkpoint, last_path())


@pytest.fixture
def lab(command: Command, tmp_path_factory: Any, monkeypatch: Patch, capsys: Capsys) -> Lab:
    monkeypatch.setattr(datamodule, "EVALUATION_BATCH_SIZE", 10)  # five batches a validation
    return Lab(command, tmp_path_factory.mktemp, capsys)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


OTHERWISE = [
    "--data.val_size 0",
    "--trainer.val_check_interval 0.5",
    "--trainer.accumulate_grad_batches 2",
    "--trainer.accumulate_grad_batches 3 --trainer.val_check_interval 0.4",  # validates between two steps
    '--trainer.callbacks+=GradientAccumulationScheduler --trainer.callbacks.scheduling={"0":2,"1":3}',
    "--trainer.max_steps 10",
    "--trainer.check_val_every_n_epoch 2 --model.ema_decay 0 --model.optimizer adamw",
    "--checkpoint.every_n_steps 3",
    "--trainer.precision 64-true",
    "--board.every_n_epochs 1 --data.augmented 0.5",
    "--data.shares [1,0.5,0.3] --trainer.max_epochs 3",  # 7, 4 and 3 batches
    # epochs shorter than the set: behind one, its loader is still within its order
    "--trainer.limit_train_batches 5 --checkpoint.every_n_steps 0",
]


@pytest.mark.parametrize(
    ("extra", "hook", "call"),
    [
        *(("", "training_step", step) for step in range(1, 15)),
        *(("", hook, epoch) for hook in ("on_validation_epoch_end", "on_train_epoch_end") for epoch in (1, 2)),
        *(("", "validation_step", batch) for batch in (1, 3, 6)),
        *((extra, "training_step", step) for extra in OTHERWISE for step in (1, 3, 4, 7, 8, 10)),
    ],
)
def test_killed_anywhere(lab: Lab, extra: str, hook: str, call: int) -> None:
    flags = [*SETTINGS, *extra.split()]
    uninterrupted = lab.finished(*flags)
    lab.kill(flags, call, hook=hook)
    assert results()["fit"]["state"] == "failed"
    lab.resume_and_compare(uninterrupted)


@pytest.mark.parametrize("step", [3, 13])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(lab: Lab, name: str, step: int) -> None:
    flags = ["--config", str(REPOSITORY / "configs" / f"{name}.yaml"), *OFTEN, "--data.batch_size", "40"]
    flags += ["--data.val_size", "50"] if name == "smoke" else []
    uninterrupted = lab.finished(*flags)
    lab.kill(flags, step)
    lab.resume_and_compare(uninterrupted)


def test_killed_while_a_checkpoint_is_written(lab: Lab) -> None:
    uninterrupted = lab.finished()
    lab.kill(SETTINGS, 17, Path, "replace")
    (RUN / "checkpoints" / ".last-epoch=01-step=000012.ckpt.1.tmp").write_bytes(b"half")  # what SIGKILL leaves
    lab.resume_and_compare(uninterrupted)
    assert not list(RUN.glob("checkpoints/.*.tmp"))


def test_an_earlier_checkpoint_begins_a_new_run(lab: Lab, capsys: Capsys) -> None:
    before, new = lab.copy(), Path("lightning_logs/version_1")
    (best,) = RUN.glob("checkpoints/best-epoch=00-*")  # there is a second epoch after it
    lab.kill(["--ckpt_path", str(best)], 1)
    assert last_path(new).name == "last-epoch=00-step=000007.ckpt"
    assert lab.fit("--ckpt_path", "last") == 0  # that of the newest run
    assert "A new run: " in capsys.readouterr().out
    assert contents(RUN) == before
    assert_alike(new, lab.finished())
    assert results(new)["fit"]["parent"] == f"version_0/{best.name}"
    assert lab.fit("--ckpt_path", str(last_path()), "--trainer.max_epochs", "3") == 0
    assert sorted(path.name for path in RUN.parent.iterdir()) == ["version_0", "version_1"]


def test_a_copied_checkpoint(lab: Lab) -> None:
    shutil.copy(last_path(lab.finished()), "copy.ckpt")
    assert lab.fit("--ckpt_path", "copy.ckpt", "--trainer.max_epochs", "2") == 2  # it has finished
    assert not list(Path().glob("lightning_logs/*"))
    assert lab.fit("--ckpt_path", "copy.ckpt", "--trainer.max_epochs", "3") == 0
    assert results()["fit"]["epochs"] == 3


def test_a_users_checkpoints_stay(lab: Lab) -> None:
    own = """[{"class_path": "ModelCheckpoint", "init_args": {"filename": "last-{epoch}-{step}", "save_top_k": -1,
               "every_n_train_steps": 3}}, {"class_path": "ModelCheckpoint", "init_args": {
               "filename": "best-{epoch}-{step}", "monitor": "val/loss"}}]"""
    assert lab.fit(*SETTINGS, "--trainer.callbacks", own) == 0
    assert lab.fit(*LONGER) == 0
    names = {path.name for path in RUN.glob("checkpoints/*")}
    assert {f"last-epoch={(step - 1) // 7}-step={step}.ckpt" for step in (3, 6, 9, 12, 15, 18, 21)} <= names
    assert len([name for name in names if re.match(r"best-epoch=\d\d-loss", name)]) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("hook", "call", "step"), [("training_step", 4, 4), ("validation_step", 1, 7)])
def test_a_signal_stops_after_a_step(lab: Lab, signum: int, hook: str, call: int, step: int) -> None:
    uninterrupted = lab.finished()
    lab.capsys.readouterr()
    rarely = ["--checkpoint.every_n_steps", "0", "--checkpoint.every_seconds", "1000"]
    assert lab.signal(signum, hook, call, *rarely) == 128 + signum
    error = lab.capsys.readouterr().err
    assert results()["fit"]["state"] == "interrupted"
    (checkpoint,) = re.findall(r"--ckpt_path (\S+)", error)
    assert f"step={step:06d}" in checkpoint
    assert error.count("\n") == 1
    lab.resume_and_compare(uninterrupted, checkpoint)


@pytest.mark.parametrize("extra", ["--data.val_size=0", "--trainer.accumulate_grad_batches=4"])
@pytest.mark.parametrize("call", [1, 7, 8])
def test_a_signal_where_no_checkpoint_can_be_written_yet(lab: Lab, extra: str, call: int) -> None:
    assert lab.signal(signal.SIGTERM, "training_step", call, extra) == 143
    assert lab.fit(*RESUME) == 0
    assert results()["fit"]["epochs"] == 2


def test_a_second_interrupt_stops_at_once(lab: Lab, monkeypatch: Patch) -> None:
    def twice(self: LightningModule, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(LitMNIST, "training_step", twice)
    before = signal.getsignal(signal.SIGINT)
    assert lab.fit(*SETTINGS) == 130
    assert f"--ckpt_path {last_path()}" in lab.capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_what_the_user_sets_wins_and_is_printed(lab: Lab, capsys: Capsys) -> None:
    lab.copy()
    lab.change(lambda c: c["conditions"]["hardware"].update(threads=99, processor="abacus"))
    # another version of torch may have other settings
    lab.change(lambda c: c["optimizer_states"][0]["param_groups"][0].pop("foreach"))
    lab.change(lambda c: c["lr_schedulers"][0].update(kept_by_an_older_torch=1))
    assert lab.fit(*LONGER, "--model.schedule", "constant", "--model.lr", "0.01") == 0
    out = capsys.readouterr().out
    for line in ("trainer.max_epochs: 2 -> 3", "model.lr: 0.05 -> 0.01", "threads: 99 -> ", "processor: abacus -> "):
        assert line in out
    rates = [rate for step, rate in curve(RUN)["train/learning_rate"] if step >= 14]
    assert rates == pytest.approx([0.01] * 3)
    assert [group["lr"] for group in load()["optimizer_states"][0]["param_groups"]] == [0.01, 0.01]


def test_what_an_unfinished_epoch_does_not_take(lab: Lab) -> None:
    lab.kill(SETTINGS, 4)
    with only_process(RUN):
        assert f"{RUN}: another process" in lab.refused(*RESUME)
    assert "data.batch_size was 50" in lab.refused(*RESUME, "--data.batch_size", "25")
    assert lab.fit(*RESUME) == 0
    assert lab.fit(*LONGER, "--data.batch_size", "25") == 0


@pytest.mark.parametrize("ema_decay", ["0", "0.5"])
def test_steps_after_an_ended_epoch(lab: Lab, ema_decay: str) -> None:
    constant = [*SETTINGS, "--model.schedule", "constant", "--model.warmup", "0", "--model.ema_decay", ema_decay]
    uninterrupted = lab.finished(*constant, "--trainer.max_steps", "10")
    assert lab.fit(*constant, "--trainer.max_epochs", "1") == 0
    assert lab.fit(*RESUME, "--trainer.max_epochs", "2", "--trainer.max_steps", "10") == 0
    assert_alike(RUN, uninterrupted)
    # the epoch that a limit has cut short is over, and the next one is whole
    assert lab.fit(*LONGER, "--trainer.max_steps", "15") == 0
    assert [step for step, _ in curve(RUN)["train/loss"]] == [6, 9, 14]


@pytest.mark.parametrize(("flag", "steps"), [("trainer.limit_train_batches 2", 16), ("data.batch_size 25", 28)])
def test_a_schedule_ends_where_the_run_does(lab: Lab, flag: str, steps: int) -> None:
    lab.copy()
    lab.kill([*LONGER, *f"--{flag}".split()], 2)
    assert lab.fit(*RESUME) == 0
    assert load()["global_step"] == steps
    assert load()["optimizer_states"][0]["param_groups"][0]["lr"] == 0


def test_what_could_not_be_read_again(lab: Lab, monkeypatch: Patch, capsys: Capsys) -> None:
    monkeypatch.setattr(LitMNIST, "on_save_checkpoint", lambda _, c: c.update(mine={"where": Path("here")}))
    assert ".PosixPath" in fails(capsys, *SETTINGS, run=lab.fit)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # what Lightning and torch would restore silently, and wrongly
        (lambda c: c.pop("averaging_state"), "averaging_state"),
        (lambda c: c["configured"]["parameters"][0].reverse(), "in another order"),
        (lambda c: c["processes"][0]["metrics"]["train_metrics.loss"].pop("weight"), "train_metrics.loss"),
        (lambda c: c.pop("lit_mnist_format"), "has no state that"),  # which a callback of Lightning may save
        (lambda c: c["state_dict"].update({"network.head.weight": torch.zeros(10, 5)}), "network.head.weight"),
    ],
)
def test_what_cannot_be_restored(lab: Lab, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    lab.copy()
    lab.change(change)
    assert reason in lab.refused(*LONGER)


def test_a_bug_keeps_its_traceback(lab: Lab, monkeypatch: Patch) -> None:
    lab.copy()
    monkeypatch.setattr(LitMNIST, "training_step", partial(fail, ValueError("x")))
    with pytest.raises(ValueError, match=r"^x$"):
        lab.fit(*LONGER)


def test_the_format_before_is_scored_and_not_resumed(lab: Lab, capsys: Capsys) -> None:
    lab.copy()
    for version, statuses in ((2, {"test": 0, "validate": 0, "predict": 0, "fit": 2}), (1, {"test": 2, "fit": 2})):
        lab.change(lambda c, version=version: c.update(lit_mnist_format=version))  # type: ignore[misc]
        for name, status in statuses.items():
            assert lab.run(name, *RESUME) == status
    assert re.search(r"--ckpt_path .+\.ckpt: .+ format 1", capsys.readouterr().err)


def test_hostile_files_of_a_run_are_not_run(lab: Lab, tmp_path: Path, monkeypatch: Patch) -> None:
    lab.copy()
    Path("evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Logger: pass\n")
    monkeypatch.syspath_prepend(Path.cwd())
    named = {"_class_path": "evil.Logger", "_instantiator": "evil.f", "root": str(tmp_path / "theirs")}
    assert not {"root", "download"} & load()["datamodule_hyper_parameters"].keys()  # where data lies is the machine's
    lab.change(lambda c: c["datamodule_hyper_parameters"].update(named, download=False))
    lab.change(lambda c: c["hyper_parameters"].update(named, lr={"class_path": "evil.L"}))
    assert lab.fit(*LONGER) == lab.run("test", *RESUME) == lab.run("validate", *RESUME) == 0
    # a run's own config.yaml may name classes, as any that is given with --config, and nothing beyond that
    (RUN / "config.yaml").write_text("trainer:\n  callbacks: !!python/object/apply:evil.f []\n")
    assert lab.fit(*LONGER, "--trainer.max_epochs", "4") == 2
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "theirs").exists()
