"""Going on with a run: what a checkpoint lacks, the curve up to it, one process at a time, a stop on request."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from pytorch_lightning import Callback, LightningModule, Trainer

from lit_mnist.checkpoint import Interrupted, LastCheckpoint
from lit_mnist.processes import every, log_folder
from lit_mnist.runs import LOCK, RunError, replaced
from lit_mnist.state import StateError, check, check_callbacks, check_state
from lit_mnist.tensorboard import TEST_SUFFIX, RunLogger

# Changing these would make another run of it, not a continuation.
FIXED = {
    "model.network": "the weights are of that network",
    "model.layers": "the weights are of that network",
    "model.activation": "the weights are of that network",
    "model.optimizer": "the optimizer's state is of that kind",
    "data.name": "the run was trained on that data",
    "data.val_size": "held-out images would have been trained on",
    "data.split_seed": "held-out images would have been trained on",
    "seed_everything": "the order of the batches is a function of it",
}
ON_OFF = {
    "model.dropout": "the network has dropout layers or has not",
    "model.ema_decay": "the checkpoint has averaged weights or has not",
}


class RunStart(Callback):
    """Touches the folder of a run only once everything is restored: until then a failure costs nothing.

    Then it brings the curve to where the checkpoint was, writes config.yaml, which SaveConfigCallback of Lightning 2.6
    would replace before anything is restored, and opens the logger.

    Args:
        config: the text of config.yaml.
        origin: the run that the checkpoint belongs to; None for a new run.
        resumed: that checkpoint, or nothing.
        written: when it was written, in nanoseconds.
    """

    def __init__(self, config: str, origin: Path | None, resumed: Mapping[str, Any], written: int = 0) -> None:
        self.config = config
        self.origin = origin
        self.resumed = resumed
        self.written = written
        self.old_events = event_files(origin) if origin else []  # those of this process are made later

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = Path(log_folder(trainer) or "")
        theirs = trainer.is_global_zero and self.origin != run.resolve() and (run / "config.yaml").exists()
        if every(theirs)[0]:
            raise RunError(f"{run / 'config.yaml'}: that file exists; give trainer.logger a folder of its own")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # each process reads the checkpoint for itself, and machines may see different files
        steps = every((trainer.current_epoch, trainer.global_step))
        if len(set(steps)) > 1:
            raise RunError(
                "--ckpt_path: the processes have read different checkpoints, of these epochs and steps:"
                f" {', '.join(map(str, steps))}; give all machines the same file"
            )
        if self.resumed and steps[0] != (self.resumed["epoch"], self.resumed["global_step"]):
            raise StateError(f"loops/fit_loop is at epoch and step {steps[0]}, and the rest of it elsewhere")
        problem: OSError | None = None
        if trainer.is_global_zero and (folder := log_folder(trainer)):
            try:
                self._begin(Path(folder))
            except OSError as error:
                problem = error
        if reason := every(str(problem) if problem else "")[0]:  # all end with it, and none waits for the first
            raise problem or RunError(f"the first process could not write to the run: {reason}")
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.open()

    def _begin(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        if self.origin == run.resolve():
            rewind(self.old_events, self.resumed, self.written)
        elif self.origin:
            copy_curve(self.origin, run, self.resumed)
        with replaced(run / "config.yaml") as partial:
            partial.write_text(self.config)


class ExactResume(Callback):
    """Puts into checkpoints what Lightning 2.6 leaves out: torch's random state, how much of the curve was written, and
    the trainer's settings (config.yaml is not written in one piece, and a resumed run writes it anew).

    The order of the batches and their augmentation are functions of the seed, so the random state is dropout's alone.

    Args:
        settings: plain settings of trainer and checkpoints, with dotted keys.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._random: Mapping[str, Any] | None = None
        self._loaded: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning 2.6 does so only once a checkpoint is loaded, whose weights of 64 bits would have been cut to 32
        trainer.precision_plugin.convert_module(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.settings
        random = {"cpu": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        checkpoint["random"], *others = every(random)
        checkpoint["processes"] = trainer.world_size
        if others:
            checkpoint["random_of_others"] = others
        if trainer.is_global_zero and (folder := log_folder(trainer)):
            for logger in trainer.loggers:
                logger.save()  # onto the disk first: the checkpoint tells how long the files are
            checkpoint["events"] = {path.name: path.stat().st_size for path in event_files(Path(folder))}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_callbacks(trainer, checkpoint)
        states = [checkpoint["random"], *checkpoint.get("random_of_others", [])]
        for number, state in enumerate(states):
            check({"cpu": torch.get_rng_state()}, {"cpu": state.get("cpu")}, f"random/{number}")
            torch.Generator().set_state(state["cpu"])  # raises what would be raised once it is needed
        self._random = states[trainer.global_rank] if trainer.global_rank < len(states) else None
        if self._random and "cuda" in self._random and pl_module.device.type == "cuda":
            torch.Generator(pl_module.device).set_state(self._random["cuda"])
        self._loaded = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded:  # now that there are optimizers to compare with, and before they are restored
            check_state(trainer, self._loaded)
            self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the last hook before the first step: whatever was drawn on the way here does not count
        if self._random:
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"], pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            # Lightning 2.6 resumes a checkpoint of step 0 with this counter of the loggers' steps at 1
            trainer.fit_loop.epoch_loop._batches_that_stepped = 0


def event_files(run: Path) -> list[Path]:
    """The files of a run's training curve; those of `test` are left out."""
    found = run.glob("events.out.tfevents.*")
    return [path for path in found if not path.name.endswith(TEST_SUFFIX) and path.is_file()]


def curve_sizes(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """How long the files of the curve were, in bytes by name."""
    sizes = checkpoint.get("events")
    items = sizes.items() if isinstance(sizes, dict) else ()
    return {name: size for name, size in items if type(name) is str and type(size) is int and size >= 0}


def rewind(files: list[Path], checkpoint: Mapping[str, Any], written: int) -> None:
    """Cut a run's curve off after a checkpoint, its newest state, so that resuming writes nothing twice."""
    sizes = curve_sizes(checkpoint)
    for path in files:
        if path.name not in sizes:
            if path.stat().st_mtime_ns >= written:  # of a process that was killed before it could save
                path.unlink()
        elif path.stat().st_size > sizes[path.name]:
            os.truncate(path, sizes[path.name])


def copy_curve(origin: Path, run: Path, checkpoint: Mapping[str, Any]) -> None:
    """Let a new run begin with another's curve up to a checkpoint of it."""
    sizes = curve_sizes(checkpoint)
    for path in event_files(origin):
        if path.name in sizes:
            shutil.copyfile(path, run / path.name)
            os.truncate(run / path.name, min(sizes[path.name], path.stat().st_size))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], epoch_unfinished: bool) -> list[str]:
    """What a continuation changes, a line each.

    Args:
        before: the run's settings by dotted key.
        now: those asked for.
        epoch_unfinished: whether the checkpoint lies within an epoch.

    Raises:
        RunError: one that cannot be changed.
    """
    changed = {key: (value, now[key]) for key, value in before.items() if key in now and now[key] != value}
    for key, (old, new) in changed.items():
        reason = FIXED.get(key)
        if key in ON_OFF and bool(old) != bool(new):
            reason = ON_OFF[key]
        if key == "data.batch_size" and epoch_unfinished:
            reason = "the checkpoint lies within an epoch, whose batches are counted"
        if reason:
            raise RunError(f"{key} was {old} in this run and cannot become {new}: {reason}; start a new run for that")
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the system lets go of it however the process ends.

    Raises:
        RunError: another process has it.
    """
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{run}: another process is training this run") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def stop_on_signals(last: LastCheckpoint | None) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the training behind the step at hand; a second Ctrl-C ends it at once.

    Raises:
        Interrupted: the training was ended so.
    """
    if last is None:
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def stop(signum: int, frame: FrameType | None) -> None:
        last.stop_signal = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def install() -> None:
        for signum in before:
            signal.signal(signum, stop)

    install()
    last.on_start = install  # again: Lightning 2.6 puts its own in front, which would end a validation with status 0
    try:
        yield
    except SystemExit as exit_:
        # Lightning 2.6 turns KeyboardInterrupt into exit status 1
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise Interrupted(signal.SIGINT, last.path) from None
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
