"""predict: a CSV of probabilities, and of a user's own pictures a table and a contact sheet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from rich.table import Table
from torch import Tensor

from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.exact.checkpoints import callback_of
from lit_mnist.exact.console import print_table, shown
from lit_mnist.exact.ddp import joined
from lit_mnist.exact.runs import replaced
from lit_mnist.pictures.prepare import Picture, grey_levels, is_deep

CELL, MARGIN, COLUMNS = 112, 12, 4  # of the contact sheet, in pixels and pairs of pictures
SHEET_LIMIT = 400  # pictures on a sheet
BOX = ["box", "x", "y", "width", "height"]
INK, PAPER, FAINT, ALARM = "#202020", "#ffffff", "#767676", "#b3261e"


def predict(trainer: Trainer, checkpoint: Path | None, model: LightningModule, data: MNISTDataModule) -> None:
    """Write the answers for the test set, or for the pictures that the data was given.

    Raises:
        ValueError: there is no answer.
    """
    trainer.predict(model, datamodule=data, ckpt_path=checkpoint, weights_only=True, return_predictions=False)
    writer = callback_of(trainer, PredictionWriter)
    assert writer
    writer.join()
    if not trainer.is_global_zero:
        return
    if not data.images:
        writer.write_test_set()
    elif not writer.write_pictures(data.pictures):
        raise ValueError("data.images: none of the files shows a digit")


class PredictionWriter(BasePredictionWriter):
    """Collects the probabilities of all batches, and writes them when told that they are complete.

    Args:
        folder: where the files go; what is there under their names is replaced once the new one is complete.
        name: of the checkpoint, a part of theirs.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.name = name
        self.batches: list[Tensor] = []

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.batches.append(prediction.cpu())

    def join(self) -> None:
        """Bring the predictions of all processes together. All must call it; the first then writes."""
        self.batches = joined(self.batches)

    def write_test_set(self) -> None:
        """`index,digit,p0,p1,...` for each image of the test set, in its order."""
        if not self.batches:
            raise ValueError("trainer.limit_predict_batches leaves no image to predict")
        probabilities = torch.cat(self.batches)
        path = self.folder / f"predictions-{self.name}.csv"
        rows = ([index, int(row.argmax()), *percent(row)] for index, row in enumerate(probabilities))
        write_csv(path, ["index", "digit", *columns(probabilities)], rows)
        print(f"Predictions of {len(probabilities)} images: {shown(path)}")

    def write_pictures(self, pictures: Sequence[Picture]) -> int:
        """A table on the console, `file,digit,confidence,p0,p1,...,problem`, and a contact sheet.

        Where a file has several digits, `box,x,y,width,height` of each, upright, stand after `file`.

        Returns:
            How many pictures have an answer; with none, no file is written.

        Raises:
            ValueError: the trainer left pictures out.
        """
        answers = iter(torch.cat(self.batches) if self.batches else ())
        if sum(map(len, self.batches)) < sum(picture.digit is not None for picture in pictures):
            raise ValueError("trainer.limit_predict_batches and trainer.fast_dev_run leave pictures out; use neither")
        rows = [(picture, None if picture.digit is None else next(answers)) for picture in pictures]
        print_answers(rows)
        answered = sum(answer is not None for _, answer in rows)
        if not answered:
            return 0
        csv_path, sheet_path = (self.folder / f"pictures-{self.name}.{suffix}" for suffix in ("csv", "png"))
        names = columns(self.batches[0])
        boxes = BOX if any(picture.number for picture in pictures) else []
        header = ["file", *boxes, "digit", "confidence", *names, "problem"]
        write_csv(csv_path, header, (csv_row(row, names, boxes) for row in rows))
        with replaced(sheet_path) as partial:
            contact_sheet(rows[:SHEET_LIMIT]).save(partial, format="PNG")
        beyond = f", the first {SHEET_LIMIT} of them" if len(rows) > SHEET_LIMIT else ""
        print(f"Probabilities: {shown(csv_path)}\nContact sheet: {shown(sheet_path)}{beyond}")
        return answered


Row = tuple[Picture, Tensor | None]


def columns(probabilities: Tensor) -> list[str]:
    return [f"p{label}" for label in range(probabilities.shape[1])]


def percent(probabilities: Tensor) -> list[str]:
    return [f"{p:.6f}" for p in probabilities.tolist()]


def csv_row(row: Row, names: Sequence[str], boxes: Sequence[str]) -> list[Any]:
    picture, answer = row
    if answer is None:
        return [picture.path, *[""] * (len(boxes) + 2 + len(names)), picture.problem]
    box = [picture.number, *picture.box] if boxes else []
    return [picture.path, *box, int(answer.argmax()), f"{float(answer.max()):.6f}", *percent(answer), ""]


def print_answers(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    if split := any(picture.number for picture, _ in rows):
        table.add_column("box", justify="right")
        table.add_column("x, y, width, height")
    table.add_column("digit", justify="right")
    table.add_column("confidence", justify="right")
    table.add_column("")
    for picture, answer in rows:
        box = [str(picture.number), ", ".join(map(str, picture.box))] if split else []
        if answer is None:
            table.add_row(str(picture.path), *["-"] * (len(box) + 2), picture.problem)
        else:
            table.add_row(str(picture.path), *box, str(int(answer.argmax())), f"{float(answer.max()):.1%}", "")
    print_table(table)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Each picture, beside it what the network saw, under them the answer."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(12)
    width, height = 2 * CELL + 2 * MARGIN, CELL + 56
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, lines * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, answer) in enumerate(rows):
        left, above = MARGIN + index % columns * width, MARGIN + index // columns * height
        draw.rectangle((left - 1, above - 1, left + 2 * CELL, above + CELL), outline="#d0d0d0")
        name = picture.path.name if len(picture.path.name) < 34 else f"{picture.path.name[:30]}..."
        if picture.number:
            name = f"{picture.number}: {picture.box[:2]}, {name}"
        draw.text((left, above + CELL + 26), name, fill=FAINT, font=small)
        if answer is None or picture.digit is None:
            problem = picture.problem if len(picture.problem) < 36 else f"{picture.problem[:33]}..."
            draw.text((left, above + CELL + 6), problem, fill=ALARM, font=small)
            continue
        original = thumbnail(picture)
        sheet.paste(original, (left + (CELL - original.width) // 2, above + (CELL - original.height) // 2))
        seen = Image.fromarray(picture.digit[0].numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
        sheet.paste(seen, (left + CELL, above))
        draw.text((left, above + CELL + 2), f"{int(answer.argmax())}", fill=INK, font=font)
        draw.text((left + 20, above + CELL + 8), f"{float(answer.max()):.1%}", fill=FAINT, font=small)
    return sheet


@lru_cache(maxsize=1)  # a sheet of many digits is one file
def upright(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if is_deep(picture):
            picture = Image.fromarray((grey_levels(path) * 255).to(torch.uint8).numpy())
        return picture.convert("RGBA")


def thumbnail(shown: Picture) -> Image.Image:
    """A picture that was read before, or the part of it that is meant, in its colours, what is transparent on grey."""
    picture = upright(shown.path)
    if shown.number:
        x, y, width, height = shown.box
        margin = max(width, height) // 4
        picture = picture.crop((x - margin, y - margin, x + width + margin, y + height + margin))
    scale = min(CELL / side for side in picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    picture = picture.resize((size[0], size[1]), Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    background = Image.new("RGBA", picture.size, "#b0b0b0")
    return Image.alpha_composite(background, picture).convert("RGB")


def write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
