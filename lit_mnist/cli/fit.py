"""fit: train, and print where the run lies and what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from lit_mnist.exact.assembly import hold
from lit_mnist.exact.checkpoints import CheckpointKeeper, callback_of
from lit_mnist.exact.console import PROGRAM, shown
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.loggers import RunLogger
from lit_mnist.exact.progress import Progress, words
from lit_mnist.exact.results import best_of
from lit_mnist.exact.run import Run

FINISHED = "Nothing to train: this run has finished. To train longer, raise trainer.max_epochs."


def fit(trainer: Trainer, run: Run, model: LightningModule, data: Any) -> None:
    """Train a run from its beginning or from its checkpoint.

    Raises:
        UserError: there is nothing to train.
    """
    with hold(run, trainer):
        trainer.fit(model, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    if run.made and trainer.global_step == run.loaded.get("global_step"):
        run.started = False  # the new run's folder has nothing that is not its parent's
        raise UserError(FINISHED)
    if not (run.started or run.continues or trainer.fast_dev_run):  # type: ignore[attr-defined]
        raise UserError("nothing to train: trainer.max_epochs, max_steps and limit_train_batches leave no step")
    if trainer.is_global_zero and run.folder:
        print_summary(trainer, run, run.folder, "" if data.root == "data" else f" --data.root {shlex.quote(data.root)}")


def print_summary(trainer: Trainer, run: Run, folder: Path, place: str) -> None:
    """Print the run's result and the commands for what comes next; `place` is the flag for the data's folder."""
    keeper, progress, best = callback_of(trainer, CheckpointKeeper), callback_of(trainer, Progress), best_of(trainer)
    assert progress
    last, times = (keeper.last_path if keeper else None) or run.checkpoint, progress.state_dict()
    seconds = times["train_seconds"] + times["validation_seconds"]
    minutes = f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    score = words({name: value for name, value in (best or {}).items() if name != "checkpoint"})
    epochs, steps = trainer.current_epoch, trainer.global_step
    trained = f"{epochs} epoch{'s' * (epochs != 1)}, {steps} steps, {minutes}{f'; best {score[0]}' if score else ''}"
    if steps == run.loaded.get("global_step"):
        print(FINISHED)
    rows = {"Trained": trained, "The run": shown(folder)}
    if any(isinstance(logger, RunLogger) for logger in trainer.loggers):
        rows["Look at it"] = f"tensorboard --logdir {shown(folder.parent)}"
    if last:
        by_steps = 0 < trainer.max_steps <= steps
        longer = f"max_steps {2 * trainer.max_steps}" if by_steps else f"max_epochs {2 * max(1, epochs)}"
        tested = folder / "checkpoints" / best["checkpoint"] if best else last
        rows["Test it"] = f"python -m {PROGRAM} test --ckpt_path {shown(tested)}{place}"
        rows["Train on"] = f"python -m {PROGRAM} fit --ckpt_path {shown(last)} --trainer.{longer}"
    print("\n" + "\n".join(f"{title + ':':<12}{text}" for title, text in rows.items()))
