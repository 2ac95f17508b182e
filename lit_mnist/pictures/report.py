"""Reads a user's own pictures, asks a network, and shows its answers: a table, a CSV and a contact sheet."""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lit_mnist.exact.console import UserError, shortened, shown
from lit_mnist.exact.runs import replaced
from lit_mnist.pictures.prepare import NO_PICTURE, find_one, grey_levels, split

CELL, MARGIN, COLUMNS = 112, 12, 4  # of the contact sheet, in pixels and pairs of pictures
SHEET_LIMIT = 400  # pictures on a sheet
UNSURE = 0.64  # see most_spread: of MNIST's test set 1 % lies above, and half of the letters (benchmarks/pictures.py)


class Picture(NamedTuple):
    """A network's answer for a file or for one of the digits in it, or what was left out."""

    row: dict[str, Any]  # of the CSV; of several `box` is the number in reading order, the others its place in the file
    digit: Tensor | None = None  # what the network sees, uint8 (1, 28, 28)
    probabilities: Sequence[float] = ()  # of the classes
    thumbnail: Image.Image = Image.new("L", (CELL, CELL), "white")  # what it was found in, grey


def find(names: Sequence[str], several: bool = False) -> dict[Path, str]:
    """Map files, and those below folders but for hidden ones and runs, to labels; UserError for a name without any."""
    # the digit, or the number of several, that a subfolder's or the file's name begins with
    label = re.compile(r"\d+" if several else r"\d(?!\d)")
    found: dict[Path, str] = {}
    for name in names:
        path = Path(name)
        files: dict[Path, tuple[str, ...]] = {path: (path.name,)} if path.is_file() else {}
        for file in sorted(path.rglob("*")) if name else []:
            parts = file.relative_to(path).parts
            if file.is_file() and not any(part.startswith((".", "lightning_logs")) for part in parts):
                files[file] = parts
        if not files:
            raise UserError(f"{shortened(name)!r} is neither a file nor a folder with files in it")
        for file, parts in files.items():
            found.setdefault(file, next((match[0] for part in parts if (match := label.match(part))), ""))
    return found


def read(network: nn.Module, file: Path | BinaryIO, several: bool = False, smoothing: float = 0) -> list[Picture]:
    """Answer the digits of one file, and say what was left out or why it has none; SMOOTHING is as in `most_spread`."""
    try:
        levels = grey_levels(file)
        found = split(levels) if several else [((0, 0, *levels.shape[::-1]), *find_one(levels))]
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
        p = classify(network, seen[None])[0].tolist() if seen is not None else []
        place = (number if p else "", *(round(scale * side) for side in box)) if several else ()
        row: dict[str, Any] = {"file": file, **dict(zip(("box", "x", "y", "width", "height"), place, strict=False))}
        row |= columns(p, smoothing) if p else {}
        pictures.append(Picture(row | {"problem": problem}, seen, p, thumbnail))
    return pictures


def answer(paths: Sequence[Path], several: bool, network: nn.Module, smoothing: float) -> list[Picture]:
    """Print and return a network's answers for files; raise UserError if none shows a digit."""
    tracked = track(paths, "reading pictures", disable=not sys.stdout.isatty())
    pictures = [picture for path in tracked for picture in read(network, path, several, smoothing)]
    longest = max((picture.row for picture in pictures), key=len)
    names = [name for name in longest if not name[1:].isdecimal()]  # without p0, p1, ...
    table = Table(*names, box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for picture in pictures:
        table.add_row(*(shortened(str(picture.row.get(name, "-"))) for name in names))
    # a pipe has no width, and would cut the lines
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    if not any(picture.probabilities for picture in pictures):
        raise UserError("none of the files shows a digit")
    return pictures


def score(pictures: Sequence[Picture], labels: dict[Path, str]) -> None:
    """Print the share of files that are answered as labelled, and of single digits which is answered for which."""
    from pandas import DataFrame, crosstab  # here, for predict does without it

    answers = dict.fromkeys(labels, "")
    for picture in pictures:
        answers[picture.row["file"]] += str(picture.row.get("digit", ""))
    table = DataFrame({"label": labels, "answer": answers})
    right = table["label"] == table["answer"]
    print(f"Accuracy: {right.mean():.1%} ({right.sum()} of {len(right)})")
    if not any("box" in picture.row for picture in pictures):
        print(crosstab(table["label"], table["answer"].replace("", "none")).to_string())


def write(pictures: Sequence[Picture], output: Path) -> None:
    """Write answers: OUTPUT is the CSV, the `.png` beside it the sheet."""
    write_csv(output, [picture.row for picture in pictures])
    drawn = [picture for picture in pictures if picture.row["problem"] != NO_PICTURE][:SHEET_LIMIT]
    with replaced(sheet := output.with_suffix(".png")) as partial:
        contact_sheet(drawn).save(partial, format="PNG")
    print(f"Probabilities: {shown(output)}\nContact sheet: {shown(sheet)} ({len(drawn)} of {len(pictures)})")


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


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of which the longest has all columns."""
    with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, max(rows, key=len))
        writer.writeheader()
        writer.writerows(rows)


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
