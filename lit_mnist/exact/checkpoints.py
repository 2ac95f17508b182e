"""Which checkpoints a run keeps: the best one and the newest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor

from .console import shortened
from .ddp import every
from .errors import Interrupted
from .run import Run
from .runs import own_checkpoints, replaced
from .state import StateError

C = TypeVar("C", bound=Callback)


def callback_of(trainer: Trainer, kind: type[C]) -> C | None:
    """The trainer's first callback of a class."""
    return next((part for part in trainer.callbacks if isinstance(part, kind)), None)  # type: ignore[attr-defined]


@dataclass
class SaveSettings:
    """How often the newest state of a run is saved, and so how much a kill can cost.

    It is also saved at the start, after each validation, and at the end.

    Args:
        every_seconds: how often, in seconds of training.
        every_n_steps: also after every step that this number divides; 0 means never.

    Raises:
        ValueError: a negative number.
    """

    every_seconds: float = 10.0
    every_n_steps: int = 0

    def __post_init__(self) -> None:
        if self.every_seconds < 0 or self.every_n_steps < 0:
            raise ValueError(
                "checkpoint.every_seconds and checkpoint.every_n_steps must be numbers from 0, got"
                f" {self.every_seconds} and {self.every_n_steps}"
            )


@dataclass
class BestSettings:
    """Which checkpoint is the best.

    Args:
        monitor: validation score that decides, as the module logs it.
        mode: `max` where the greatest score is the best, else `min`.
        loss: loss that decides between equal scores, the lower the better.

    Raises:
        ValueError: another mode.
    """

    monitor: str = "val/accuracy"
    mode: str = "max"
    loss: str = "val/loss"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"best.mode must be min or max, got {self.mode}")


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint of the best validation score; its name tells epoch and score.

    Of equal scores, the one with the lower loss is the better: on a small held-out set many are equal.

    Args:
        run: whose folder it lies in.
    """

    def __init__(self, run: Run, settings: BestSettings) -> None:
        monitor, mode = settings.monitor, settings.mode
        self.run = run
        self.title = monitor.rpartition("/")[2]
        super().__init__(
            filename=f"best-epoch={{epoch:02d}}-{self.title}={{{monitor}:.4f}}",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # a resumed run that comes to the same name means the same file
        )
        self.loss = settings.loss
        self.best_loss: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert self.run.folder
        self.dirpath = str(self.run.folder / "checkpoints")
        super().setup(trainer, pl_module, stage)

    @cached_property
    def state_key(self) -> str:
        return super().state_key  # ModelCheckpoint 2.6 writes it anew for each of the six hooks of a step

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        loss = trainer.callback_metrics.get(self.loss)
        equal = current is not None and self.best_model_path and current == self.best_model_score
        if equal and loss is not None and self.best_loss is not None:
            better = bool(trainer.strategy.reduce_boolean_decision(float(loss) < self.best_loss))
        else:
            better = super().check_monitor_top_k(trainer, current)
        if better and loss is not None:
            self.best_loss = float(loss)
        return better

    def state_dict(self) -> dict[str, Any]:
        # names without folders: a run may be moved, and its checkpoints are the same wherever it lies
        return self._in_folder(super().state_dict(), Path()) | {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # ModelCheckpoint 2.6 forgets the best score, but not the best path, when the folder is written in another
        # way: relative or absolute, or moved. Here the run decides: its own folder, its own best.
        best = self._of_origin(state_dict["best_model_path"])
        # without its file a best one is none; the first process decides, for machines may have folders of their own
        if self.dirpath and every(best is not None and best.is_file())[0]:
            name, models = state_dict["best_model_path"], state_dict["best_k_models"]
            scores = [*models.values(), state_dict["best_model_score"], state_dict["current_score"]]
            sound = all(isinstance(score, Tensor) and score.numel() == 1 for score in scores)
            if not sound or list(models) != [name] or state_dict["kth_best_model_path"] != name:
                raise StateError(f"callbacks/{self.state_key} does not hold together")
            super().load_state_dict(self._in_folder(state_dict, Path(self.dirpath)) | {"dirpath": self.dirpath})
            self.current_score = state_dict["current_score"]  # which ModelCheckpoint 2.6 saves and does not load
            self.best_loss = state_dict["best_loss"]

    def _of_origin(self, path: str) -> Path | None:
        return self.run.origin / "checkpoints" / Path(path).name if self.run.origin else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a run that begins with an earlier one's curve begins with its best, too
        path, before = Path(self.best_model_path), self._of_origin(self.best_model_path)
        if before and self.best_model_path and trainer.is_global_zero and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as partial:
                shutil.copyfile(before, partial)
        super().on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        # ModelCheckpoint 2.6 keeps the file that a run was resumed from, as a second best for ever
        if trainer.is_global_zero and self.best_model_path:
            best = Path(self.best_model_path)
            for older in own_checkpoints(best.parent.parent, "best"):
                if older.name != best.name:
                    older.unlink(missing_ok=True)

    @staticmethod
    def _in_folder(state: dict[str, Any], folder: Path) -> dict[str, Any]:
        def moved(path: str) -> str:
            return str(folder / Path(path).name) if path else ""

        paths = {key: moved(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best_k_models = {moved(path): score for path, score in state["best_k_models"].items()}
        return {**state, **paths, "best_k_models": best_k_models, "dirpath": str(folder)}


AGREE_STEPS = 8  # so often, in steps, several processes agree on whether to save or to stop


class LastCheckpoint(Checkpoint):
    """Keeps the newest state of a run: what a kill costs at most.

    Written at the start, every so many seconds or steps, after each validation, and at the end. The name tells epoch,
    step and, once there is one, the latest validation score. ModelCheckpoint 2.6 with `save_last` would write it only
    where it has just written a best one.

    Args:
        run: whose folder it lies in.
        monitor: validation score that is a part of the name.
    """

    def __init__(self, run: Run, settings: SaveSettings, monitor: str = "val/accuracy") -> None:
        self.run = run
        self.monitor = monitor
        self.every_seconds = settings.every_seconds
        self.every_n_steps = settings.every_n_steps
        self.path: Path | None = None
        self.stop_signal: int | None = None  # set from outside: save after this step, then stop
        self.on_start: Callable[[], None] | None = None  # called when the training starts
        self._agreed_signal = 0  # which all processes know of, and act on
        self._saved_at = monotonic()
        self._epoch = self._step = self._agreed_step = 0
        self._score: float | None = None
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        if self._trainer:  # the best checkpoint is written before this one, and carries this one's state
            self._read_score(self._trainer)
        return {"epoch": self._epoch, "score": self._score}

    def _read_score(self, trainer: Trainer) -> None:
        if trainer.validating and self.monitor in trainer.callback_metrics:
            self._score = float(trainer.callback_metrics[self.monitor])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch, self._score = state_dict["epoch"], state_dict["score"]
        if not (type(self._epoch) is int and self._epoch >= 0 and isinstance(self._score, (float, type(None)))):
            raise StateError(f"callbacks/{self.state_key} is {shortened(str(state_dict))}, expected epoch and score")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.on_start:
            self.on_start()
            # Lightning 2.6 tells all processes of SIGTERM before every step, and waits for the device to do so;
            # the handlers that are now in place do without
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._step = self._agreed_step = trainer.global_step
        self.save(trainer)  # at no moment is there nothing to resume

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch = trainer.current_epoch
        stepped = trainer.global_step > self._step
        self._step = trainer.global_step
        # Not where gradients accumulate: they are in no checkpoint. And not before a validation or after the last batch
        # of an epoch: Lightning 2.6 resumes from there after the validation, and leaves it out.
        # And not after the very last step, before the end of its epoch.
        done = 0 < trainer.max_steps <= trainer.global_step
        if not stepped or done or trainer.is_last_batch or validation_may_follow(trainer, batch_idx):
            return
        due = bool(self.every_n_steps and trainer.global_step % self.every_n_steps == 0)
        # processes have clocks and signals of their own, and asking each other in every step would take time
        agreed = trainer.world_size == 1 or trainer.global_step - self._agreed_step >= AGREE_STEPS
        if agreed:
            due = self._agree(trainer, due or monotonic() - self._saved_at >= self.every_seconds)
        if due or self._agreed_signal:
            self.save(trainer)
        self._stop_if_asked()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)
            self._agree(trainer)
            self._stop_if_asked()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def _agree(self, trainer: Trainer, due: bool = False) -> bool:
        """Whether a checkpoint is due for any process; a signal that one has got is then known to all.

        A signal may come at any moment, so what all go by is set here alone.
        """
        signum = self.stop_signal or 0
        if trainer.world_size > 1:
            self._agreed_step = trainer.global_step
            told = torch.tensor([int(due), signum], device=trainer.strategy.root_device)
            due, signum = trainer.strategy.reduce(told, reduce_op="max").tolist()
        self._agreed_signal = signum
        return bool(due)

    def _stop_if_asked(self) -> None:
        if self._agreed_signal:
            raise Interrupted(self._agreed_signal, self.path)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of this moment, then remove the one before.

        Not of a run that has diverged: Progress stops it soon, and its last sound state stays.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.lightning_module.parameters()):
            return
        self._read_score(trainer)
        name = f"last-epoch={self._epoch:02d}-step={trainer.global_step:06d}"
        if self._score is not None:
            name += f"-{self.monitor.rpartition('/')[2]}={self._score:.4f}"
        assert self.run.folder
        path = self.run.folder / "checkpoints" / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for older in [*own_checkpoints(self.run.folder, "last"), *path.parent.glob(".*.ckpt.*.tmp")]:
                if older.name != path.name:
                    older.unlink(missing_ok=True)
        self.path = path
        self._saved_at = monotonic()


def validation_may_follow(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning may validate after this batch; where it counts all batches, and where it counts an epoch's."""
    interval = trainer.val_check_batch
    if not trainer.enable_validation or interval is None or interval == float("inf"):
        return False
    every_n_epochs = trainer.check_val_every_n_epoch
    if every_n_epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % int(interval) == 0
    return (trainer.current_epoch + 1) % every_n_epochs == 0 and (batch_idx + 1) % int(interval) == 0
