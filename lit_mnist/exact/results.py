"""results.json: what a run came to, and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from .checkpoints import BestCheckpoint, callback_of
from .conditions import conditions
from .ddp import lost
from .errors import Interrupted
from .progress import EpochLines, Progress, epoch_metrics
from .run import Run
from .runs import read_results, replaced


def update_results(folder: Path, **sections: Any) -> None:
    """Put sections into `folder/results.json`, leaving its others as they are."""
    with replaced(folder / "results.json") as partial:
        partial.write_text(json.dumps({**read_results(folder), **sections}, indent=2, default=str) + "\n")


class Results(Callback):
    """Keeps results.json: of a fit from its start on, of a test at its end.

    Args:
        run: whose folder it lies in.
        progress: the clock of a fit; None for other commands.
        recipe: a name for the settings of a new run.
        command: what was typed.
        settings: plain settings by dotted key, beside those of module and data.
        lines: which counts the samples of a test.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress | None = None,
        recipe: str = "",
        command: str = "",
        settings: Mapping[str, Any] | None = None,
        lines: EpochLines | None = None,
    ) -> None:
        self.run = run
        self.progress = progress or Progress()
        self.recipe = recipe
        self.commands = [command]
        self.lines = lines
        self.settings = dict(settings or {})
        self.parent = run.parent or ""

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "commands": self.commands, "parent": self.parent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recipe = state_dict["recipe"]
        self.parent = self.parent or state_dict["parent"]
        self.commands = [*state_dict["commands"], *self.commands]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_fit(trainer, pl_module, "running")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self._write_fit(trainer, pl_module, "running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_fit(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.run.started and trainer.state.fn == "fit":
            stopped = isinstance(exception, (Interrupted, KeyboardInterrupt)) or lost(exception)
            with suppress(OSError):  # a full disk is told by the exception at hand
                self._write_fit(trainer, pl_module, "interrupted" if stopped else "failed")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run.folder and trainer.is_global_zero:
            checkpoint = self.run.checkpoint.name if self.run.checkpoint else None
            test: dict[str, Any] = {**epoch_metrics(trainer), "samples": self.lines.samples if self.lines else None}
            test |= {"checkpoint": checkpoint, "processes": trainer.world_size, **conditions(pl_module.device)}
            update_results(self.run.folder, test=test)

    def _write_fit(self, trainer: Trainer, pl_module: LightningModule, state: str) -> None:
        if not (trainer.is_global_zero and self.run.folder):
            return
        clock = self.progress.state_dict()
        seconds, data = clock["train_seconds"], trainer.datamodule  # type: ignore[attr-defined]
        fit = {
            "state": state,
            "recipe": self.recipe,
            "parent": self.parent or None,
            "commands": self.commands,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "metrics": epoch_metrics(trainer),
            "best": best_of(trainer),
            "train_seconds": round(seconds, 3),
            "validation_seconds": round(clock["validation_seconds"], 3),
            "samples_per_second": round(clock["samples_seen"] / seconds, 1) if seconds else None,
            "model": dict(pl_module.hparams),
            "data": dict(data.hparams) if data else {},
            "settings": self.settings,
            "loggers": [logger.version for logger in trainer.loggers],
            "processes": trainer.world_size,
            **conditions(pl_module.device),
        }
        update_results(self.run.folder, fit=fit)


def best_of(trainer: Trainer) -> dict[str, Any] | None:
    """The best checkpoint so far and its score."""
    best = callback_of(trainer, BestCheckpoint)
    if best and best.best_model_path and best.best_model_score is not None:
        return {"checkpoint": Path(best.best_model_path).name, str(best.monitor): float(best.best_model_score)}
    return None
