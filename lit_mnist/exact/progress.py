"""The timer of a run, the scalars of its steps, its lines on the console, and its stop when it diverges."""

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor

from .checkpoints import CheckpointKeeper, callback_of, diverged
from .ddp import gather_all, part_of_batch

print_once = rank_zero_only(Trainer.print)  # which by itself, in Lightning 2.6, prints on each machine


class Progress(Callback):
    """Times a run over all its parts, logs its steps, prints epochs and evaluations, and stops it where it diverges."""

    def __init__(self) -> None:
        self.train_seconds = self.validation_seconds = self._started = self._lr = 0.0
        self.epoch_seconds = 0.0  # of training and validation, in this process
        self.samples_seen = 0
        self.samples = 0  # of an evaluation: of this process, and once it has ended, of all
        self.loss: Tensor | None = None  # of the latest step, in this process, on its device
        self._ended = False  # an epoch, whose line is not printed yet
        self.validated = 0  # the step of this epoch's latest validation
        self.metrics: dict[str, float] = {}  # that the latest epoch computed

    def state_dict(self) -> dict[str, Any]:
        state = {name: vars(self)[name] for name in ("validated", "metrics", "validation_seconds", "samples_seen")}
        return state | {"train_seconds": self.train_seconds + (perf_counter() - self._started if self._started else 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.print_epoch(trainer)
        self.epoch_seconds, self.validated = 0.0, 0
        self._start_timer()

    def _start_timer(self, *_: Any) -> None:
        self._started = perf_counter()
        self._window = self._started, self.samples_seen  # when the latest scalars were logged

    on_train_start = _start_timer  # type: ignore[assignment]  # a run that is resumed within an epoch starts none

    def _stop_timer(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = perf_counter() - self._started
        self.epoch_seconds += seconds
        self._start_timer()
        return seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.optimizers:
            self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])  # after the batch it is the next step's

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        outputs, batch, batch_idx = args
        self.samples_seen += part_of_batch(trainer, batch_idx, extract_batch_size(batch))[2]
        self.loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and step % interval == 0:
            loss, now, (start, seen) = self._check_finite(trainer), perf_counter(), self._window
            # not by `self.log`, which writes after all callbacks, and so after a checkpoint
            metrics = {"train/samples_per_second": (self.samples_seen - seen) / (now - start)}
            # with manual optimization a module may return no loss
            metrics |= {"train/learning_rate": self._lr} | ({} if math.isnan(loss) else {"train/loss_step": loss})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step - 1)
            self._window = now, self.samples_seen

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.state.fn != "fit":
            self.samples += extract_batch_size(args[1])  # the batch

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.train_seconds += self._stop_timer(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.samples = sum(gather_all(self.samples))
            title = "Test set" if trainer.state.fn == "test" else "Validation set"
            print_once(trainer, f"{title}: {', '.join(words(epoch_metrics(trainer), self.samples))}")
        elif not trainer.sanity_checking:
            self.validated = trainer.global_step
            if not trainer.is_last_batch:
                values = {k: v for k, v in epoch_metrics(trainer).items() if not k.startswith("train/")}
                where = f"Epoch {trainer.current_epoch}, step {trainer.global_step}"
                print_once(trainer, f"{where}: {', '.join(words(values))}")
            self.validation_seconds += self._stop_timer(pl_module)
            for name, value in epoch_metrics(trainer).items():
                if name.endswith("loss") and not math.isfinite(value):
                    raise diverged(trainer, name, value)

    on_test_end = on_validation_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train_seconds += self._stop_timer(pl_module)
        self._check_finite(trainer)
        self._ended = True  # the module has its turn after the callbacks, and then the metrics are there

    def print_epoch(self, trainer: Trainer) -> None:
        """Print the line of the latest epoch, if it is not printed yet."""
        if self._ended:
            # without a validation Lightning 2.6 still has the values of the one before
            found, keeper = epoch_metrics(trainer), callback_of(trainer, CheckpointKeeper)
            self.metrics = {k: found[k] for k in found if self.validated or k.startswith("train/")}
            values = {k: v for k, v in self.metrics.items() if not k.startswith("train/") or k == "train/loss"}
            best = " (best)" if keeper and keeper.best_values.get("step") == self.validated else ""
            line = ", ".join([*words(values), f"{self.epoch_seconds:.1f} s{best}"])
            print_once(trainer, f"Epoch {trainer.current_epoch - 1}: {line}")
            self._ended = False

    def _check_finite(self, trainer: Trainer) -> float:
        """Return the latest step's loss over all processes, which thus find out together that it is not finite."""
        if not isinstance(self.loss, Tensor):
            return math.nan
        loss = float(trainer.strategy.reduce(self.loss.detach().clone(), reduce_op="mean"))
        loss *= trainer.accumulate_grad_batches  # by which Lightning divides it
        if not math.isfinite(loss):
            raise diverged(trainer, "train/loss_step", loss)
        return loss


def total_steps(trainer: Trainer) -> float:
    """Return the steps of a whole run: those before this epoch, which may have had other lengths, and those left."""
    # Lightning 2.6's `estimated_stepping_batches` multiplies this epoch's, and refuses an accumulation schedule
    most, epochs = math.inf if trainer.max_steps == -1 else trainer.max_steps, trainer.max_epochs or 0
    if epochs <= 0:
        return most
    left, limit = range(trainer.current_epoch, epochs), trainer.limit_train_batches
    schedule, count = callback_of(trainer, GradientAccumulationScheduler), trainer.accumulate_grad_batches
    count = schedule.get_accumulate_grad_batches(trainer.current_epoch) if schedule else count
    remaining = math.ceil(trainer.num_training_batches / count) * len(left)
    # a loader whose epochs differ says how long they are
    lengths: list[float] = getattr(trainer.train_dataloader, "epoch_lengths", lambda _: [])(left)
    if schedule or lengths:
        batches = [min(length, limit) if isinstance(limit, int) else int(length * limit) for length in lengths]
        counts = [schedule.get_accumulate_grad_batches(epoch) if schedule else count for epoch in left]
        pairs = zip(batches or [trainer.num_training_batches] * len(left), counts, strict=True)
        remaining = sum(math.ceil(number / accumulated) for number, accumulated in pairs)
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    done = math.ceil(ready / count) if trainer.is_last_batch else ready // count  # gradients may still accumulate
    return min(most, trainer.global_step - done + remaining)


def epoch_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the latest values of the metrics of whole epochs; under one name each, not also as `..._epoch`."""
    # as many digits as 32 bits hold
    found = {k: float(f"{value.item():.7g}") for k, value in trainer.callback_metrics.items() if value.numel() == 1}
    twice = {name for name in found if name.endswith("_epoch") and name.removesuffix("_epoch") in found}
    return {name: value for name, value in found.items() if not name.endswith("_step") and name not in twice}


def words(metrics: Mapping[str, float], samples: int = 0) -> list[str]:
    """Format metrics: four digits, an accuracy in percent, and as counts if the number of samples is known."""
    texts = []
    for name in sorted(metrics, key=lambda name: (not name.startswith("train/"), not name.endswith("loss"), name)):
        stage, _, title = name.rpartition("/")
        number = f"{metrics[name]:.4f}"
        if title == "accuracy":
            number, correct = f"{100 * metrics[name]:.2f} %", metrics[name] * samples
            if samples and abs(correct - round(correct)) < 1e-3 * samples**0.5:
                number = f"{round(correct)}/{samples} ({number})"
        title = "average loss" if samples and title == "loss" else title
        texts.append(f"{'' if samples else stage} {title} {number}".strip())
    return texts
