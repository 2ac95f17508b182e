"""The clock of a fit, the scalars of its steps, its lines on the console, and its stop where it diverges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor

from .ddp import gather_all, part_of_batch
from .errors import TrainingFailed


class Progress(Callback):
    """Times the training and validation of a run over all its parts, logs each step's loss, learning rate and
    throughput, and stops a run that diverged.
    """

    def __init__(self) -> None:
        self.train_seconds = self.validation_seconds = 0.0
        self.samples_seen = 0
        self.epoch_seconds = 0.0  # of training and validation, in this process
        self._running = False
        self._clock = self._window_clock = 0.0
        self._window_samples = 0
        self._lr = 0.0
        self._loss: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_seconds": self.train_seconds + (perf_counter() - self._clock if self._running else 0),
            "validation_seconds": self.validation_seconds,
            "samples_seen": self.samples_seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("train_seconds", "validation_seconds", "samples_seen"):
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running = True
        self._start_clock()  # a run that is resumed within an epoch starts none

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_seconds = 0.0
        self._start_clock()

    def _start_clock(self) -> None:
        self._clock = self._window_clock = perf_counter()
        self._window_samples = 0

    def _stop_clock(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = perf_counter() - self._clock
        self.epoch_seconds += seconds
        self._start_clock()
        return seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.optimizers:
            self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the batch it is the next step's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _, _, samples = part_of_batch(trainer, batch_idx, extract_batch_size(batch))
        self.samples_seen += samples
        self._window_samples += samples
        self._loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        step = trainer.global_step
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and step % interval == 0:
            loss = self._check_finite(trainer)
            now = perf_counter()
            # Logged here and not by `self.log`, which writes after all callbacks: a checkpoint that is saved after
            # this step must find its events written.
            metrics = {
                "train/loss_step": loss,
                "train/learning_rate": self._lr,
                "train/samples_per_second": self._window_samples / (now - self._window_clock),
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step - 1)
            self._window_clock, self._window_samples = now, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_finite(trainer)
            self.train_seconds += self._stop_clock(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validation_seconds += self._stop_clock(pl_module)
            for name, value in epoch_metrics(trainer).items():
                if name.endswith("loss") and not math.isfinite(value):
                    raise TrainingFailed(diverged(trainer, name, value))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train_seconds += self._stop_clock(pl_module)
        self._check_finite(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning 2.6 logs the metrics of the last epoch just before this hook
        losses = (value for name, value in epoch_metrics(trainer).items() if name.endswith("loss"))
        sound = all(bool(torch.isfinite(parameter).all()) for parameter in pl_module.parameters())
        if not (sound and all(map(math.isfinite, losses))):
            raise TrainingFailed(diverged(trainer, "the loss or a weight", math.nan))

    def _check_finite(self, trainer: Trainer) -> float:
        """The latest step's loss over all processes, which thus find out together that it is not finite."""
        if not isinstance(self._loss, Tensor):
            return math.nan
        loss = float(trainer.strategy.reduce(self._loss.detach().clone(), reduce_op="mean"))
        loss *= trainer.accumulate_grad_batches  # by which Lightning divides it
        if not math.isfinite(loss):
            raise TrainingFailed(diverged(trainer, "train/loss_step", loss))
        return loss


def diverged(trainer: Trainer, name: str, value: float) -> str:
    return (
        f"training failed at step {trainer.global_step} of epoch {trainer.current_epoch}: {name} is {value};"
        " try a smaller learning rate (checkpoints written before are kept)"
    )


def epoch_metrics(trainer: Trainer) -> dict[str, float]:
    """The latest values of the metrics of whole epochs; on one name each, not also as `..._epoch`."""
    # as many digits as 32 bits hold
    found = {
        name: float(f"{value.item():.7g}") for name, value in trainer.callback_metrics.items() if value.numel() == 1
    }
    return {
        name: value
        for name, value in found.items()
        if not name.endswith("_step") and not (name.endswith("_epoch") and name.removesuffix("_epoch") in found)
    }


class EpochLines(Callback):
    """Prints a line after each epoch and each evaluation.

    Args:
        progress: the clock of the fit.
        best: keeps the best checkpoint; an epoch that gave it is marked.
    """

    def __init__(self, progress: Progress | None = None, best: ModelCheckpoint | None = None) -> None:
        self.progress = progress
        self.best = best
        self._best_path = ""
        self.samples = self._samples = 0  # of the evaluation: of all processes, once it has ended, and of this one
        self._ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._best_path = self.best.best_model_path if self.best else ""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True  # the module has its turn after the callbacks, and then the metrics are there

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_epoch(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_epoch(trainer, trainer.current_epoch - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = epoch_metrics(trainer)
        if trainer.state.fn != "fit":
            self._print_evaluation(trainer, "Validation set", metrics)
        elif not trainer.is_last_batch:
            values = {name: value for name, value in metrics.items() if not name.startswith("train/")}
            say(trainer, f"Epoch {trainer.current_epoch}, step {trainer.global_step}: {', '.join(words(values))}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_evaluation(trainer, "Test set", epoch_metrics(trainer))

    def _print_epoch(self, trainer: Trainer, epoch: int) -> None:
        if not self._ended or not self.progress:
            return
        self._ended = False
        metrics = epoch_metrics(trainer)
        values = {k: v for k, v in metrics.items() if not k.startswith("train/") or k == "train/loss"}
        path = self.best.best_model_path if self.best else ""
        mark = " (best)" if path != self._best_path else ""
        self._best_path = path
        say(trainer, f"Epoch {epoch}: {', '.join(words(values))}, {self.progress.epoch_seconds:.1f} s{mark}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples = 0

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        if trainer.state.fn != "fit":
            self._samples += extract_batch_size(batch)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _print_evaluation(self, trainer: Trainer, title: str, metrics: Mapping[str, float]) -> None:
        self.samples = sum(gather_all(self._samples))
        say(trainer, f"{title}: {', '.join(words(metrics, self.samples))}")


def words(metrics: Mapping[str, float], samples: int = 0) -> list[str]:
    """Metrics as they are printed: four digits, an accuracy in percent, and as counts where the samples are known."""
    texts = []
    for name, value in sorted(metrics.items(), key=lambda metric: order(metric[0])):
        stage, _, title = name.rpartition("/")
        if title != "accuracy":
            number = f"{value:.4f}"
        else:
            number, correct = f"{100 * value:.2f} %", value * samples
            if samples and abs(correct - round(correct)) < 1e-3 * samples**0.5:
                number = f"{round(correct)}/{samples} ({number})"
        title = "average loss" if samples and title == "loss" else title
        texts.append(f"{'' if samples else stage} {title} {number}".strip())
    return texts


def order(name: str) -> tuple[bool, bool, str]:
    """Training before validation, losses before the rest."""
    return not name.startswith("train/"), not name.endswith("loss"), name


def say(trainer: Trainer, line: str) -> None:
    """Print a line once; `Trainer.print` of Lightning 2.6 does so on each machine."""
    if trainer.is_global_zero:
        trainer.print(line)
