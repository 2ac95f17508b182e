"""A run that is stopped anywhere and resumed is, bit for bit, the run that was not."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics import MeanMetric

from lit_mnist.__main__ import main
from lit_mnist.cli.settings import differences
from lit_mnist.data import datamodule
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import only_process
from lit_mnist.module import LitMNIST

# 7 batches of 50 an epoch, dropout, averaged weights, augmentation: whatever has a state
SETTINGS = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"]
SETTINGS += ["--model.layers", "4x5/2 8/2", "--model.dropout", "0.1", "--model.lr", "0.05", "--model.ema_decay", "0.9"]
SETTINGS += ["--data.batch_size", "50", "--data.val_size", "50", "--checkpoint.every_n_steps", "1"]
SETTINGS += ["--trainer.enable_model_summary", "false", "--board.every_n_epochs", "0"]
SETTINGS += ["--model.activation", "relu", "--model.schedule", "cosine"]
CONFIGS = Path(__file__).parents[2] / "configs"
TIMINGS = {"train/samples_per_second"}
Command = Callable[..., int]


class Killed(BaseException):
    """Stands for kill -9 in process. Lightning's own way out is still taken; tests/test_kill.py kills for real."""


@pytest.fixture
def command(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datamodule, "EVALUATION_BATCH_SIZE", 10)  # five batches a validation
    return lambda *flags: main(["fit", "--data.root", str(tiny_root), *flags])


def state(run: Path) -> dict[str, Any]:
    (last,) = (run / "checkpoints").glob("last-*.ckpt")
    loaded: dict[str, Any] = torch.load(last, weights_only=True)
    kept = {
        "state_dict",
        "current_model_state",
        "averaging_state",
        "optimizer_states",
        "lr_schedulers",
        "processes",
        "latest",
    }
    result = {key: loaded[key] for key in kept & loaded.keys()} | {"last": last.name}
    if best := list((run / "checkpoints").glob("best-*.ckpt")):
        callback = next(value for key, value in loaded["callbacks"].items() if key == "CheckpointKeeper")
        result["scores"] = callback
        result["best"] = [path.name for path in best]
        result["best weights"] = torch.load(best[0], weights_only=True)["state_dict"]
    return result


def curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar with its step, and every picture with its step and size."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"]) - TIMINGS
    # Sorted, as files are read in the order of their names, which end in a counter: of two that one process makes
    # within one second, the tenth is read before the ninth.
    scalars = {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in tags}
    pictures = {
        tag: sorted((e.step, float(len(e.encoded_image_string))) for e in events.Images(tag))
        for tag in events.Tags()["images"]
    }
    return scalars | pictures


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def assert_same(ours: Any, theirs: Any, path: str = "") -> None:
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    else:
        assert ours == theirs, path


@pytest.fixture
def uninterrupted(command: Command, tmp_path: Path) -> Path:
    assert command(*SETTINGS) == 0
    run = tmp_path / "uninterrupted"
    shutil.move("lightning_logs/version_0", run)
    return run


def kill(monkeypatch: pytest.MonkeyPatch, hook: str, calls: int) -> None:
    """Make the hook of the module end the run in its n-th call."""
    original = getattr(LitMNIST, hook)
    left = [calls]

    def hooked(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LitMNIST, hook, hooked)


