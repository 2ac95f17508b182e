"""The events of a run, as TensorBoard shows them."""

from __future__ import annotations

import math
import shutil
import warnings
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.model_summary.model_summary import ModelSummary
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lit_mnist.module import LitMNIST
from lit_mnist.processes import joined
from lit_mnist.runs import RunError, claim_version

PER_EPOCH = tuple(f"{stage}/{metric}" for stage in ("train", "val") for metric in ("loss", "accuracy"))

# The tab "custom scalars": what belongs together on one chart.
LAYOUT = {
    "by step": {
        "loss": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "accuracy": ["Multiline", ["^train/accuracy$", "^val/accuracy$"]],
        "learning rate": ["Multiline", ["^train/learning_rate$"]],
        "images per second": ["Multiline", ["^train/images_per_second$"]],
    },
    "by epoch": {
        "loss": ["Multiline", ["^by_epoch/train/loss$", "^by_epoch/val/loss$"]],
        "accuracy": ["Multiline", ["^by_epoch/train/accuracy$", "^by_epoch/val/accuracy$"]],
    },
    "each digit": {"validation accuracy": ["Multiline", ["val_class_accuracy/.*"]]},
}
# The columns of the tab "hparams": each run's latest values of these scalars.
HPARAM_METRICS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "train/loss")

TEST_SUFFIX = ".test"  # of the event files that `test` writes beside those of the training


