"""A run: where it writes, what it begins with, which checkpoints it keeps, and signals that stop it after a save."""

import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import inf, isnan
from pathlib import Path
from time import monotonic, time
from types import FrameType
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from .console import PROGRAM, Interrupted, TrainingFailed, UserError
from .ddp import gather_all, is_first
from .runs import FORMAT, FORMAT_ENTRY, newest, own_checkpoints, replaced, run_folder

C = TypeVar("C", bound=Callback)
AGREE_STEPS = 8  # after so many steps several processes agree on whether to save or to stop


def callback_of(trainer: Trainer, kind: type[C]) -> C | None:
    """Return the trainer's first callback of a class."""
    return next((part for part in trainer.callbacks if isinstance(part, kind)), None)  # type: ignore[attr-defined]


def diverged(trainer: Trainer, name: str, value: float | str) -> TrainingFailed:
    where = f"training failed at step {trainer.global_step} of epoch {trainer.current_epoch}: {name} is {value}"
    return TrainingFailed(f"{where}; try a smaller learning rate (checkpoints written before are kept)")


@dataclass
class Run:
    """The folder that a fit writes to, and what it begins with."""

    folder: Path | None = None  # of its files; None on all processes but the first until it starts
    checkpoint: Path | None = None  # what it begins with
    loaded: Mapping[str, Any] = field(default_factory=dict)  # the content of that checkpoint
    origin: Path | None = None  # the run that the checkpoint belongs to; None where it lies in no run's folder
    unchanged: bool = True  # whether its settings are those it had: then a run that a callback stopped stays stopped
    claimed: Sequence[Path] = ()  # what this process has made: the folder, and those above it that were missing
    started: bool = False  # whether there is anything to keep in it
    config: str = ""  # all settings as YAML, for config.yaml
    settings: Mapping[str, Any] = field(default_factory=dict)  # plain ones by dotted key, for results.json
    recipe: str = ""  # a name for them
    command: str = ""  # as typed

    def claim(self, runs: Path, name: str | None = None) -> "Run":
        """Make a new folder for this run, `version_N` without a name, which only the first process does."""
        if not is_first():
            return self
        runs = runs.absolute()
        missing = [path for path in (runs, *runs.parents) if not path.exists()]
        taken = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
        numbers = count(max((int(number) for number in taken if number.isdecimal()), default=-1) + 1)
        while not self.folder:
            folder = runs / (name or f"version_{next(numbers)}")
            try:
                folder.mkdir(parents=True)
                self.folder, self.claimed = folder, [folder, *missing]
            except FileExistsError:  # another program that started at the same time was quicker
                if name:
                    raise
        return self

    @classmethod
    def resumed(cls, checkpoint: Path, loaded: Mapping[str, Any]) -> "Run":
        """Return the run that a checkpoint belongs to, in its own folder; UserError if it cannot be resumed."""
        if (version := loaded.get(FORMAT_ENTRY)) != FORMAT:
            advice = f"this version scores it, and the {PROGRAM} that wrote it resumes it"
            nothing = f"it has no state that {PROGRAM} can resume"
            what = f"that checkpoint has the format {version}: {advice}" if version else nothing
            raise UserError(f"{checkpoint}: {what}")
        folder = run_folder(checkpoint)
        return cls(folder, checkpoint, loaded, folder)

    @property
    def continues(self) -> bool:
        """Whether it continues in the folder of its checkpoint."""
        return self.folder is not None and self.folder == self.origin

    def discard_unused(self) -> None:
        """Remove the folder that was made for a run which never started."""
        if self.folder and self.claimed and not self.started:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another run is in it by now
                for parent in self.claimed[1:]:
                    parent.rmdir()
            self.folder = None


@dataclass
class SaveSettings:
    """How often the newest state is saved, besides the start, each validation and the end: what a kill can cost.

    Args:
        every_seconds: how often, in seconds of training.
        every_n_steps: also after every step that this number divides; 0 means never.
    """

    every_seconds: NonNegativeFloat = 10.0
    every_n_steps: NonNegativeInt = 0


