"""What a user reads: the lines on the console, results.json."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_mnist import __version__
from lit_mnist.checkpoint import BestCheckpoint, Interrupted, LastCheckpoint
from lit_mnist.module import LitMNIST
from lit_mnist.processes import log_folder, lost
from lit_mnist.runs import read_results, replaced
from lit_mnist.tensorboard import PER_EPOCH

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorboard")


class TrainingError(RuntimeError):
    """The training failed on its own account; checkpoints written before stay as they are."""


class ProcessLost(TrainingError):  # noqa: N818, it is said of another one
    """Another process of this run ended or cannot be reached."""


@cache  # the code that runs is that of the start
def commit() -> str | None:
    """The git commit of this code, with `-dirty` where it was changed since; None outside a checkout."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # the checkout around it may be another project's
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def conditions(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code: versions, hardware, commit."""
    return {
        "versions": {
            "python": platform.python_version(),
            "lit_mnist": __version__,
            **{name: version(name) for name in PACKAGES},
        },
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": commit(),
    }


def update_results(folder: Path, **sections: Any) -> None:
    """Put sections into `folder/results.json`, leaving its others as they are."""
    with replaced(folder / "results.json") as partial:
        partial.write_text(json.dumps({**read_results(folder), **sections}, indent=2) + "\n")


class RunReport(Callback):
    """Prints a line after each epoch and each evaluation, keeps results.json, and stops a run that diverged.

    Args:
        folder: the run that a checkpoint given by the user belongs to; None for a new run.
        checkpoint: that checkpoint.
        recipe: a name for the settings of a new run.
        command: what was typed.
        parent: of a new run that begins with an earlier one's state: that run and its checkpoint; else empty.
    """

    def __init__(
        self,
        folder: Path | None = None,
        checkpoint: Path | None = None,
        recipe: str = "",
        command: str = "",
        parent: str = "",
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.commands = [command]
        self.parent = parent
        self.train_seconds = self.validation_seconds = 0.0
        self.images_seen = 0
        self.trained = False
        self._clock = self._window_clock = 0.0
        self._window_images = 0
        self._lr = 0.0
        self._loss: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_seconds": self.train_seconds + (perf_counter() - self._clock if self.trained else 0),
            "validation_seconds": self.validation_seconds,
            "images_seen": self.images_seen,
            "recipe": self.recipe,
            "commands": self.commands,
            "parent": self.parent,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("train_seconds", "validation_seconds", "images_seen", "recipe"):
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        self.parent = self.parent or state_dict.get("parent", "")
        self.commands = [*state_dict.get("commands", []), *self.commands]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True
        self._start_clock()  # a run that is resumed within an epoch starts none
        self._write_results(trainer, pl_module, "running")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_clock()
        if trainer.current_epoch:
            self._write_results(trainer, pl_module, "running")

    def _start_clock(self) -> None:
        self._clock = self._window_clock = perf_counter()
        self._window_images = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the batch it is the next step's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitMNIST)
        _, _, images = pl_module.part_of_batch(batch_idx, len(batch[0]))
        self.images_seen += images
        self._window_images += images
        self._loss = outputs["cross_entropy"]
        step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            loss = self._check_finite(trainer)
            now = perf_counter()
            # Logged here and not by `self.log`, which writes after all callbacks: a checkpoint that is saved behind
            # this step must find its events written.
            metrics = {
                "train/loss_step": loss,
                "train/learning_rate": self._lr,
                "train/images_per_second": self._window_images / (now - self._window_clock),
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step - 1)
            self._window_clock, self._window_images = now, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_finite(trainer)
            self.train_seconds += self._stop_clock(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validation_seconds += self._stop_clock(pl_module)

    def _stop_clock(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = perf_counter() - self._clock
        self._start_clock()
        return seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train_seconds += self._stop_clock(pl_module)
        self._check_finite(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, LitMNIST)
        loss, correct, images = scores(pl_module, "val")
        if trainer.state.fn == "fit":
            line = f"Epoch {trainer.current_epoch}: validation loss {loss:.4f}, accuracy {share(correct, images)}"
        else:
            line = f"Validation set: average loss {loss:.4f}, accuracy {share(correct, images)}"
        say(trainer, line)
        if trainer.state.fn == "fit" and not math.isfinite(loss):
            raise TrainingError(diverged(trainer, "val/loss", loss))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitMNIST)
        loss, correct, images = scores(pl_module, "test")
        say(trainer, f"Test set: average loss {loss:.4f}, accuracy {share(correct, images)}")
        if self.folder and trainer.is_global_zero:
            test = {
                "test/loss": loss,
                "test/accuracy": correct / images,
                "images": images,
                "checkpoint": self.checkpoint.name if self.checkpoint else None,
                "processes": trainer.world_size,
                **conditions(pl_module.device),
            }
            update_results(self.folder, test=test)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning 2.6 logs the metrics of the last epoch just before this hook
        metrics = (float(value) for name, value in trainer.callback_metrics.items() if name in PER_EPOCH)
        sound = all(bool(torch.isfinite(parameter).all()) for parameter in pl_module.parameters())
        if not (sound and all(map(math.isfinite, metrics))):
            raise TrainingError(diverged(trainer, "the loss or a weight", math.nan))
        self._write_results(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.trained and trainer.state.fn == "fit":
            stopped = isinstance(exception, (Interrupted, KeyboardInterrupt)) or lost(exception)
            state = "interrupted" if stopped else "failed"
            with suppress(OSError):  # a full disk is told by the exception at hand
                self._write_results(trainer, pl_module, state)

    def _write_results(self, trainer: Trainer, pl_module: LightningModule, state: str) -> None:
        folder = log_folder(trainer)
        if not (trainer.is_global_zero and folder):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name in PER_EPOCH}
        train_seconds = self.state_dict()["train_seconds"]
        best = best_checkpoint(trainer)
        fit = {
            "state": state,
            "recipe": self.recipe,
            "parent": self.parent or None,
            "commands": self.commands,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "metrics": metrics,
            "best": {"checkpoint": Path(best.best_model_path).name, "val/accuracy": float(best.best_model_score)}
            if best and best.best_model_score is not None
            else None,
            "train_seconds": round(train_seconds, 3),
            "validation_seconds": round(self.validation_seconds, 3),
            "images_per_second": round(self.images_seen / train_seconds, 1) if train_seconds else None,
            "model": dict(pl_module.hparams),
            "data": dict(trainer.datamodule.hparams) if trainer.datamodule else {},  # type: ignore[attr-defined]
            "processes": trainer.world_size,
            **conditions(pl_module.device),
        }
        update_results(Path(folder), fit=fit)

    def print_summary(self, trainer: Trainer, flags: str) -> None:
        """Say where the run lies and what to do with it, once the progress bar, which wraps long lines, is gone.

        Args:
            flags: what the commands need besides.
        """
        last = next((callback.path for callback in callbacks(trainer) if isinstance(callback, LastCheckpoint)), None)
        last = last or self.checkpoint
        folder = log_folder(trainer)
        if not (trainer.is_global_zero and folder and last):
            return
        if not self.trained:
            done = f"{trainer.current_epoch} epochs, {trainer.global_step} steps"
            print(f"Nothing to train: this run has finished ({done}).")
        best = best_checkpoint(trainer)
        program = "python -m lit_mnist"
        by_steps = 0 < trainer.max_steps <= trainer.global_step
        longer = f"--trainer.max_steps {2 * trainer.max_steps}" if by_steps else ""
        longer = longer or f"--trainer.max_epochs {2 * max(1, trainer.current_epoch)}"
        rows = {
            "The run": shown(folder),
            "Look at it": f"tensorboard --logdir {shown(Path(folder).parent)}",
            "Test it": f"{program} test --ckpt_path {shown(best.best_model_path if best else last)}{flags}",
            "Go on": f"{program} fit --ckpt_path {shown(last)}{flags} {longer}",
        }
        print("\n" + "\n".join(f"{title + ':':<12}{text}" for title, text in rows.items()))

    def _check_finite(self, trainer: Trainer) -> float:
        """The latest step's loss over all processes, which thus find out together that it is not finite."""
        if self._loss is None:
            return math.nan
        loss = float(trainer.strategy.reduce(self._loss.clone(), reduce_op="mean"))
        if not math.isfinite(loss):
            raise TrainingError(diverged(trainer, "train/loss_step", loss))
        return loss


def say(trainer: Trainer, line: str) -> None:
    """Print a line once; `Trainer.print` of Lightning 2.6 does so on each machine."""
    if trainer.is_global_zero:
        trainer.print(line)


def callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def best_checkpoint(trainer: Trainer) -> BestCheckpoint | None:
    """The callback that keeps the best checkpoint, once it has kept one."""
    for callback in callbacks(trainer):
        if isinstance(callback, BestCheckpoint) and callback.best_model_path:
            return callback
    return None


def diverged(trainer: Trainer, name: str, value: float) -> str:
    return (
        f"training failed at step {trainer.global_step} of epoch {trainer.current_epoch}: {name} is {value};"
        " try a smaller --model.lr (checkpoints written before are kept)"
    )


def scores(pl_module: LitMNIST, stage: str) -> tuple[float, int, int]:
    """Mean loss, correct answers and images of the evaluation that just ended."""
    loss, accuracy = pl_module.metric(f"{stage}/loss"), pl_module.metric(f"{stage}/accuracy")
    with loss.sync_context():
        images = round(float(loss.weight))  # type: ignore[arg-type]
    return float(loss.compute()), round(float(accuracy.compute()) * images), images


def share(correct: int, images: int) -> str:
    return f"{correct}/{images} ({100 * correct / images:.2f} %)"


def shown(path: str | Path) -> str:
    """A path as a user would type it: relative where it lies below the current folder."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def interactive() -> bool:
    """Whether somebody watches: a progress bar in a file is noise."""
    return sys.stdout.isatty()
