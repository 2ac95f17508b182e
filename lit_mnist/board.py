"""What TensorBoard shows beyond scalars: pictures, curves of each class, texts, the graph. No run is altered by it."""

import json
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from PIL import ImageDraw, ImageOps
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_summary.model_summary import ModelSummary
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.random import fork_rng
from torch.utils.tensorboard import SummaryWriter, summary
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from lit_mnist.exact.checkpoints import callback_of
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.ddp import gather_in_order
from lit_mnist.exact.loggers import TEXTS, RunLogger, write_events
from lit_mnist.exact.results import Results
from lit_mnist.network import Batch

SCALARS = "loss", "accuracy", "learning_rate", "samples_per_second"
LAYOUT = {  # of the tab "custom scalars": what belongs together on one chart
    "by step": {name: ["Multiline", [f"^(train|val)/{name}$"]] for name in SCALARS},
    "by epoch": {name: ["Multiline", [f"^by_epoch/.*/{name}$"]] for name in SCALARS[:2]},
    "each digit": {"validation accuracy": ["Multiline", ["val_class_accuracy/.*"]]},
}


class Board(Callback):
    """Writes what TensorBoard shows beyond the scalars.

    Args:
        every_n_epochs: how often pictures and curves of each class are written; 0 turns all of it off.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 1) -> None:
        self.every_n_epochs = every_n_epochs
        self._batches: list[tuple[Tensor, ...]] = []  # of an evaluation: images, what the network made of them, targets

    def writer(self, trainer: Trainer) -> SummaryWriter | None:
        ours = (logger.experiment for logger in trainer.loggers if isinstance(logger, RunLogger))
        return next(ours, None) if trainer.is_global_zero else None

    def due(self, trainer: Trainer) -> bool:
        """Return whether this epoch's pictures are to be written."""
        turn = trainer.current_epoch + 1 == trainer.max_epochs or trainer.current_epoch % self.every_n_epochs == 0
        return turn and trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (writer := self.writer(trainer)) and (results := callback_of(trainer, Results)):
            texts = {
                "command": "\n".join(f"python -m lit_mnist {line}" for line in results.history["commands"]),
                "conditions": json.dumps(conditions(pl_module.device), indent=4),
                "model": str(ModelSummary(pl_module, max_depth=-1)),
            }
            parts = [summary.custom_scalars(LAYOUT)]
            parts += [summary.text(title, indent(text, "    ")) for title, text in texts.items()]
            write_events(Path(writer.log_dir, TEXTS), *((0, part) for part in parts))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        writer = self.writer(trainer) if batch_idx == 0 and self.due(trainer) else None
        if writer and len(images := pictures_of(trainer, batch)):
            writer.add_image("train/images", grid(images[:32], columns=8, width=56), trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        interval, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        if interval and (step + 1) % interval == 0 and (writer := self.writer(trainer)):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            writer.add_scalar("norm/gradients", float(get_total_norm(gradients)), step)
            writer.add_scalar("norm/weights", float(get_total_norm(pl_module.parameters())), step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.due(trainer) and (writer := self.writer(trainer))):
            return
        step = trainer.global_step - 1
        for kernels in [p.detach() for p in pl_module.parameters() if p.ndim == 4][:1]:  # (out, in, K, K)
            levels = (kernels if kernels.shape[1] == 3 else kernels.flatten(0, 1)[:, None])[:1024]  # of 3 in colours
            levels = 127.5 + 127.5 * levels / levels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)  # 0 is grey
            writer.add_image("filters/first layer", grid(levels, columns=8, width=60), step)
        shape = getattr(trainer.datamodule, "image_shape", None)  # type: ignore[attr-defined]
        if trainer.current_epoch == 0 and shape:
            # a network that cannot be traced goes without its graph; attention takes another way with gradients
            with warnings.catch_warnings(), suppress(Exception), torch.no_grad(), fork_rng([]):
                warnings.simplefilter("ignore")  # torch 2.15 calls its own tracer deprecated
                # a copy: tracing must not touch the one in training
                network = deepcopy(getattr(pl_module, "network", pl_module)).cpu().eval()
                writer.add_graph(network, torch.zeros(1, *shape, dtype=torch.uint8))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        match args:  # outputs, batch, batch_idx, and which of several loaders; another experiment's may be anything
            case Tensor(ndim=2) as logits, (_, Tensor(ndim=1, dtype=torch.int64 | torch.int32) as classes, *_), _, *nth:
                if self.due(trainer) and trainer.loggers and not any(nth) and logits.is_floating_point():
                    images = pictures_of(trainer, args[1])
                    images = images if len(images) == len(logits) else logits.new_empty(0)
                    self._batches.append((images, logits, classes))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.due(trainer):  # on all processes, or on none
            return
        # copies: a part of a tensor is sent with all of it
        batches = gather_in_order([tuple(part.cpu().clone() for part in batch) for batch in self._batches])
        self._batches, writer = [], self.writer(trainer)
        if not writer or len({tuple(part.shape[1:] for part in batch) for batch in batches}) != 1:
            return
        images, logits, targets = map(torch.cat, zip(*batches, strict=True))
        classes = logits.shape[1]
        if classes == 1 or len(targets) != len(logits) or not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            return  # which are no logits
        probabilities, step = logits.softmax(1), trainer.global_step - 1
        counts = multiclass_confusion_matrix(logits, targets, classes)
        writer.add_image("answers/confusion matrix", confusion(counts), step)  # the first group of the tab is unfolded
        if len(images):
            writer.add_image("answers/most confident errors", wrong_digits(images, probabilities, targets), step)
        for digit, share in enumerate((counts.diag() / counts.sum(1).clamp(min=1)).tolist()):
            writer.add_scalar(f"val_class_accuracy/{digit}", share, step)
            writer.add_pr_curve(f"val_class/{digit}", targets == digit, probabilities[:, digit], step)