@dataclass
class BestSettings:
    """Which checkpoint is the best.

    Args:
        monitor: validation score that decides, as the module logs it.
        mode: `max` where the greatest score is the best, else `min`.
        loss: loss that decides between equal scores, the lower the better: on a small held-out set many are equal.
    """

    monitor: str = "val/accuracy"
    mode: Literal["min", "max"] = "max"
    loss: str = "val/loss"


class CheckpointKeeper(Checkpoint):
    """Keeps the newest state of a run, and the one of the best validation score where `best` says which that is."""

    # ModelCheckpoint 2.6 writes the newest state only beside a best one, and forgets the best score of a moved run
    def __init__(self, run: Run, save: SaveSettings, best: BestSettings | None = None) -> None:
        self.run = run
        self.best = best
        self.last_path: Path | None = None
        self.best_path: Path | None = None
        self.best_values: dict[str, float] = {}  # all that its validation logged, and the step
        self.changes = ExitStack()  # puts back the signal handlers, and what is replaced in Lightning; `hold` does so
        self._save = save
        self._signal = 0  # what this process has got: save after this step, then stop
        self._agreed_step = 0
        self._saved_at = monotonic()

    def state_dict(self) -> dict[str, Any]:
        # a name without its folder: a run may be moved, and its checkpoints are the same wherever it lies
        best = {"name": self.best_path and self.best_path.name, "values": self.best_values}
        return {"by": self.best and [self.best.monitor, self.best.mode], "best": best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best, by = state_dict["best"], self.best and [self.best.monitor, self.best.mode]
        name = Path(best["name"] or "").name
        before = self.run.origin and self.run.origin / "checkpoints" / name
        # without its file there is no best; of several machines' folders that of the first process decides
        if name and by == state_dict["by"] and gather_all(before is not None and before.is_file())[0]:
            self.best_path, self.best_values = self._folder / name, best["values"]

    @property
    def _folder(self) -> Path:
        assert self.run.folder
        return self.run.folder / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callbacks = sorted(trainer.callbacks, key=lambda part: part is self)  # type: ignore[attr-defined]
        waiting = list[Callable[[], None]]()  # hooks of checkpoint callbacks, until the module had its turn
        log = trainer._logger_connector.update_train_step_metrics

        def then_save(function: Callable[[], Any]) -> Any:
            result = function()
            if trainer.training:  # behind a step, which Lightning 2.6 would log only after a checkpoint of it
                log()
            while waiting:
                waiting.pop(0)()
            return result

        saved = self.run.checkpoint.stat().st_mtime if self.run.checkpoint and self.run.continues else inf
        for part in trainer.callbacks:  # type: ignore[attr-defined]
            for name in ("on_train_batch_end", "on_validation_end") if isinstance(part, Checkpoint) else ():
                self._replace(part, name, lambda hook, *args: waiting.append(partial(hook, *args)))
            if isinstance(part, ModelCheckpoint):
                self._replace(part, "file_exists", partial(exists_anew, saved, time()))
        # what Lightning 2.6 calls last after a batch, and in a validation
        self._replace(trainer._logger_connector, "on_batch_end", then_save)
        self._replace(trainer.fit_loop.epoch_loop.val_loop, "run", then_save)
        self._replace(trainer._logger_connector, "update_train_step_metrics", lambda _: None)

    def _replace(self, owner: Any, name: str, by: Callable[..., Any]) -> None:
        """Replace a method by a function that gets it as its first argument."""
        self.changes.enter_context(patch.object(owner, name, partial(by, getattr(owner, name))))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle_signals()  # again: Lightning 2.6 has put its own in place, which end a validation with status 0
        # with its own it broadcasts SIGTERM to all processes before every step, and waits for the device to do so
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        # a run that begins with an earlier one's scalars begins with its best, too
        if self.best_path and trainer.is_global_zero and not self.best_path.exists():
            assert self.run.origin
            self._folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.best_path) as partial:
                shutil.copyfile(self.run.origin / "checkpoints" / self.best_path.name, partial)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # not where gradients accumulate, nor before a validation or an epoch's end: Lightning 2.6 resumes after them
        loop: Any = trainer.fit_loop
        ends = trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step
        if ends or loop.epoch_loop._should_accumulate() or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            return
        due = bool(self._save.every_n_steps and trainer.global_step % self._save.every_n_steps == 0)
        # each process has a timer and signals of its own, and asking the others in every step would take time
        if trainer.world_size == 1 or trainer.global_step - self._agreed_step >= AGREE_STEPS:
            self._save_together(trainer, due or monotonic() - self._saved_at >= self._save.every_seconds)
        elif due:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_together(trainer, due=True)

    def _save_together(self, trainer: Trainer, due: bool) -> None:
        """Save if it is due for any process or one has got a signal, with which all then stop."""
        signum = self._signal
        if trainer.world_size > 1:
            self._agreed_step = trainer.global_step
            votes = torch.tensor([int(due), signum], device=trainer.strategy.root_device)
            due, signum = trainer.strategy.reduce(votes, reduce_op="max").tolist()
        if due or signum:
            self.save(trainer)
        if signum:
            raise Interrupted(signum, self.last_path)

    def save(self, trainer: Trainer) -> None:
        """Write the state of this moment, as the best too if a validation found it so; TrainingFailed if diverged."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.lightning_module.parameters()):
            raise diverged(trainer, "a weight", "not finite")
        if trainer.validating and self.best and self._is_best(trainer, self.best):
            score = f"{self.best.monitor.rpartition('/')[2]}={self.best_values[self.best.monitor]:.4f}"
            self.best_path = self._folder / f"best-epoch={trainer.current_epoch:02d}-{score}.ckpt"
            trainer.save_checkpoint(self.best_path)
        epoch = max(0, trainer.fit_loop.epoch_progress.current.ready - 1)  # the latest that has begun
        path = self._folder / f"last-epoch={epoch:02d}-step={trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(path)
        self.last_path = path
        if trainer.is_global_zero:  # now that the newest state names no other best
            kinds = ["last", "best"] if self.best_path else ["last"]
            kept = [path for kind in kinds for path in own_checkpoints(self._folder.parent, kind)]
            for old in {*kept, *self._folder.glob(".*.tmp")} - {self.last_path, self.best_path}:
                old.unlink(missing_ok=True)
        self._saved_at = monotonic()

    def _is_best(self, trainer: Trainer, best: BestSettings) -> bool:
        """Read the scores of a validation, and return whether they are the best so far; if so, remember them."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if best.monitor not in logged:
            found = ", ".join(sorted(logged)) or "none"
            raise TrainingFailed(f"training stopped: the module logs no {best.monitor} to choose the best by: {found}")
        values = {k: v for k, v in logged.items() if k == best.monitor or not k.startswith("train/")}
        # those of the first process: a module may log what each process has found alone
        values = gather_all(values | {"step": trainer.global_step})[0]
        score, sign = values[best.monitor], 1 if best.mode == "max" else -1
        ranks = [(sign * one[best.monitor], -one.get(best.loss, inf)) for one in (values, self.best_values) if one]
        better = not isnan(score) and (len(ranks) == 1 or ranks[0] > ranks[1])
        self.best_values = values if better else self.best_values
        return better

    def handle_signals(self) -> None:
        """Let SIGTERM and Ctrl-C end the training after a step, a second Ctrl-C at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self._signal and signum == signal.SIGINT:
                raise Interrupted(signum, newest(self.run.folder) if self.run.folder else None)
            self._signal = signum

        for signum in (signal.SIGTERM, signal.SIGINT):
            self.changes.callback(signal.signal, signum, signal.signal(signum, note))


def exists_anew(saved: float, resumed: float, exists: Callable[..., bool], path: str, trainer: Trainer) -> bool:
    """Stand in for `ModelCheckpoint.file_exists` of Lightning 2.6, which would write beside a file that was left."""
    left = Path(path).is_file() and saved <= Path(path).stat().st_mtime < resumed  # by a process that was killed
    return not gather_all(left)[0] and exists(path, trainer)