@pytest.mark.parametrize("step", range(1, 15))
def test_every_batch_boundary(
    command: Command, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        kill(patch, "training_step", step)
        with pytest.raises(Killed):
            command(*SETTINGS)
    torch.rand(3)  # another process has another random state
    assert command("--ckpt_path", "last") == 0
    run = Path("lightning_logs/version_0")
    assert_same(state(run), state(uninterrupted))
    assert curve(run) == curve(uninterrupted)
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end", "on_train_epoch_end"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_between_the_epochs(
    command: Command, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, hook: str, epoch: int
) -> None:
    with monkeypatch.context() as patch:
        kill(patch, hook, epoch)
        with pytest.raises(Killed):
            command(*SETTINGS)
    assert command("--ckpt_path", "last") == 0
    run = Path("lightning_logs/version_0")
    assert_same(state(run), state(uninterrupted))
    assert curve(run) == curve(uninterrupted)


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7, 8, 9, 10])
@pytest.mark.parametrize(
    "extra",
    [
        ["--data.val_size", "0"],
        ["--trainer.val_check_interval", "0.5"],
        ["--trainer.accumulate_grad_batches", "2"],
        ["--trainer.max_steps", "10"],
        ["--trainer.check_val_every_n_epoch", "2", "--model.ema_decay", "0", "--model.optimizer", "adamw"],
        ["--checkpoint.every_n_steps", "3"],
        ["--trainer.precision", "64-true"],
        ["--board.every_n_epochs", "1", "--board.histograms", "true", "--data.augmented", "0.5"],
        # epochs shorter than the set: behind one, its loader is still within its order
        ["--trainer.limit_train_batches", "5", "--checkpoint.every_n_steps", "0"],
    ],
    ids=lambda extra: extra[0].partition(".")[2],
)
def test_other_ways_to_train(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: list[str], step: int
) -> None:
    kill_and_compare(command, monkeypatch, tmp_path, [*SETTINGS, *extra], step)


def kill_and_compare(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], step: int
) -> None:
    assert command(*flags) == 0
    uninterrupted = tmp_path / "uninterrupted"
    shutil.move("lightning_logs/version_0", uninterrupted)
    with monkeypatch.context() as patch:
        kill(patch, "training_step", step)
        with pytest.raises(Killed):
            command(*flags)
    assert command("--ckpt_path", "last") == 0
    run = Path("lightning_logs/version_0")
    assert_same(state(run), state(uninterrupted))
    assert curve(run) == curve(uninterrupted)


def sequential(module: LitMNIST) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def one_cycle(module: LitMNIST) -> Any:
    optimizer = torch.optim.AdamW(module.parameters())
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def by_epoch(module: LitMNIST) -> None:
    module.network.requires_grad_(True)
    if module.current_epoch:
        module.network.features[0].requires_grad_(False)  # type: ignore[index]


@pytest.mark.parametrize("step", [1, 4, 7, 8, 11, 14])
@pytest.mark.parametrize(
    ("hook", "function"),
    [("configure_optimizers", sequential), ("configure_optimizers", one_cycle), ("on_train_epoch_start", by_epoch)],
)
def test_other_modules(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hook: str, function: Any, step: int
) -> None:
    monkeypatch.setattr(LitMNIST, hook, function)
    kill_and_compare(command, monkeypatch, tmp_path, SETTINGS, step)


def test_metrics_wherever_they_are(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = LitMNIST.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if "extra" not in vars(self):
            object.__setattr__(self, "extra", {"mean": MeanMetric()})
        loss = step(self, batch, batch_idx)
        self.extra["mean"].update(loss.detach())
        return loss

    def setup(self: Any, stage: str) -> None:
        object.__setattr__(self, "extra", {"mean": MeanMetric()})

    def on_train_epoch_end(self: Any) -> None:
        self._log(self.train_metrics)
        self.log("train/mean", self.extra["mean"].compute())
        self.extra["mean"].reset()

    for hook in (training_step, setup, on_train_epoch_end):
        monkeypatch.setattr(LitMNIST, hook.__name__, hook)
    kill_and_compare(command, monkeypatch, tmp_path, SETTINGS, 11)
    assert len(curve(Path("lightning_logs/version_0"))["train/mean"]) == 2


def test_what_could_not_be_read_again_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_save_checkpoint(self: LitMNIST, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"where": Path("here")}

    monkeypatch.setattr(LitMNIST, "on_save_checkpoint", on_save_checkpoint)
    assert command(*SETTINGS) == 2
    error = capsys.readouterr().err
    assert "a checkpoint could not be loaded again: in mine/where there is something else than tensors" in error
    assert error.count("\n") == 1


def test_a_users_own_checkpoints_stay(command: Command) -> None:
    own = """[{"class_path": "ModelCheckpoint", "init_args": {"filename": "last-{epoch}-{step}", "save_top_k": -1,
               "every_n_train_steps": 3}}, {"class_path": "ModelCheckpoint", "init_args": {
               "filename": "best-{epoch}-{step}", "monitor": "val/loss"}}]"""
    assert command(*SETTINGS, "--trainer.callbacks", own) == 0
    assert command("--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    names = {path.name for path in Path("lightning_logs/version_0/checkpoints").iterdir()}
    assert {f"last-epoch={(step - 1) // 7}-step={step}.ckpt" for step in (3, 6, 9, 12, 15, 18, 21)} <= names
    assert len([name for name in names if name.startswith("best-epoch=0")]) == 1
    assert len([name for name in names if re.match(r"last-epoch=\d\d", name)]) == 1


@pytest.mark.parametrize("step", [3, 13])
@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "ddp.yaml"}), ids=lambda path: path.stem
)
def test_every_recipe(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path, step: int) -> None:
    small = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"]
    small += ["--data.batch_size", "40", "--checkpoint.every_n_steps", "1", "--trainer.enable_model_summary", "false"]
    small += ["--data.val_size", "50"] if path.stem == "smoke" else []
    kill_and_compare(command, monkeypatch, tmp_path, ["--config", str(path), *small], step)


