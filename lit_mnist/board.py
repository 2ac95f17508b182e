"""What TensorBoard shows of digits beyond the scalars: pictures, curves of each class, texts, the graph.

Nothing here changes the training: what it draws from is computed anyway.
"""

import json
import warnings
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_summary.model_summary import ModelSummary
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter, summary
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from lit_mnist.exact.checkpoints import callback_of
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.ddp import gather_in_order
from lit_mnist.exact.loggers import TEXTS, RunLogger, tests_by_step, write_events
from lit_mnist.exact.results import Results
from lit_mnist.network import Batch

# The tab "custom scalars": what belongs together on one chart.
CHARTS = {
    "by step": {
        **{"loss": "^(train|val)/loss$", "accuracy": "^(train|val)/accuracy$"},
        **{"learning rate": "^train/learning_rate$", "samples per second": "^train/samples_per_second$"},
    },
    "by epoch": {"loss": "^by_epoch/.*/loss$", "accuracy": "^by_epoch/.*/accuracy$"},
    "each digit": {"validation accuracy": "val_class_accuracy/.*"},
}
LAYOUT = {group: {name: ["Multiline", [tags]] for name, tags in charts.items()} for group, charts in CHARTS.items()}


class Board(Callback):
    """Writes what TensorBoard shows beyond the scalars.

    Args:
        every_n_epochs: how often pictures and curves of each class are written; 0 turns all of it off.
        histograms: also of each layer's weights, as often.
    """

    def __init__(self, every_n_epochs: int = 1, histograms: bool = False) -> None:
        if every_n_epochs < 0:
            raise ValueError(f"board.every_n_epochs must be an integer from 0, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self.histograms = histograms
        self._batches: list[tuple[Tensor, ...]] = []  # of an evaluation: images, what the network made of them, targets
        self._features: Tensor | None = None  # that the last layer was given for the latest batch

    def callbacks(self) -> list[Callback]:
        return [self] if self.every_n_epochs else []

    def writer(self, trainer: Trainer) -> SummaryWriter | None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
        return loggers[0].experiment if loggers and trainer.is_global_zero else None

    def due(self, trainer: Trainer) -> bool:
        """Return whether this epoch's pictures are to be written."""
        turn = trainer.current_epoch + 1 == trainer.max_epochs or trainer.current_epoch % self.every_n_epochs == 0
        return turn and trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (writer := self.writer(trainer)) and (results := callback_of(trainer, Results)):
            texts = {
                "command": "\n".join(f"python -m lit_mnist {line}" for line in results.state_dict()["commands"]),
                "conditions": json.dumps(conditions(pl_module.device), indent=4),
                "model": str(ModelSummary(pl_module, max_depth=-1)),
            }
            parts = [summary.custom_scalars(LAYOUT)]
            parts += [summary.text(title, indent(text, "    ")) for title, text in texts.items()]
            write_events(Path(writer.log_dir, TEXTS), *((0, part) for part in parts))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0 and self.due(trainer) and shows_pictures(batch) and (writer := self.writer(trainer)):
            writer.add_image("train/images", grid(batch[0][:32], columns=8, zoom=2), trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        interval, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        if interval and (step + 1) % interval == 0 and (writer := self.writer(trainer)):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            writer.add_scalar("norm/gradients", float(get_total_norm(gradients)), step)
            writer.add_scalar("norm/weights", float(get_total_norm(pl_module.parameters())), step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.due(trainer) and (writer := self.writer(trainer))):
            return
        step, network = trainer.global_step - 1, getattr(pl_module, "network", pl_module)
        for kernels in [p.detach() for p in network.parameters() if p.ndim == 4][:1]:  # (out, in, K, K)
            levels = kernels.flatten(0, 1)[:, None]
            levels = 127.5 + 127.5 * levels / levels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)  # 0 is grey
            writer.add_image("filters/first layer", grid(levels, columns=8, zoom=12), step)
        for name, parameter in network.named_parameters() if self.histograms else ():
            writer.add_histogram(f"weights/{name}", parameter.detach(), step)
        if trainer.current_epoch == 0:
            # a network that cannot be traced goes without its graph; attention takes another way with gradients
            with warnings.catch_warnings(), suppress(Exception), torch.no_grad():
                warnings.simplefilter("ignore")  # torch 2.15 calls its own tracer deprecated
                network = deepcopy(network).cpu().eval()  # tracing must not touch the one in training
                writer.add_graph(network, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        outputs, batch = args[:2]
        logits = isinstance(outputs, Tensor) and outputs.ndim == 2
        if logits and self.due(trainer) and trainer.loggers and shows_pictures(batch):
            self._batches.append((batch[0], outputs, batch[1]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.due(trainer):  # on all processes, or on none
            return
        answers, writer = self._gather(), self.writer(trainer)
        if not (writer and answers) or int(answers[2].max()) >= answers[1].shape[1]:  # which are no logits
            return
        images, logits, targets = answers
        probabilities, step, classes = logits.softmax(1), trainer.global_step - 1, logits.shape[1]
        counts = multiclass_confusion_matrix(logits, targets, classes)
        writer.add_image("answers/confusion matrix", confusion(counts), step)  # the first group of the tab is unfolded
        writer.add_image("answers/most confident errors", wrong_digits(images, probabilities, targets), step)
        for digit, share in enumerate((counts.diag() / counts.sum(1).clamp(min=1)).tolist()):
            writer.add_scalar(f"val_class_accuracy/{digit}", share, step)
            writer.add_pr_curve(f"val_class/{digit}", targets == digit, probabilities[:, digit], step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        linear = [part for part in pl_module.modules() if isinstance(part, torch.nn.Linear)]
        self._hooks = [layer.register_forward_pre_hook(self._keep) for layer in linear[-1:]]

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self._features = inputs[0].flatten(1)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        features, batch = self._features, args[1]
        if features is not None and shows_pictures(batch) and len(features) == len(batch[0]):
            self._batches.append((batch[0], features, batch[1]))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        results: Any = callback_of(trainer, Results)
        answers, folder, step = self._gather(), results.run.folder, results.run.loaded.get("global_step")
        # unless an earlier test has done it
        if answers and folder and step in tests_by_step(folder) and not (folder / f"{step:05d}" / "test").exists():
            images, features, targets = answers
            with SummaryWriter(folder, filename_suffix=".empty") as writer:
                writer.add_embedding(features, [str(int(target)) for target in targets], images / 255, step, "test")
            for path in folder.glob("*.empty"):
                path.unlink()

    def _gather(self) -> list[Tensor]:
        """Return what was kept of all batches on all processes, in the order of the images; on the first one alone."""
        # copies: a part of a tensor is sent with all of it
        batches = gather_in_order([tuple(part.cpu().clone() for part in batch) for batch in self._batches])
        self._batches = []
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def shows_pictures(batch: Any) -> bool:
    """Return whether a batch is images (B, 1, H, W) and their classes (B,): another experiment's may be anything."""
    shapes = [part.shape for part in batch if isinstance(part, Tensor)] if isinstance(batch, (list, tuple)) else []
    return [len(shape) for shape in shapes] == [4, 1] and shapes[0][1] == 1


def grid(images: Tensor, columns: int, zoom: int, padding: int = 4) -> Tensor:
    """Put images (N, 1, H, W) on the scale 0..255 side by side, each pixel `zoom` wide: uint8 (3, H, W)."""
    images = images.detach().float().cpu().clamp(0, 255).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
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
    picture = Image.new("RGB", (924, 36), "white")
    if len(wrong):
        picture = to_pil_image(grid(images[wrong], columns=6, zoom=4, padding=36))
    texts = [f"is {targets[n]}\nread as {answers[n]}, {confidence[n]:.1%}" for n in wrong] or ["no wrong answer"]
    for place, text in enumerate(texts):
        ImageDraw.Draw(picture).text((36 + place % 6 * 148, place // 6 * 148), text, "black", font_size=14)
    return pil_to_tensor(picture)
