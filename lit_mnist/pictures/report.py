"""Asks a network for a user's own pictures, and shows its answers: a table, a CSV and a contact sheet."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lit_mnist.exact.console import print_table, shown
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import replaced
from lit_mnist.pictures.prepare import Picture, find, grey_levels, is_deep, load
from lit_mnist.pictures.segment import load_split

BATCH_SIZE = 500  # larger batches only wait longer for memory
CELL, MARGIN, COLUMNS = 112, 12, 4  # of the contact sheet, in pixels and pairs of pictures
SHEET_LIMIT = 400  # pictures on a sheet
INK, PAPER, FAINT, ALARM, BEHIND = "#202020", "#ffffff", "#767676", "#b3261e", "#b0b0b0"


def report(names: Sequence[str], split: bool, network: nn.Module, output: Path) -> None:
    """Read files and folders of them, with SPLIT for several digits in each; print and write the network's answers.

    Args:
        output: the CSV; the contact sheet is the `.png` beside it.

    Raises:
        UserError: there is no such file or folder, or no file shows a digit; then nothing is written.
    """
    paths = track(find(names), "reading pictures", disable=not sys.stdout.isatty())
    pictures = [picture for path in paths for picture in (load_split(path) if split else [load(path)])]
    answer(network, pictures)
    print_answers(pictures)
    if all(picture.digit is None for picture in pictures):
        raise UserError("none of the files shows a digit")
    write_csv(output, [row(picture) for picture in pictures])
    sheet = output.with_suffix(".png")
    with replaced(sheet) as partial:
        contact_sheet(pictures[:SHEET_LIMIT]).save(partial, format="PNG")
    beyond = f", the first {SHEET_LIMIT} of them" if len(pictures) > SHEET_LIMIT else ""
    print(f"Probabilities: {shown(output)}\nContact sheet: {shown(sheet)}{beyond}")


@torch.inference_mode()
def classify(network: nn.Module, images: Tensor) -> Tensor:
    """Map raw images, uint8 (N, 1, 28, 28), to probabilities, float (N, C)."""
    return torch.cat([network(batch).softmax(dim=1) for batch in images.split(BATCH_SIZE)])


def answer(network: nn.Module, pictures: Sequence[Picture]) -> None:
    """Fill in the probabilities of each picture that shows a digit."""
    digits = [picture.digit for picture in pictures if picture.digit is not None]
    probabilities = iter(classify(network, torch.stack(digits)).tolist() if digits else ())
    for picture in pictures:
        picture.probabilities = [] if picture.digit is None else next(probabilities)


def best(probabilities: Sequence[float]) -> int:
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def columns(probabilities: Sequence[float]) -> dict[str, str]:
    return {f"p{label}": f"{p:.6f}" for label, p in enumerate(probabilities)}


def row(picture: Picture) -> dict[str, Any]:
    """Return a line of the CSV: `file,digit,confidence,p0,p1,...,problem`, with the box of one of several digits."""
    line: dict[str, Any] = {"file": picture.file}
    if picture.number:
        line |= zip(("box", "x", "y", "width", "height"), (picture.number, *picture.box), strict=True)
    if p := picture.probabilities:
        line |= {"digit": best(p), "confidence": f"{max(p):.6f}", **columns(p)}
    return line | {"problem": picture.problem}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of which the longest has all columns."""
    with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, max(rows, key=len))
        writer.writeheader()
        writer.writerows(rows)


def print_answers(pictures: Sequence[Picture]) -> None:
    table = Table(box=None, pad_edge=False)
    split = any(picture.number for picture in pictures)
    table.add_column("file", overflow="fold")
    for name in (*(("box", "x, y, width, height") if split else ()), "digit", "confidence", ""):
        table.add_column(name, justify="left" if name in ("", "x, y, width, height") else "right")
    for picture in pictures:
        box = [str(picture.number), ", ".join(map(str, picture.box))] if split else []
        if p := picture.probabilities:
            table.add_row(str(picture.file), *box, str(best(p)), f"{max(p):.1%}", "")
        else:
            table.add_row(str(picture.file), *["-"] * (len(box) + 2), picture.problem)
    print_table(table)


def contact_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """Draw each picture, beside it what the network saw, and below them the answer."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(12)
    width, height = 2 * CELL + 2 * MARGIN, CELL + 56
    across = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (across * width + MARGIN, -(-len(pictures) // across) * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, above = MARGIN + index % across * width, MARGIN + index // across * height
        below = above + CELL
        draw.rectangle((left - 1, above - 1, left + 2 * CELL, below), outline="#d0d0d0")
        name = clipped(Path(str(picture.file)).name, 33)
        draw.text(
            (left, below + 26), f"{picture.number}: {picture.box[:2]}, {name}" if picture.number else name, FAINT, small
        )
        if picture.digit is None:
            draw.text((left, below + 6), clipped(picture.problem, 35), ALARM, small)
            continue
        original = thumbnail(picture)
        sheet.paste(original, (left + (CELL - original.width) // 2, above + (CELL - original.height) // 2))
        seen = Image.fromarray(picture.digit[0].numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
        sheet.paste(seen, (left + CELL, above))
        draw.text((left, below + 2), str(best(picture.probabilities)), INK, font)
        draw.text((left + 20, below + 8), f"{max(picture.probabilities):.1%}", FAINT, small)
    return sheet


def clipped(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def thumbnail(picture: Picture) -> Image.Image:
    """Reduce a picture, or the part of it that is meant, to a cell; what is transparent is grey."""
    whole = upright(picture.file)
    if picture.number:
        x, y, width, height = picture.box
        margin = max(width, height) // 4
        whole = whole.crop((x - margin, y - margin, x + width + margin, y + height + margin))
    method = Image.Resampling.BOX if max(whole.size) > CELL else Image.Resampling.NEAREST
    small = ImageOps.contain(whole, (CELL, CELL), method)
    return Image.alpha_composite(Image.new("RGBA", small.size, BEHIND), small).convert("RGB")


@lru_cache(maxsize=1)  # the digits of a sheet share one file
def upright(file: Any) -> Image.Image:
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
        if is_deep(picture):
            picture = Image.fromarray((grey_levels(file) * 255).astype("uint8"))
        return picture.convert("RGBA")
