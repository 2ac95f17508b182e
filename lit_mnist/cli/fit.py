"""fit: train, and say where the run lies and what to do with it."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import LightningDataModule, LightningModule, Trainer

from lit_mnist.exact.assembly import hold
from lit_mnist.exact.checkpoints import CheckpointKeeper, callback_of
from lit_mnist.exact.console import shown
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.loggers import RunLogger
from lit_mnist.exact.progress import Progress, words
from lit_mnist.exact.results import best_of
from lit_mnist.exact.run import Run

PROGRAM = "python -m lit_mnist"


def fit(trainer: Trainer, run: Run, model: LightningModule, data: LightningDataModule, flags: str) -> None:
    """Train a run from its beginning or from its checkpoint on.

    Args:
        flags: what the commands that are printed need besides.

    Raises:
        UserError: there is nothing to train.
    """
    with hold(run, trainer):
        trainer.fit(model, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    if run.made and trainer.global_step == run.loaded.get("global_step"):
        run.started = False  # nothing of its own is in the folder
        raise UserError("nothing to train: that checkpoint's run has finished; a larger trainer.max_epochs goes on")
    if not (run.started or run.continues or trainer.fast_dev_run):  # type: ignore[attr-defined]
        raise UserError(
            "nothing to train: trainer.max_epochs, trainer.max_steps and trainer.limit_train_batches leave no step"
        )
    if trainer.is_global_zero and run.folder:
        print_summary(trainer, run, run.folder, flags)


def print_summary(trainer: Trainer, run: Run, folder: Path, flags: str) -> None:
    """Once the progress bar, which wraps long lines, is gone."""
    keeper, progress = callback_of(trainer, CheckpointKeeper), callback_of(trainer, Progress)
    assert progress
    last, clock = (keeper.last_path if keeper else None) or run.checkpoint, progress.state_dict()
    done = f"{trainer.current_epoch} epoch{'s' * (trainer.current_epoch != 1)}, {trainer.global_step} steps"
    seconds = clock["train_seconds"] + clock["validation_seconds"]
    best = best_of(trainer)
    score = words({name: value for name, value in (best or {}).items() if name != "checkpoint"})
    rows = {"Trained": f"{done}, {minutes(seconds)}{f'; best {score[0]}' if score else ''}"}
    if trainer.global_step == run.loaded.get("global_step"):
        print(f"Nothing to train: this run has finished ({done}).")
        rows = {}
    rows["The run"] = shown(folder)
    if any(isinstance(logger, RunLogger) for logger in trainer.loggers):
        rows["Look at it"] = f"tensorboard --logdir {shown(folder.parent)}"
    if last:
        tested = folder / "checkpoints" / best["checkpoint"] if best else last
        by_steps = 0 < trainer.max_steps <= trainer.global_step
        longer = f"--trainer.max_steps {2 * trainer.max_steps}" if by_steps else ""
        longer = longer or f"--trainer.max_epochs {2 * max(1, trainer.current_epoch)}"
        rows["Test it"] = f"{PROGRAM} test --ckpt_path {shown(tested)}{flags}"
        rows["Train on"] = f"{PROGRAM} fit --ckpt_path {shown(last)}{flags} {longer}"
    print("\n" + "\n".join(f"{title + ':':<12}{text}" for title, text in rows.items()))


def minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