def is_first() -> bool:
    """Whether this is the first process; right once there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


class RunLogger(TensorBoardLogger):
    """TensorBoard's events of one run, written to a folder that no other process has.

    Each metric of an epoch is there twice: against the step, and as `by_epoch/...` against the epoch.
    """

    settings: Mapping[str, Any] = {}  # of the trainer, for the tab of the hyperparameters
    opened = False  # until then, nothing is written
    claimed: tuple[Path, Path] | None = None  # the folder made for a new run, and the last one that was there before
    tested_step: int | None = None  # of the checkpoint that `test` scores; Lightning 2.6 would log its metrics at 0

    @property
    def version(self) -> int | str:
        # TensorBoardLogger 2.6 looks for the highest number and takes the next, so programs that start together
        # share a folder; here the folder is made, which only one of them can.
        if self._version is None and is_first():  # the others are told by Lightning
            try:
                runs = Path(self.root_dir).absolute()
                existed = next(folder for folder in (runs, *runs.parents) if folder.exists())
                self._version = claim_version(runs)
                self.claimed = runs / f"version_{self._version}", existed
            except OSError as error:
                raise RunError(
                    f"trainer.default_root_dir: no run can be written to {self.root_dir} ({error.strerror})"
                ) from error
        return 0 if self._version is None else self._version

    @property
    def experiment(self) -> SummaryWriter:
        # Lightning 2.6 asks whether there is one before a checkpoint is restored, and TensorBoardLogger makes one
        if is_first() and not self.opened:
            raise AttributeError("nothing can be logged before on_train_start: until then a run is not touched")
        return super().experiment

    def open(self) -> None:
        """Begin to write: once a run is restored, or has a result."""
        if self.opened or not is_first():
            return
        self.opened = True
        super().log_hyperparams(self.hparams)
        # TensorBoardLogger 2.6 either invents a metric of -1, which then is what the tab shows, or writes nothing
        every = {**self.settings, **self.hparams}
        plain = {key: value for key, value in every.items() if type(value) in (int, float, str, bool)}
        if self.settings:
            experiment, start, _ = hparams(plain, dict.fromkeys(HPARAM_METRICS, 0.0))
            for summary in (experiment, start):
                self.experiment._get_file_writer().add_summary(summary)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.tested_step is not None:
            self.open()
            step = self.tested_step
        super().log_metrics(metrics, step)
        if "epoch" in metrics:
            by_epoch = {f"by_epoch/{name}": metrics[name] for name in PER_EPOCH if name in metrics}
            super().log_metrics(by_epoch, int(metrics["epoch"]))

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        if self.opened:
            super().log_hyperparams(params, metrics, step)
        else:
            self.hparams.update(params if isinstance(params, dict) else vars(params))

    def save(self) -> None:
        if self.opened:
            super().save()


class Board(Callback):
    """What TensorBoard shows beyond the scalars of training: pictures, curves of each class, texts, the graph.

    Nothing here changes the training: what it draws from is computed anyway, or a function of (seed, epoch, step).

    Args:
        every_n_epochs: how often pictures and curves of each class are written; 0 turns all of it off.
        histograms: also of each layer's weights, as often.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, every_n_epochs: int = 1, histograms: bool = False) -> None:
        if every_n_epochs < 0:
            raise ValueError(f"board.every_n_epochs must be an integer from 0, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self.histograms = histograms
        self.texts: dict[str, str] = {}  # of a new run, by title, in Markdown
        self._norm: Tensor | None = None
        self._answers: list[tuple[Tensor, Tensor, Tensor]] = []  # images, logits or features, targets of each batch
        self._features: Tensor | None = None  # of the latest test batch
        self._hook: RemovableHandle | None = None

    def _is_on(self, trainer: Trainer) -> bool:
        return bool(self.every_n_epochs and any(isinstance(logger, RunLogger) for logger in trainer.loggers))

    def _writer(self, trainer: Trainer) -> SummaryWriter | None:
        """Where to write, or None where nothing is to be written."""
        if not (self._is_on(trainer) and trainer.is_global_zero):
            return None
        loggers = [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
        return loggers[0].experiment

    def _turn(self, trainer: Trainer) -> bool:
        """Whether it is this epoch's turn."""
        last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        return not trainer.sanity_checking and (last or trainer.current_epoch % max(1, self.every_n_epochs) == 0)

    def _due(self, trainer: Trainer) -> SummaryWriter | None:
        return self._writer(trainer) if self._turn(trainer) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (writer := self._writer(trainer)) and self.texts:
            writer.add_custom_scalars(LAYOUT)
            table = str(ModelSummary(pl_module, max_depth=-1))
            for title, text in {**self.texts, "model": "\n".join(f"    {line}" for line in table.splitlines())}.items():
                writer.add_text(title, text)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and (writer := self._due(trainer)):
            assert isinstance(pl_module, LitMNIST)
            augmented = pl_module.augment(batch[0], batch_idx)[:32]  # once more: the same as the step will make
            writer.add_image("train/images", grid(augmented, columns=8, zoom=2), trainer.global_step, dataformats="HW")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._norm = None
        if self._writer(trainer) and self._is_logged(trainer.global_step + 1, trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (
            self._norm is not None
            and self._is_logged(trainer.global_step, trainer)
            and (writer := self._writer(trainer))
        ):
            step = trainer.global_step - 1
            writer.add_scalar("norm/gradients", float(self._norm), step)
            writer.add_scalar("norm/weights", float(torch.nn.utils.get_total_norm(pl_module.parameters())), step)
            self._norm = None

    @staticmethod
    def _is_logged(step: int, trainer: Trainer) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every and step % every == 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (writer := self._due(trainer)):
            return
        assert isinstance(pl_module, LitMNIST)
        step = trainer.global_step - 1
        kernels = next((p for p in pl_module.network.parameters() if p.ndim == 4), None)
        if kernels is not None:
            writer.add_image("filters/first layer", filters(kernels.detach()), step, dataformats="HW")
        if self.histograms:
            for name, parameter in pl_module.network.named_parameters():
                writer.add_histogram(f"weights/{name}", parameter.detach(), step)
        if trainer.current_epoch == 0:
            network = deepcopy(pl_module.network).cpu().eval()  # a copy: tracing it must not touch the one in training
            # a network that cannot be traced goes without its graph; attention takes another way with gradients
            with warnings.catch_warnings(), suppress(Exception), torch.no_grad():
                warnings.simplefilter("ignore")  # torch 2.15 calls its own tracer deprecated
                writer.add_graph(network, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and self._is_on(trainer) and self._turn(trainer):
            self._answers.append((batch[0], outputs["logits"], batch[1]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._answers:  # on all processes, or on none
            return
        answers = self._all_answers()
        if not (writer := self._due(trainer)):
            return
        images, logits, targets = answers
        probabilities, step = logits.softmax(1), trainer.global_step - 1
        classes = logits.shape[1]
        counts = torch.bincount(targets * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)
        writer.add_image(
            "val/confusion", confusion(counts, cell=max(12, min(44, 2400 // classes))), step, dataformats="HWC"
        )
        writer.add_image("val/most wrong", wrong_digits(images, probabilities, targets), step, dataformats="HWC")
        for digit in range(classes):
            share = float(counts[digit, digit] / counts[digit].sum().clamp(min=1))
            writer.add_scalar(f"val_class_accuracy/{digit}", share, step)
            writer.add_pr_curve(f"val_class/{digit}", targets == digit, probabilities[:, digit], step)

    def _all_answers(self) -> list[Tensor]:
        """Those of all processes, in the order of the images; on the first of them alone."""
        # copies: a part of a tensor is sent with all of it
        answers, self._answers = [tuple(part.cpu().clone() for part in batch) for batch in self._answers], []
        return [torch.cat(parts) for parts in zip(*joined(answers), strict=True)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answers, self._features, self._hook = [], None, None
        if self._is_on(trainer):
            assert isinstance(pl_module, LitMNIST)
            linear = [module for module in pl_module.network.modules() if isinstance(module, torch.nn.Linear)]
            if linear:
                self._hook = linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self._features = inputs[0].flatten(1)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._features is not None and len(self._features) == len(batch[0]):
            self._answers.append((batch[0], self._features, batch[1]))
        self._features = None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        if not self._answers:
            return
        answers = self._all_answers()
        if not (writer := self._writer(trainer)):
            return
        images, features, targets = answers
        step = getattr(trainer.loggers[0], "tested_step", None) or 0
        folder = Path(writer.log_dir) / f"{step:05d}"
        if (folder / "test").exists():  # from an earlier test of this checkpoint
            return
        labels = [str(int(target)) for target in targets]
        try:
            writer.add_embedding(features, labels, images / 255, step, "test")
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # half of it would be taken for the whole
            raise


def grid(images: Tensor, columns: int, zoom: int = 1) -> Tensor:
    """Images (N, 1, H, W) on the scale 0..255 side by side, each pixel `zoom` wide, uint8 (rows, columns of pixels)."""
    gap = 4
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images.detach().float().cpu().clamp(0, 255), (0, gap, 0, gap), value=255)
    padded = torch.cat([padded, torch.full((-len(images) % columns, 1, height + gap, width + gap), 255.0)])
    lines = padded[:, 0].view(-1, columns, height + gap, width + gap)
    return lines.permute(0, 2, 1, 3).reshape(-1, columns * (width + gap)).to(torch.uint8)


def filters(kernels: Tensor) -> Tensor:
    """Kernels (out, in, K, K), each stretched to black..white, grey for zero."""
    kernels = kernels.flatten(0, 1)[:, None].cpu()
    levels = 127.5 + 127.5 * kernels / kernels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return grid(levels, columns=8, zoom=12)


def confusion(counts: Tensor, cell: int = 44) -> np.ndarray[Any, Any]:
    """Counts (C, C), truth downwards and answers to the right, as a picture with numbers."""
    font, bold = ImageFont.load_default(14), ImageFont.load_default(18)
    side = (len(counts) + 1) * cell + 30
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    middle = 30 + cell + len(counts) * cell // 2
    draw.text((middle, 14), "read as", fill="black", font=font, anchor="mm")
    truth = Image.new("RGB", (60, 24), "white")
    ImageDraw.Draw(truth).text((30, 12), "truth", fill="black", font=font, anchor="mm")
    picture.paste(truth.rotate(90, expand=True), (2, middle - 30))
    most_wrong = int((counts - counts.diag().diag()).max())
    for digit in range(len(counts)):
        place = 30 + cell * (digit + 1) + cell // 2
        draw.text((place, 30 + cell // 2), str(digit), fill="black", font=bold, anchor="mm")
        draw.text((30 + cell // 2, place), str(digit), fill="black", font=bold, anchor="mm")
    for truth_digit, row in enumerate(counts.tolist()):
        for answer, count in enumerate(row):
            left, above = 30 + cell * (answer + 1), 30 + cell * (truth_digit + 1)
            right = truth_digit == answer
            depth = count / max(1, sum(row)) if right else math.log1p(count) / math.log1p(max(1, most_wrong))
            pale = round(255 - (150 if right else 120) * depth)
            colour = (pale, pale, 255) if right else (255, pale, pale)
            draw.rectangle((left, above, left + cell - 2, above + cell - 2), fill=colour)
            if count:
                draw.text((left + cell // 2, above + cell // 2), str(count), fill="black", font=font, anchor="mm")
    return np.asarray(picture)


def wrong_digits(images: Tensor, probabilities: Tensor, targets: Tensor, limit: int = 24) -> np.ndarray[Any, Any]:
    """The wrong answers that the network is surest of, each with its truth, the answer and its confidence."""
    confidence, answers = probabilities.max(1)
    wrong = (answers != targets).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:limit]
    side, columns = 112, 6
    lines = max(1, -(-len(wrong) // columns))
    picture = Image.new("RGB", (columns * (side + 8) + 8, lines * (side + 44) + 8), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    if not len(wrong):
        draw.text((12, 12), "no wrong answer", fill="black", font=font)
    for place, index in enumerate(wrong.tolist()):
        left, above = 8 + place % columns * (side + 8), 8 + place // columns * (side + 44)
        picture.paste(Image.fromarray(images[index, 0].numpy()).resize((side, side)), (left, above))
        draw.text((left, above + side + 1), f"is {int(targets[index])}", fill="black", font=font)
        answer = f"read as {int(answers[index])}, {float(confidence[index]):.1%}"
        draw.text((left, above + side + 18), answer, fill="#b3261e", font=font)
    return np.asarray(picture)