def test_while_a_checkpoint_is_written(command: Command, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.replace
    left = [5]

    def replace(self: Path, target: Path) -> Path:
        left[0] -= self.suffix == ".tmp"
        if left[0] == 0:
            raise Killed
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            command(*SETTINGS)
    run = Path("lightning_logs/version_0")
    assert list((run / "checkpoints").glob(".*.tmp"))
    assert command("--ckpt_path", "last") == 0
    assert not list((run / "checkpoints").glob(".*.tmp"))
    assert_same(state(run), state(uninterrupted))
    assert curve(run) == curve(uninterrupted)


def test_an_earlier_checkpoint_begins_a_new_run(
    command: Command, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = Path("lightning_logs/version_0"), Path("lightning_logs/version_1")
    shutil.copytree(uninterrupted, old)
    (best,) = old.glob("checkpoints/best-epoch=00-*")  # there is a second epoch after it
    accuracy = best.stem.partition("accuracy=")[2]
    before = contents(old)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "training_step", 1)
        with pytest.raises(Killed):
            command("--ckpt_path", str(best))
    assert [path.name for path in new.glob("checkpoints/last-*")] == [
        f"last-epoch=00-step=000007-accuracy={accuracy}.ckpt"
    ]
    assert command("--ckpt_path", "last") == 0  # the newest run's: the new one goes on
    out = capsys.readouterr().out
    assert "A new run: that checkpoint is not the newest state of its run, which stays as it is\n" in out
    assert contents(old) == before
    assert_same(state(new), state(uninterrupted))
    assert curve(new) == curve(uninterrupted)
    results = json.loads((new / "results.json").read_text())["fit"]
    assert (results["parent"], results["epochs"]) == (f"version_0/{best.name}", 2)
    assert command("--ckpt_path", str(next(old.glob("checkpoints/last-*"))), "--trainer.max_epochs", "3") == 0
    assert [path.name for path in old.parent.iterdir() if path.name > "version_1"] == []


def test_a_copy_of_a_finished_run_makes_none(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SETTINGS) == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    shutil.copy(last, "copy.ckpt")
    assert command("--ckpt_path", "copy.ckpt") == 2
    assert "nothing to train: that checkpoint's run has finished" in capsys.readouterr().err
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]
    assert command("--ckpt_path", "copy.ckpt", "--trainer.max_epochs", "3") == 0
    assert json.loads(Path("lightning_logs/version_1/results.json").read_text())["fit"]["epochs"] == 3