def pictures_of(trainer: Any, batch: Any) -> Tensor:
    """Return a batch's pictures (B, 1 or 3, H, W) on the scale 0..255, by the data's `plot`; (0,) if it gives none."""
    images = getattr(trainer.datamodule, "plot", lambda _: None)(batch)
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3):
        return images.detach()
    return torch.empty(0)


def grid(images: Tensor, columns: int, width: int, padding: int = 4) -> Tensor:
    """Put images (N, 1 or 3, H, W) on the scale 0..255 side by side, `width` pixels at most each: uint8 (3, H, W)."""
    longest = max(images.shape[2:])
    zoom = max(width // longest, min(1.0, 256 / longest))  # by whole pixels, or smaller
    images = F.interpolate(images.float().cpu().clamp(0, 255), scale_factor=zoom, mode="area")
    return make_grid(images, nrow=columns, padding=padding, pad_value=255).to(torch.uint8)


def confusion(counts: Tensor) -> Tensor:
    """Draw counts (C, C), truth downwards and answers to the right, uint8 (3, H, W): right ones blue, errors red."""
    classes, right = len(counts), torch.eye(len(counts), dtype=torch.bool)
    share, errors = counts / counts.sum(1, keepdim=True).clamp(min=1), counts.masked_fill(right, 0).log1p()
    pale = 255 - 140 * torch.where(right, share, errors / errors.max().clamp(min=1))
    colours = torch.stack((torch.where(right, pale, 255), pale, torch.where(right, 255, pale))).to(torch.uint8)
    cell = max(12, min(44, 2400 // classes))
    cells = to_pil_image(colours.repeat_interleave(cell, 1).repeat_interleave(cell, 2))
    draw = ImageDraw.Draw(picture := ImageOps.expand(cells, (cell, 2 * cell, 0, 0), "white"))
    draw.text((cell, cell // 2), "rows: truth, columns: read as", "black", anchor="lm", font_size=14)
    texts = [(row, column, int(counts[row, column])) for row, column in counts.nonzero().tolist()]
    for row, column, text in texts + [(-1, c, c) for c in range(classes)] + [(c, -1, c) for c in range(classes)]:
        draw.text(((column + 1.5) * cell, (row + 2.5) * cell), str(text), "black", anchor="mm", font_size=14)
    return pil_to_tensor(picture)


def wrong_digits(images: Tensor, probabilities: Tensor, targets: Tensor) -> Tensor:
    """Draw the 24 wrong answers that the network is surest of, with truth, answer and confidence: uint8 (3, H, W)."""
    confidence, answers = probabilities.max(1)
    wrong = (answers != targets).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:24]
    shown = images[wrong] if len(wrong) else torch.full_like(images[:1], 255)
    picture = to_pil_image(grid(shown, columns=6, width=112, padding=36))
    right, down = (picture.width - 36) // min(6, len(shown)), (picture.height - 36) // -(-len(shown) // 6)
    texts = [f"is {targets[n]}\nread as {answers[n]}, {confidence[n]:.1%}" for n in wrong] or ["no wrong answer"]
    for place, text in enumerate(texts):
        ImageDraw.Draw(picture).text((36 + place % 6 * right, place // 6 * down), text, "black", font_size=14)
    return pil_to_tensor(picture)
