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
from pytorch_lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics import MeanMetric

from lit_mnist.__main__ import main
from lit_mnist.data import datamodule
from lit_mnist.exact.runs import only_process
from lit_mnist.module import LitMNIST

# 7 batches of 50 an epoch, dropout, averaged weights, augmentation: whatever has a state
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]
SMALL = ["--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2", "--checkpoint.every_n_steps", "1"]
SETTINGS = [*QUIET, *SMALL, "--model.layers", "4x5/2 8/2", "--model.dropout", "0.1", "--model.lr", "0.05"]
SETTINGS += ["--model.ema_decay", "0.9", "--model.activation", "relu", "--model.schedule", "cosine"]
SETTINGS += ["--data.batch_size", "50", "--data.val_size", "50", "--board.every_n_epochs", "0"]
RARELY = ["--checkpoint.every_n_steps", "0", "--checkpoint.every_seconds", "1000"]
LONGER = ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
CONFIGS = Path(__file__).parents[2] / "configs"
RUN = Path("lightning_logs/version_0")
KEPT = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "processes",
    "latest",
)
Command = Callable[..., int]


class Killed(BaseException):
    """Stands for kill -9 in process. Lightning's own way out is still taken; benchmarks/kill.py kills for real."""


@pytest.fixture
def fit(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `fit` on a tiny data set, from an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datamodule, "EVALUATION_BATCH_SIZE", 10)  # five batches a validation
    return lambda *flags: main(["fit", "--data.root", str(tiny_root), *flags])


UNINTERRUPTED: dict[str, Path] = {}  # runs that were never stopped, each trained once, by their settings


