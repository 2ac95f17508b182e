"""What TensorBoard shows of digits beyond the scalars: pictures, curves of each class, texts, the graph.

Nothing here changes the training: what it draws from is computed anyway.
"""

from __future__ import annotations

import math
import shutil
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_summary.model_summary import ModelSummary
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.utils import make_grid

from lit_mnist.exact.ddp import gather_in_order
from lit_mnist.exact.loggers import RunLogger
from lit_mnist.module import Batch

# The tab "custom scalars": what belongs together on one chart.
LAYOUT = {
    "by step": {
        "loss": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "accuracy": ["Multiline", ["^train/accuracy$", "^val/accuracy$"]],
        "learning rate": ["Multiline", ["^train/learning_rate$"]],
        "samples per second": ["Multiline", ["^train/samples_per_second$"]],
    },
    "by epoch": {
        "loss": ["Multiline", ["^by_epoch/train/loss$", "^by_epoch/val/loss$"]],
        "accuracy": ["Multiline", ["^by_epoch/train/accuracy$", "^by_epoch/val/accuracy$"]],
    },
    "each digit": {"validation accuracy": ["Multiline", ["val_class_accuracy/.*"]]},
}
# The columns of the tab "hparams": each run's latest values of these scalars.
HPARAM_METRICS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "train/loss")


class Board:
    """What is written, and how often.

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

    def callbacks(self) -> list[Callback]:
        return [TrainingBoard(self), ValidationBoard(self), TestBoard(self)] if self.every_n_epochs else []

    def writer(self, trainer: Trainer) -> SummaryWriter | None:
        """Where to write, or None where nothing is to be written."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
        return loggers[0].experiment if loggers and trainer.is_global_zero else None

    def turn(self, trainer: Trainer) -> bool:
        """Whether it is this epoch's turn."""
        last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        due = last or trainer.current_epoch % self.every_n_epochs == 0
        return due and trainer.state.fn == "fit" and not trainer.sanity_checking

    def due(self, trainer: Trainer) -> SummaryWriter | None:
        return self.writer(trainer) if self.turn(trainer) else None


class TrainingBoard(Callback):
    """The augmented images, the norms of weights and gradients, filters, histograms, texts and the graph."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._norm: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.board.texts and (writer := self.board.writer(trainer)):
            writer.add_custom_scalars(LAYOUT)
            table = str(ModelSummary(pl_module, max_depth=-1))
            for title, text in {**self.board.texts, "model": table}.items():
                writer.add_text(title, "\n".join(f"    {line}" for line in text.splitlines()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0 and shows_pictures(batch) and (writer := self.board.due(trainer)):
            writer.add_image("train/images", grid(batch[0][:32], columns=8, zoom=2), trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._norm = None
        if is_logged(trainer.global_step + 1, trainer) and self.board.writer(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._norm is None or not is_logged(trainer.global_step, trainer):
            return
        if writer := self.board.writer(trainer):
            step = trainer.global_step - 1
            writer.add_scalar("norm/gradients", float(self._norm), step)
            writer.add_scalar("norm/weights", float(torch.nn.utils.get_total_norm(pl_module.parameters())), step)
            self._norm = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (writer := self.board.due(trainer)):
            return
        step, network = trainer.global_step - 1, network_of(pl_module)
        kernels = next((p for p in network.parameters() if p.ndim == 4), None)
        if kernels is not None:
            writer.add_image("filters/first layer", filters(kernels.detach()), step)
        if self.board.histograms:
            for name, parameter in network.named_parameters():
                writer.add_histogram(f"weights/{name}", parameter.detach(), step)
        if trainer.current_epoch == 0:
            # a network that cannot be traced goes without its graph; attention takes another way with gradients
            with warnings.catch_warnings(), suppress(Exception), torch.no_grad():
                warnings.simplefilter("ignore")  # torch 2.15 calls its own tracer deprecated
                network = deepcopy(network).cpu().eval()  # tracing must not touch the one in training
                writer.add_graph(network, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def shows_pictures(batch: Any) -> bool:
    """Whether a batch is images (B, 1, H, W) and their classes (B,): of another experiment it may be anything."""
    if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        return False
    return bool(batch[0].ndim == 4 and batch[0].shape[1] == 1)


def network_of(pl_module: LightningModule) -> torch.nn.Module:
    return getattr(pl_module, "network", pl_module)


def is_logged(step: int, trainer: Trainer) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every and step % every == 0)


class ValidationBoard(Callback):
    """The confusion matrix, the most confident errors, and accuracy and curve of each class."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._answers: list[tuple[Tensor, ...]] = []  # images, logits, targets of each batch

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        logits = isinstance(outputs, Tensor) and outputs.ndim == 2
        if self.board.turn(trainer) and trainer.loggers and logits and shows_pictures(batch):
            self._answers.append((batch[0], outputs, batch[1]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.board.turn(trainer):  # on all processes, or on none
            return
        answers, self._answers = all_answers(self._answers), []
        writer = self.board.due(trainer)
        if not (writer and answers):
            return
        images, logits, targets = answers
        if targets.ndim != 1 or int(targets.max()) >= logits.shape[1]:
            return  # of something else than these classes
        probabilities, step, classes = logits.softmax(1), trainer.global_step - 1, logits.shape[1]
        counts = multiclass_confusion_matrix(logits, targets, classes)
        matrix = confusion(counts, cell=max(12, min(44, 2400 // classes)))
        # the first group of the tab is unfolded
        writer.add_image("answers/confusion matrix", matrix, step, dataformats="HWC")
        wrong = wrong_digits(images, probabilities, targets)
        writer.add_image("answers/most confident errors", wrong, step, dataformats="HWC")
        for digit in range(classes):
            share = float(counts[digit, digit] / counts[digit].sum().clamp(min=1))
            writer.add_scalar(f"val_class_accuracy/{digit}", share, step)
            writer.add_pr_curve(f"val_class/{digit}", targets == digit, probabilities[:, digit], step)


class TestBoard(Callback):
    """The projector: each test image where the network sees it, by what its last layer is given."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._answers: list[tuple[Tensor, ...]] = []  # images, features, targets of each batch
        self._features: Tensor | None = None  # of the latest batch
        self._hook: RemovableHandle | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answers, self._features, self._hook = [], None, None
        if trainer.loggers:
            linear = [part for part in network_of(pl_module).modules() if isinstance(part, torch.nn.Linear)]
            if linear:
                self._hook = linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self._features = inputs[0].flatten(1)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        if self._features is not None and shows_pictures(batch) and len(self._features) == len(batch[0]):
            self._answers.append((batch[0], self._features, batch[1]))
        self._features = None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        answers = all_answers(self._answers)
        writer = self.board.writer(trainer)
        if not (writer and answers):
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


def all_answers(batches: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Those of all processes, in the order of the images; on the first of them alone."""
    # copies: a part of a tensor is sent with all of it
    answers = gather_in_order([tuple(part.cpu().clone() for part in batch) for batch in batches])
    return [torch.cat(parts) for parts in zip(*answers, strict=True)]


def grid(images: Tensor, columns: int, zoom: int = 1) -> Tensor:
    """Images (N, 1, H, W) on the scale 0..255 side by side, each pixel `zoom` wide, uint8 (3, H, W)."""
    images = images.detach().float().cpu().clamp(0, 255).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    return make_grid(images, nrow=columns, padding=4, pad_value=255).to(torch.uint8)


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
