"""Reads a user's own pictures, asks a network, and draws a contact sheet of its answers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from lit_mnist.exact.console import UserError
from lit_mnist.pictures.prepare import find_one, grey_levels, split

CELL, MARGIN, COLUMNS = 112, 12, 4  # of the contact sheet, in pixels and pairs of pictures
UNSURE = 0.65  # see most_spread: of images held out, 1 % lie above in fast.yaml, else fewer (benchmarks/pictures.py)


class Picture(NamedTuple):
    """A network's answer for a file or for one of the digits in it, or what was left out."""

    row: dict[str, Any]  # of the CSV; of several `box` is the number in reading order, the others its place in the file
    digit: Tensor | None = None  # what the network sees, uint8 (1, 28, 28)
    probabilities: Sequence[float] = ()  # of the classes
    thumbnail: Image.Image = Image.new("L", (CELL, CELL), "white")  # what it was found in, grey


def read(network: nn.Module, file: Path | BinaryIO, several: bool = False, smoothing: float = 0) -> list[Picture]:
    """Answer the digits of one file, and say what was left out or why it has none; SMOOTHING is as in `most_spread`."""
    ask = partial(classify, network)
    try:
        levels = grey_levels(file)
        found = split(levels, ask) if several else [((0, 0, *levels.shape[::-1]), *find_one(levels))]
    except UserError as error:
        return [Picture({"file": file, "problem": str(error)})]
    with Image.open(file) as opened:
        scale = max(opened.size) / max(levels.shape)
    pictures = []
    for number, (box, seen, problem) in enumerate(found, 1):
        (x, y, width, height), margin = box, max(box[2:]) // 4
        part = levels[max(0, y - margin) : y + height + margin, max(0, x - margin) : x + width + margin]
        whole = Image.fromarray((part.clip(0, 1) * 255).astype(np.uint8))
        thumbnail = ImageOps.pad(whole, (CELL, CELL), Image.Resampling.BOX, "white")
        p = ask(seen[None])[0].tolist() if seen is not None else []
        place = (number if p else "", *(round(scale * side) for side in box)) if several else ()
        row: dict[str, Any] = {"file": file, **dict(zip(("box", "x", "y", "width", "height"), place, strict=False))}
        row |= columns(p, smoothing) if p else {}
        pictures.append(Picture(row | {"problem": problem}, seen, p, thumbnail))
    return pictures


@torch.inference_mode()
def classify(network: nn.Module, images: Tensor) -> Tensor:
    """Map raw images, uint8 (N, 1, 28, 28), to probabilities, float (N, C)."""
    return torch.cat([network(batch).softmax(dim=1) for batch in images.split(500)])  # larger ones wait for memory


def most_spread(classes: int, smoothing: float) -> float:
    """Return the sum of roots above which too many classes share what training with that SMOOTHING gives to one."""
    other = smoothing / classes
    return (1 - smoothing + other) ** 0.5 + (classes - 1) * other**0.5 + UNSURE


def columns(probabilities: Sequence[float], smoothing: float = 0) -> dict[str, Any]:
    """Return an answer's columns of a CSV: `digit,confidence,unsure,p0,p1,...`."""
    best, spread = max(probabilities), sum(p**0.5 for p in probabilities)
    unsure = "unsure" if spread > most_spread(len(probabilities), smoothing) else ""
    each = {f"p{label}": f"{p:.6f}" for label, p in enumerate(probabilities)}
    return {"digit": probabilities.index(best), "confidence": f"{best:.6f}", "unsure": unsure} | each


def contact_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """Draw each picture, beside it what the network saw, and below them the answer."""
    font, width, height = ImageFont.load_default(12), 2 * CELL + 2 * MARGIN, CELL + 56
    across = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (across * width + MARGIN, -(-len(pictures) // across) * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (row, digit, _, thumbnail) in enumerate(pictures):
        left, above = MARGIN + index % across * width, MARGIN + index // across * height
        answer, name = row["problem"], Path(str(row["file"])).name
        sheet.paste(thumbnail, (left, above))
        if digit is not None:
            seen = Image.fromarray(digit[0].numpy())
            sheet.paste(seen.resize((CELL, CELL), Image.Resampling.NEAREST), (left + CELL, above))
            answer = f"{row['digit']} ({float(row['confidence']):.1%}) {row['unsure']} {row['problem']}"
            name = f"{row['box']} in {name}" if "box" in row else name
        draw.rectangle((left - 1, above - 1, left + 2 * CELL, above + CELL), outline="#d0d0d0")
        draw.text((left, above + CELL + 6), f"{answer:.40}\n{name:.36}", "#202020", font)
    return sheet