@pytest.fixture
def finished(fit: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a run with these settings that was never stopped; of another module by a name."""

    def finish(*flags: str, name: str = "") -> Path:
        flags = flags or tuple(SETTINGS)
        key = name + " ".join(flags)
        if key not in UNINTERRUPTED:
            assert fit(*flags) == 0
            UNINTERRUPTED[key] = Path(shutil.move(RUN, tmp_path_factory.mktemp("run")))
        return UNINTERRUPTED[key]

    return finish


def last(run: Path = RUN) -> Path:
    (path,) = (path for path in run.glob("checkpoints/last-*") if re.match(r"last-epoch=\d\d-", path.name))
    return path


def load(run: Path = RUN) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(last(run), weights_only=True)
    return loaded


def state(run: Path) -> dict[str, Any]:
    """Whatever a run may end with other bits in: its last checkpoint, its best, every logged value."""
    loaded = load(run)
    best = list(run.glob("checkpoints/best-*.ckpt"))
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in best]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    # Sorted, as files are read in the order of their names, which end in a counter: of two that one process makes
    # within one second, the tenth is read before the ninth.
    curve = {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["images"]:
        curve[tag] = sorted((e.step, len(e.encoded_image_string)) for e in events.Images(tag))
    curve.pop("train/samples_per_second", None)
    scores = loaded["callbacks"]["CheckpointKeeper"]
    names = sorted(path.name for path in run.glob("checkpoints/*"))
    return {key: loaded.get(key) for key in (*KEPT, "latest")} | {
        "curve": curve,
        "scores": scores,
        "names": names,
        "best": weights,
    }


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


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def at_call(number: int, act: Callable[[], object], owner: Any = LitMNIST, hook: str = "training_step") -> Any:
    """Patch a hook so that its n-th call acts first."""
    original, left = getattr(owner, hook), [number]

    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return original(self, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(owner, hook, hooked)
    return patch


def kill(fit: Command, flags: list[str], number: int, owner: Any = LitMNIST, hook: str = "training_step") -> None:
    def end() -> None:
        raise Killed

    patch = at_call(number, end, owner, hook)
    try:
        with pytest.raises(Killed):
            fit(*flags)
    finally:
        patch.undo()


def resume_and_compare(fit: Command, uninterrupted: Path) -> None:
    torch.rand(3)  # another process has another random state
    assert fit("--ckpt_path", "last") == 0
    assert_same(state(RUN), state(uninterrupted))
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("hook", "calls"),
    [
        *(("training_step", step) for step in range(1, 15)),
        *((hook, epoch) for hook in ("on_validation_epoch_end", "on_train_epoch_end") for epoch in (1, 2)),
        *(("validation_step", batch) for batch in (1, 3, 6)),
    ],
)
def test_killed_anywhere(fit: Command, finished: Callable[..., Path], hook: str, calls: int) -> None:
    uninterrupted = finished()
    kill(fit, SETTINGS, calls, hook=hook)
    resume_and_compare(fit, uninterrupted)


@pytest.mark.parametrize("step", [1, 3, 4, 7, 8, 10])
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
def test_other_ways_to_train(fit: Command, finished: Callable[..., Path], extra: list[str], step: int) -> None:
    uninterrupted = finished(*SETTINGS, *extra)
    kill(fit, [*SETTINGS, *extra], step)
    resume_and_compare(fit, uninterrupted)


@pytest.mark.parametrize("step", [3, 13])
@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"ddp"}))
def test_every_recipe(fit: Command, finished: Callable[..., Path], name: str, step: int) -> None:
    flags = ["--config", str(CONFIGS / f"{name}.yaml"), *QUIET, *SMALL, "--data.batch_size", "40"]
    flags += ["--data.val_size", "50"] if name == "smoke" else []
    uninterrupted = finished(*flags)
    kill(fit, flags, step)
    resume_and_compare(fit, uninterrupted)


def sequential(module: LitMNIST) -> Any:
    optimizer = torch.optim.NAdam(module.parameters(), lr=0.01)
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def one_cycle(module: LitMNIST) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def freeze(module: LitMNIST) -> None:
    module.network.requires_grad_(True)
    if module.current_epoch:
        module.network.features[0].requires_grad_(False)  # type: ignore[index]


def draw(module: LitMNIST) -> None:
    torch.rand(5)


@pytest.mark.parametrize("step", [1, 4, 7, 8, 14])
@pytest.mark.parametrize(
    ("hook", "function"),
    [
        ("configure_optimizers", sequential),
        ("configure_optimizers", one_cycle),
        ("on_train_epoch_start", freeze),
        ("on_train_start", draw),
    ],
)
def test_other_modules(
    fit: Command, finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, hook: str, function: Any, step: int
) -> None:
    monkeypatch.setattr(LitMNIST, hook, function)
    # NAdam keeps numbers of 32 bits beside weights of 64
    flags = [*SETTINGS, *(["--trainer.precision", "64-true"] if function is sequential else [])]
    uninterrupted = finished(*flags, name=function.__name__)
    kill(fit, flags, step)
    resume_and_compare(fit, uninterrupted)


def test_metrics_and_logged_values_wherever_they_are(
    fit: Command, finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LitMNIST.training_step

    def setup(self: Any, stage: str) -> None:
        object.__setattr__(self, "extra", {"mean": MeanMetric()})

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        self.extra["mean"].update(loss.detach())
        self.log("train/logged", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self: Any) -> None:
        self._log(self.train_metrics)
        self.log("train/mean", self.extra["mean"].compute())
        self.extra["mean"].reset()

    for hook in (training_step, setup, on_train_epoch_end):
        monkeypatch.setattr(LitMNIST, hook.__name__, hook)
    uninterrupted = finished(*SETTINGS, name="metrics")
    for step, flags in ((11, SETTINGS), (1, ["--ckpt_path", "last"])):  # and once more before the first step
        kill(fit, flags, step)
    resume_and_compare(fit, uninterrupted)
    assert {"train/mean", "train/logged_step", "train/logged_epoch"} <= state(RUN)["curve"].keys()


def test_killed_again_and_again(fit: Command, finished: Callable[..., Path]) -> None:
    uninterrupted = finished()
    for flags, step in ((SETTINGS, 10), *((["--ckpt_path", "last"], step) for step in (1, 1, 3))):
        kill(fit, flags, step)
    resume_and_compare(fit, uninterrupted)


def test_killed_while_a_checkpoint_is_written(fit: Command, finished: Callable[..., Path]) -> None:
    uninterrupted = finished()
    kill(fit, SETTINGS, 17, Path, "replace")
    assert list(RUN.glob("checkpoints/.*.tmp"))
    resume_and_compare(fit, uninterrupted)  # and what was half written is gone


def test_an_earlier_checkpoint_begins_a_new_run(
    fit: Command, finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted, new = finished(), Path("lightning_logs/version_1")
    shutil.copytree(uninterrupted, RUN)
    (best,) = RUN.glob("checkpoints/best-epoch=00-*")  # there is a second epoch after it
    before = contents(RUN)
    kill(fit, ["--ckpt_path", str(best)], 1)
    assert last(new).name.startswith("last-epoch=00-step=000007-accuracy=")
    assert fit("--ckpt_path", "last") == 0  # that of the newest run
    assert "A new run: " in capsys.readouterr().out
    assert contents(RUN) == before
    assert_same(state(new), state(uninterrupted))
    results = json.loads((new / "results.json").read_text())["fit"]
    assert (results["parent"], results["epochs"]) == (f"version_0/{best.name}", 2)
    assert fit("--ckpt_path", str(last()), "--trainer.max_epochs", "3") == 0
    assert sorted(path.name for path in RUN.parent.iterdir()) == ["version_0", "version_1"]


def test_a_copy_of_a_finished_run_makes_none(fit: Command, finished: Callable[..., Path]) -> None:
    shutil.copy(last(finished()), "copy.ckpt")
    assert fit("--ckpt_path", "copy.ckpt") == 2
    assert not list(Path().glob("lightning_logs/*"))
    assert fit("--ckpt_path", "copy.ckpt", "--trainer.max_epochs", "3") == 0
    assert json.loads((RUN / "results.json").read_text())["fit"]["epochs"] == 3


def test_a_moved_folder_of_runs(fit: Command, finished: Callable[..., Path]) -> None:
    shutil.copytree(finished(), "old/version_0")
    shutil.copytree(finished(), RUN)
    other = contents(RUN)
    (best,) = (path.name for path in Path("old/version_0").glob("checkpoints/best-*"))
    assert fit("--ckpt_path", str(last(Path("old/version_0"))), "--trainer.max_epochs", "3") == 0
    assert contents(RUN) == other
    ended = state(Path("old/version_0"))
    assert [step for step, _ in ended["curve"]["val/loss"]] == [6, 13, 20]
    assert ended["scores"]["best"]["name"] in ended["names"]
    assert ended["scores"]["best"]["score"] >= float(best.partition("accuracy=")[2].removesuffix(".ckpt"))


def test_a_users_own_checkpoints_stay(fit: Command) -> None:
    own = """[{"class_path": "ModelCheckpoint", "init_args": {"filename": "last-{epoch}-{step}", "save_top_k": -1,
               "every_n_train_steps": 3}}, {"class_path": "ModelCheckpoint", "init_args": {
               "filename": "best-{epoch}-{step}", "monitor": "val/loss"}}]"""
    assert fit(*SETTINGS, "--trainer.callbacks", own) == 0
    assert fit(*LONGER) == 0
    names = {path.name for path in RUN.glob("checkpoints/*")}
    assert {f"last-epoch={(step - 1) // 7}-step={step}.ckpt" for step in (3, 6, 9, 12, 15, 18, 21)} <= names
    assert len([name for name in names if re.match(r"best-epoch=\d\d-acc", name)]) == 1
    assert last().name in names


class Keeper(Callback):
    """A user's callback, which logs as soon as the training starts and keeps what it likes."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {"odd": ("loss", 0.5, None), "limit": float("inf")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.logger.experiment.add_scalar("keeper", 1.0, trainer.global_step)  # type: ignore[union-attr]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept[f"epoch {trainer.current_epoch}"] = [trainer.global_step]

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict


def test_a_users_callback(fit: Command) -> None:
    flags = ["--trainer.callbacks", f"{__name__}.Keeper"]
    assert fit(*SETTINGS, *flags) == 0
    assert fit(*LONGER, *flags) == 0
    kept = load()["callbacks"]["Keeper"]
    assert {key: kept[key] for key in kept if key.startswith("epoch")} == {
        "epoch 0": [7],
        "epoch 1": [14],
        "epoch 2": [21],
    }


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("hook", "call", "step"), [("training_step", 4, 4), ("validation_step", 1, 7)])
def test_a_signal_stops_after_the_step_and_saves(
    fit: Command,
    finished: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    signum: int,
    status: int,
    hook: str,
    call: int,
    step: int,
) -> None:
    uninterrupted = finished()
    capsys.readouterr()
    patch = at_call(call, lambda: os.kill(os.getpid(), signum), hook=hook)
    assert fit(*SETTINGS, *RARELY) == status
    patch.undo()
    error = capsys.readouterr().err
    assert json.loads((RUN / "results.json").read_text())["fit"]["state"] == "interrupted"
    resume = re.search(r"--ckpt_path (\S+)", error)
    assert resume
    assert f"step={step:06d}" in resume[1]
    assert error.count("\n") == 1
    assert fit("--ckpt_path", resume[1]) == 0
    assert_same(state(RUN), state(uninterrupted))