def test_killed_again_and_again(command: Command, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = SETTINGS
    for calls in (10, 1, 1, 3):  # twice before the first step
        with monkeypatch.context() as patch:
            kill(patch, "training_step", calls)
            with pytest.raises(Killed):
                command(*flags)
        flags = ["--ckpt_path", "last"]
    assert command(*flags) == 0
    run = Path("lightning_logs/version_0")
    assert_same(state(run), state(uninterrupted))
    assert curve(run) == curve(uninterrupted)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_a_signal_stops_behind_the_step_and_saves(
    command: Command,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    status: int,
    hook: str,
) -> None:
    original = getattr(LitMNIST, hook)
    left = [1 if hook == "validation_step" else 4]

    def signalled(self: LightningModule, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    rarely = [*SETTINGS, "--checkpoint.every_n_steps", "0", "--checkpoint.every_seconds", "1000"]
    with monkeypatch.context() as patch:
        patch.setattr(LitMNIST, hook, signalled)
        assert command(*rarely) == status
    told = capsys.readouterr().err
    step = 7 if hook == "validation_step" else 4
    assert json.loads(Path("lightning_logs/version_0/results.json").read_text())["fit"]["state"] == "interrupted"
    go_on = re.search(r"to resume: python -m lit_mnist fit --ckpt_path (\S+)", told)
    assert go_on
    assert f"step={step:06d}" in go_on[1]
    assert told.count("\n") == 1
    assert command("--ckpt_path", go_on[1]) == 0
    assert_same(state(Path("lightning_logs/version_0")), state(uninterrupted))


@pytest.mark.parametrize("extra", [["--data.val_size", "0"], ["--trainer.accumulate_grad_batches", "4"]])
@pytest.mark.parametrize("call", [1, 7, 8])
def test_a_signal_where_no_checkpoint_can_be_written_yet(
    command: Command, monkeypatch: pytest.MonkeyPatch, extra: list[str], call: int
) -> None:
    original = LitMNIST.training_step
    left = [call]

    def signalled(self: LitMNIST, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LitMNIST, "training_step", signalled)
        assert command(*SETTINGS, *extra) == 143
    assert command("--ckpt_path", "last") == 0
    assert json.loads(Path("lightning_logs/version_0/results.json").read_text())["fit"]["epochs"] == 2


def test_a_moved_folder_of_runs(command: Command) -> None:
    assert command(*SETTINGS) == 0
    shutil.move("lightning_logs", "old")
    assert command(*SETTINGS, "--trainer.max_epochs", "1") == 0
    other = {path: path.read_bytes() for path in Path("lightning_logs").rglob("*") if path.is_file()}
    (last,) = Path("old/version_0/checkpoints").glob("last-*")
    assert command("--ckpt_path", str(last), "--trainer.max_epochs", "3") == 0
    assert {path: path.read_bytes() for path in Path("lightning_logs").rglob("*") if path.is_file()} == other
    assert [step for step, _ in curve(Path("old/version_0"))["val/loss"]] == [6, 13, 20]


def test_a_second_interrupt_stops_at_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: LightningModule, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(LitMNIST, "training_step", twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        assert command(*SETTINGS) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_conditions_are_reported(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SETTINGS) == 0
    (last,) = Path("lightning_logs/version_0/checkpoints").glob("last-*")
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["conditions"]["hardware"] |= {"threads": 99, "processor": "abacus"}
    torch.save(checkpoint, last)
    capsys.readouterr()
    assert command("--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    out = capsys.readouterr().out
    assert f"threads: 99 -> {torch.get_num_threads()} (the last bits may differ)\n" in out
    assert re.search(r"^processor: abacus -> .+ \(the last bits may differ\)$", out, re.M)


def test_what_the_user_sets_wins_and_is_told(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SETTINGS) == 0
    capsys.readouterr()
    longer = ["--trainer.max_epochs", "3", "--model.schedule", "constant", "--model.lr", "0.01"]
    assert command("--ckpt_path", "last", *longer) == 0
    out = capsys.readouterr().out
    assert "trainer.max_epochs: 2 -> 3\n" in out
    assert "model.lr: 0.05 -> 0.01\n" in out
    assert out.count(" -> ") == 3
    run = Path("lightning_logs/version_0")
    assert [value for step, value in curve(run)["train/learning_rate"] if step >= 14] == pytest.approx([0.01] * 3)
    last = torch.load(next(run.glob("checkpoints/last-*")), weights_only=True)
    assert [group["lr"] for group in last["optimizer_states"][0]["param_groups"]] == [0.01, 0.01]
    assert last["hyper_parameters"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model.activation", "silu"], "model.activation was relu in this run and cannot become silu"),
        (["--model.layers", "8/2"], "model.layers was 4x5/2 8/2 in this run and cannot become 8/2"),
        (["--data.val_size", "40"], "held-out images would have been trained on"),
        (["--data.split_seed", "7"], "held-out images would have been trained on"),
        (["--seed_everything", "7"], "the order of the batches is a function of it"),
        (["--model.optimizer", "adamw"], "the optimizer's state is of that kind"),
        (["--model.dropout", "0"], "the network has dropout layers or has not"),
    ],
)
def test_what_cannot_be_changed_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    assert command(*SETTINGS) == 0
    before = {path: path.read_bytes() for path in Path("lightning_logs").rglob("*") if path.is_file()}
    assert command("--ckpt_path", "last", "--trainer.max_epochs", "3", *flags) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("lightning_logs").rglob("*") if path.is_file()} == before


def test_batch_size_within_an_epoch() -> None:
    before = {"data.batch_size": 50, "model.lr": 0.1}
    now = {"data.batch_size": 25, "model.lr": 0.1}
    assert differences(before, now, epoch_unfinished=False) == ["data.batch_size: 50 -> 25"]
    with pytest.raises(UserError, match="lies within an epoch"):
        differences(before, now, epoch_unfinished=True)


def test_one_process_a_run(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SETTINGS) == 0
    with only_process(Path("lightning_logs/version_0")):
        assert command("--ckpt_path", "last", "--trainer.max_epochs", "3") == 2
    assert "another process is training this run" in capsys.readouterr().err
    assert command("--ckpt_path", "last", "--trainer.max_epochs", "3") == 0


def test_a_spoilt_last_checkpoint_names_an_intact_one(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SETTINGS) == 0
    run = Path("lightning_logs/version_0")
    (last,) = run.glob("checkpoints/last-*")
    (best,) = run.glob("checkpoints/best-*")
    last.write_bytes(last.read_bytes()[:1000])
    assert command("--ckpt_path", "last") == 2
    error = capsys.readouterr().err
    assert "is no intact checkpoint" in error
    assert f"the newest intact one is {best}" in error
    assert error.count("\n") == 1


def test_hostile_files_of_a_run_are_not_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SETTINGS) == 0
    marker = tmp_path / "imported"
    (tmp_path / "work" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Logger: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "work")
    run = Path("lightning_logs/version_0")
    (last,) = run.glob("checkpoints/last-*")
    loaded = torch.load(last, weights_only=True)
    loaded["settings"]["trainer.logger"] = loaded["settings"]["trainer.strategy"] = "evil.Logger"
    loaded["hyper_parameters"] |= {
        "_class_path": "evil.Logger",
        "_instantiator": "evil.f",
        "lr": {"class_path": "evil.L"},
    }
    loaded["datamodule_hyper_parameters"]["_class_path"] = "evil.Logger"
    torch.save(loaded, last)
    assert command("--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert not marker.exists()
    # a run's own config.yaml may name classes, as any that is given with --config, and nothing beyond that
    (run / "config.yaml").write_text("trainer:\n  callbacks: !!python/object/apply:evil.f []\n")
    assert command("--ckpt_path", "last", "--trainer.max_epochs", "4") == 2
    assert "config.yaml: the run's settings cannot be read (could not determine a" in capsys.readouterr().err
    assert not marker.exists()


def test_results_tell_the_state(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> dict[str, Any]:
        fit: dict[str, Any] = json.loads(Path("lightning_logs/version_0/results.json").read_text())["fit"]
        return fit

    with monkeypatch.context() as patch:
        kill(patch, "training_step", 10)
        with pytest.raises(Killed):
            command(*SETTINGS)
    assert results()["state"] == "failed"
    started = monotonic()
    assert command("--ckpt_path", "last") == 0
    assert results()["state"] == "finished"
    assert results()["train_seconds"] < monotonic() - started + 60  # the clock of a run resumed within an epoch


def test_a_full_disk(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = os.fsync
    left = [6]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert command(*SETTINGS) == 3
    assert "No space left on device; checkpoints written before are as they were" in capsys.readouterr().err
    assert command("--ckpt_path", "last") == 0
