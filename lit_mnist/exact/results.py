"""results.json: what a run came to, and under which conditions."""

import json
from contextlib import suppress
from time import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from .checkpoints import CheckpointKeeper, Run, callback_of
from .conditions import conditions
from .console import Interrupted
from .ddp import lost
from .loggers import show_tests
from .progress import Progress, epoch_metrics, print_once
from .runs import evaluations, read_results, replaced, section, test_score

KEY = ("checkpoint", "step", "test_set", "samples", "whole")  # of an evaluation


class Results(Callback):
    """Keeps results.json: of a fit from its start and of a test at its end."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        fit = section(read_results(run.origin), "fit") if run.origin else {}
        begun = f"{run.origin.name}/{run.checkpoint.name}" if run.origin and run.checkpoint else None
        own: Any = fit if run.continues else {"parent": begun}
        self.history = {
            "created": own.get("created", time()),
            "recipe": fit.get("recipe", run.recipe),
            "parent": own.get("parent"),
            "commands": [*fit.get("commands", []), run.command],
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_fit(trainer, pl_module, "running")

    on_train_epoch_start = on_train_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_fit(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.run.started and trainer.state.fn == "fit":
            stopped = isinstance(exception, (Interrupted, KeyboardInterrupt)) or lost(exception)
            with suppress(OSError):  # a full disk is reported by the exception itself
                self._write_fit(trainer, pl_module, "interrupted" if stopped else "failed")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scored = None if self.run.started else self.run.checkpoint  # after a fit in this process it is not known
        limit: Any = trainer.limit_test_batches
        step, whole = self.run.loaded.get("global_step") if scored else None, type(limit) is float and limit == 1
        data = getattr(trainer.datamodule, "test_set", None)  # type: ignore[attr-defined]
        of = scored and scored.name, step, data, self.progress.samples, whole
        test = {**dict(zip(KEY, of, strict=True)), **epoch_metrics(trainer)}
        self._write(trainer, pl_module, "test", test)
        score = test_score(read_results(self.run.folder)) if self.run.folder else test
        if any(score.get(key) != test[key] for key in KEY):
            print_once(trainer, f"Not counted as the run's test score: {of[0]}, {of[3]} samples of {data}")

    def _write_fit(self, trainer: Trainer, pl_module: LightningModule, state: str) -> None:
        keeper, best = callback_of(trainer, CheckpointKeeper), None
        if keeper and keeper.best_path:
            best = {**keeper.best_values, "checkpoint": keeper.best_path.name}
        timer = self.progress.state_dict()
        seconds, data = timer["train_seconds"], trainer.datamodule  # type: ignore[attr-defined]
        fit = {"state": state, **self.history, "epochs": trainer.current_epoch}
        fit |= {"steps": trainer.global_step, "parameters": sum(p.numel() for p in pl_module.parameters())}
        fit |= {"metrics": self.progress.metrics, "best": best, "train_seconds": round(seconds, 3)}
        fit["validation_seconds"] = round(timer["validation_seconds"], 3)
        fit["samples_per_second"] = round(timer["samples_seen"] / seconds, 1) if seconds else None
        fit |= {"model": dict(pl_module.hparams), "data": dict(data.hparams) if data else {}}
        fit |= {"test_set": getattr(data, "test_set", None), "settings": self.run.settings}
        fit["loggers"] = [logger.version for logger in trainer.loggers]
        self._write(trainer, pl_module, "fit", fit)

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str, entry: dict[str, Any]) -> None:
        """Put a fit, or one more evaluation, into results.json, leaving the others as they are."""
        if trainer.is_global_zero and self.run.folder:
            entry |= {"processes": trainer.world_size, **conditions(pl_module.device)}
            results = read_results(self.run.folder)
            others = [old for old in evaluations(results) if any(old.get(key) != entry.get(key) for key in KEY)]
            results[name] = entry if name == "fit" else [*others, entry]
            with replaced(self.run.folder / "results.json") as partial:
                partial.write_text(json.dumps(results, indent=2, default=str) + "\n")
            if name == "test":
                show_tests(self.run.folder)