@pytest.mark.parametrize("extra", [["--data.val_size", "0"], ["--trainer.accumulate_grad_batches", "4"]])
@pytest.mark.parametrize("call", [1, 7, 8])
def test_a_signal_where_no_checkpoint_can_be_written_yet(fit: Command, extra: list[str], call: int) -> None:
    patch = at_call(call, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert fit(*SETTINGS, *extra) == 143
    patch.undo()
    assert fit("--ckpt_path", "last") == 0
    assert json.loads((RUN / "results.json").read_text())["fit"]["epochs"] == 2


def test_a_second_interrupt_stops_at_once(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: LightningModule, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(LitMNIST, "training_step", twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        assert fit(*SETTINGS) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_results_of_a_run_that_failed(fit: Command) -> None:
    kill(fit, SETTINGS, 10)
    assert json.loads((RUN / "results.json").read_text())["fit"]["state"] == "failed"
    started = monotonic()
    assert fit("--ckpt_path", "last") == 0
    results = json.loads((RUN / "results.json").read_text())["fit"]
    assert results["state"] == "finished"
    assert results["train_seconds"] < monotonic() - started + 60  # the timer of a run resumed within an epoch


def test_a_full_disk(fit: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original, left = os.fsync, [6]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert fit(*SETTINGS) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert fit("--ckpt_path", "last") == 0


# What the user sets


def test_what_the_user_sets_wins_and_is_printed(
    fit: Command, finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished(), RUN)
    loaded = load()
    loaded["conditions"]["hardware"] |= {"threads": 99, "processor": "abacus"}
    torch.save(loaded, last())
    capsys.readouterr()
    assert fit(*LONGER, "--model.schedule", "constant", "--model.lr", "0.01") == 0
    out = capsys.readouterr().out
    for line in ("trainer.max_epochs: 2 -> 3", "model.lr: 0.05 -> 0.01", "threads: 99 -> ", "processor: abacus -> "):
        assert line in out
    assert [rate for step, rate in state(RUN)["curve"]["train/learning_rate"] if step >= 14] == pytest.approx(
        [0.01] * 3
    )
    assert [group["lr"] for group in load()["optimizer_states"][0]["param_groups"]] == [0.01, 0.01]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model.activation", "silu"),
        ("--model.layers", "8/2"),
        ("--model.network", "mlp"),
        ("--model.optimizer", "adamw"),
        ("--model.dropout", "0"),
        ("--data.val_size", "40"),
        ("--data.split_seed", "7"),
        ("--seed_everything", "7"),
    ],
)
def test_what_cannot_be_changed_is_refused(
    fit: Command, finished: Callable[..., Path], capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    shutil.copytree(finished(), RUN)
    before = contents(RUN)
    capsys.readouterr()
    assert fit(*LONGER, flag, value) == 2
    error = capsys.readouterr().err
    assert flag.removeprefix("--") in error
    assert value in error
    assert error.count("\n") == 1
    assert contents(RUN) == before


def test_the_batch_size_within_an_epoch(fit: Command, capsys: pytest.CaptureFixture[str]) -> None:
    kill(fit, SETTINGS, 4)
    assert fit("--ckpt_path", "last", "--data.batch_size", "25") == 2
    assert "data.batch_size was 50" in capsys.readouterr().err
    assert fit("--ckpt_path", "last") == 0
    assert fit(*LONGER, "--data.batch_size", "25") == 0


def test_one_process_a_run(fit: Command, finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished(), RUN)
    with only_process(RUN):
        assert fit(*LONGER) == 2
    assert str(RUN) in capsys.readouterr().err
    assert fit(*LONGER) == 0


# What a checkpoint may hold


def test_what_could_not_be_read_again_is_refused(
    fit: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_save_checkpoint(self: LitMNIST, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"where": Path("here")}

    monkeypatch.setattr(LitMNIST, "on_save_checkpoint", on_save_checkpoint)
    assert fit(*SETTINGS) == 2
    error = capsys.readouterr().err
    assert "in mine/where" in error
    assert error.count("\n") == 1


def loops(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["loops"]["fit_loop"]


def states(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["optimizer_states"][0]["state"]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    # what Lightning and torch would restore silently, and wrongly
    "progress": (lambda c: loops(c)["epoch_progress"].pop("total"), "loops/fit_loop"),
    "negative": (lambda c: loops(c)["epoch_progress"]["total"].update(ready=-1), "loops/fit_loop"),
    "step": (lambda c: c.update(global_step=5), "loops/fit_loop is at step 14, not 5"),
    "callback": (lambda c: c["callbacks"].pop("Results"), "callbacks/Results"),
    "keeper": (lambda c: c["callbacks"].update(CheckpointKeeper={}), "callbacks/CheckpointKeeper"),
    "average": (lambda c: c.pop("averaging_state"), "averaging_state"),
    "optimizers": (lambda c: c["optimizer_states"].clear(), "ValueError"),
    "parameters": (lambda c: c["configured"]["parameters"][0].reverse(), "in another order"),
    "fused": (
        lambda c: (
            c["optimizer_states"][0]["param_groups"][0].update(fused=True),
            states(c)[0].update(momentum_buffer=torch.zeros(1)),
        ),
        "optimizer_states/state/0/momentum_buffer",
    ),
    "expanded": (
        lambda c: (
            c["optimizer_states"][0]["param_groups"][0].update(fused=True),
            states(c)[0].update(momentum_buffer=torch.zeros(1).expand(states(c)[0]["momentum_buffer"].shape)),
        ),
        "optimizer_states/state/0/momentum_buffer",
    ),
    "schedule": (lambda c: c["lr_schedulers"][0].pop("last_epoch"), "lr_schedulers/last_epoch"),
    "metric": (lambda c: c["processes"][0]["metrics"]["train_metrics.loss"].pop("weight"), "train_metrics.loss"),
    "metric shape": (
        lambda c: c["processes"][0]["metrics"]["train_metrics.loss"].update(weight=torch.zeros(3)),
        "train_metrics.loss/weight",
    ),
    # what fails by itself, each at another moment
    "version": (lambda c: c.update({"pytorch-lightning_version": "x"}), "InvalidVersion"),
    "weights": (lambda c: c["state_dict"].update({"network.head.bias": torch.zeros(3)}), "network.head.bias"),
    "group": (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "ValueError"),
    "random": (
        lambda c: c["processes"][0]["random"].update(torch=torch.zeros(5056, dtype=torch.uint8)),
        "RuntimeError",
    ),
    "processes": (lambda c: c["processes"].clear(), "IndexError"),
    "latest": (lambda c: c["latest"].update(x="y"), "AttributeError"),
    "best": (lambda c: c["callbacks"]["CheckpointKeeper"].update(best=[]), "TypeError"),
    "setting": (lambda c: c["hyper_parameters"].update(lr=-1.0), "-1.0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_restored(
    fit: Command, finished: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, reason = CHANGES[name]
    shutil.copytree(finished(), RUN)
    if name == "setting":  # a run's own settings are in its config.yaml
        (RUN / "config.yaml").unlink()
    checkpoint = load()
    change(checkpoint)
    torch.save(checkpoint, last())
    before = contents(Path.cwd())
    capsys.readouterr()
    assert fit(*LONGER) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith("lit_mnist: error: ")
    assert error.count("\n") == 1
    assert len(error) < 600
    assert contents(Path.cwd()) == before


def test_a_bug_keeps_its_traceback(
    fit: Command, finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished(), RUN)

    def broken(self: LitMNIST) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(LitMNIST, "configure_optimizers", broken)
    with pytest.raises(KeyError, match="mine"):
        fit(*LONGER)


def test_weights_of_another_network_cost_nothing(
    finished: Callable[..., Path], tiny_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished(), RUN)
    checkpoint = load()
    checkpoint["state_dict"]["network.head.weight"] = torch.zeros(10, 5)
    torch.save(checkpoint, last())
    before = contents(Path.cwd())
    for name, flags in (("fit", LONGER[2:]), ("test", []), ("predict", []), ("validate", [])):
        capsys.readouterr()
        assert main([name, "--data.root", str(tiny_root), "--ckpt_path", "last", *flags]) == 2
        assert "network.head.weight" in capsys.readouterr().err
    assert contents(Path.cwd()) == before


def test_the_format_before_is_scored_and_not_resumed(
    finished: Callable[..., Path], tiny_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished(), RUN)
    for version, statuses in ((2, {"test": 0, "validate": 0, "predict": 0, "fit": 2}), (1, {"test": 2, "fit": 2})):
        torch.save(load() | {"lit_mnist_format": version}, last())
        for name, status in statuses.items():
            assert main([name, "--data.root", str(tiny_root), "--ckpt_path", "last"]) == status
    assert re.search(r"--ckpt_path .+\.ckpt: .+ format 1", capsys.readouterr().err)


def test_a_newer_torch_may_resume(fit: Command, finished: Callable[..., Path]) -> None:
    shutil.copytree(finished(), RUN)
    checkpoint = load()
    del checkpoint["optimizer_states"][0]["param_groups"][0]["foreach"]  # as if torch had got it since
    checkpoint["lr_schedulers"][0]["kept_by_an_older_torch"] = 1
    torch.save(checkpoint, last())
    assert fit(*LONGER) == 0


def test_hostile_files_of_a_run_are_not_run(
    fit: Command, finished: Callable[..., Path], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished(), RUN)
    marker, theirs = tmp_path / "imported", str(tmp_path / "theirs")
    Path("evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Logger: pass\n")
    monkeypatch.syspath_prepend(Path.cwd())
    loaded = load()
    loaded["settings"] |= {"trainer.logger": "evil.Logger", "trainer.strategy": "evil.Logger"}
    loaded["settings"]["trainer.default_root_dir"] = theirs
    named = {"_class_path": "evil.Logger", "_instantiator": "evil.f", "lr": {"class_path": "evil.L"}}
    loaded["hyper_parameters"] |= named
    # nor does a checkpoint say where data lies
    assert not {"root", "download"} & loaded["datamodule_hyper_parameters"].keys()
    loaded["datamodule_hyper_parameters"] |= {"_class_path": "evil.Logger", "root": theirs, "download": False}
    torch.save(loaded, last())
    assert fit(*LONGER) == 0
    for name in ("test", "validate"):
        assert main([name, "--data.root", str(tiny_root), "--ckpt_path", "last"]) == 0
    # a run's own config.yaml may name classes, as any that is given with --config, and nothing beyond that
    (RUN / "config.yaml").write_text("trainer:\n  callbacks: !!python/object/apply:evil.f []\n")
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", "4") == 2
    assert not marker.exists()
    assert not Path(theirs).exists()
