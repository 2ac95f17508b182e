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
UNSURE = 0.64  # see unsure: of MNIST's test set 1 % lies above, and half of the letters (benchmarks/pictures.py)


class Picture(NamedTuple):
    """A network's answer for a file, or for one of the digits in it."""

    file: Path | BinaryIO
    problem: str = ""  # why there is no answer, or may be a wrong one
    digit: Tensor | None = None  # what the network sees, uint8 (1, 28, 28)
    probabilities: Sequence[float] = ()  # of the classes
    thumbnail: Image.Image | None = None  # what it was found in, grey (CELL, CELL)
    place: tuple[Any, ...] = ()  # of several: number from 1 in reading order, and box in the file's own pixels
    doubtful: bool = False  # whether the probabilities are of an unsure answer


def find(names: Sequence[str]) -> list[Path]:
    """List files, and of folders those below them, but for hidden ones and runs; UserError for a name without any."""
    found: list[Path] = []
    for name in names:
        path = Path(name)
        inside = ((file, file.relative_to(path).parts) for file in path.rglob("*") if name and file.is_file())
        files = [file for file, parts in inside if not any(part.startswith((".", "lightning_logs")) for part in parts)]
        if not path.is_file() and not files:
            raise UserError(f"{shortened(name)!r} is neither a file nor a folder with files in it")
        found += [path] if path.is_file() else sorted(files)
    return found


def read(network: nn.Module, file: Path | BinaryIO, several: bool = False, smoothing: float = 0) -> list[Picture]:
    """Answer the digits of one file, and say what was left out or why it has none; SMOOTHING is as in `unsure`."""
    try:
        levels = grey_levels(file)
        found = split(levels) if several else [((0, 0, *levels.shape[::-1]), *find_one(levels))]
    except UserError as error:
        return [Picture(file, str(error))]
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
        pictures.append(Picture(file, problem, seen, p, thumbnail, place, bool(p) and unsure(p, smoothing)))
    return pictures


def answer(paths: Sequence[Path], several: bool, network: nn.Module, smoothing: float) -> list[Picture]:
    """Print and return a network's answers for files; raise UserError if none shows a digit."""
    tracked = track(paths, "reading pictures", disable=not sys.stdout.isatty())
    pictures = [picture for path in tracked for picture in read(network, path, several, smoothing)]
    rows = [row(picture) for picture in pictures]
    names = [name for name in max(rows, key=len) if not name[1:].isdecimal()]  # without p0, p1, ...
    table = Table(*names, box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for line in rows:
        table.add_row(*(shortened(str(line.get(name, "-"))) for name in names))
    # a pipe has no width, and would cut the lines
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    if not any(picture.probabilities for picture in pictures):
        raise UserError("none of the files shows a digit")
    return pictures


def labels_of(paths: Sequence[Path], names: Sequence[str], several: bool) -> list[str]:
    """Read each label, of SEVERAL digits a number, at the start of a subfolder's or the file's name, or UserError."""
    labels = []
    for path in paths:
        parts = next((path.relative_to(name).parts for name in names if path.is_relative_to(name)), ()) or [path.name]
        found = [match[0] for part in parts if (match := re.match(r"\d+" if several else r"\d(?!\d)", part))]
        if not found:
            raise UserError(f"--labels {path}: no digit begins its name or folder, as in 7_mine.png or 7/mine.png")
        labels.append(found[0])
    return labels


def score(pictures: Sequence[Picture], paths: Sequence[Path], labels: Sequence[str]) -> None:
    """Print the share of files that are answered as labelled, and of single digits which is answered for which."""
    found: dict[Any, str] = dict.fromkeys(paths, "")
    for picture in pictures:
        found[picture.file] += str(columns(picture.probabilities)["digit"]) if picture.probabilities else ""
    right = sum(found[path] == label for path, label in zip(paths, labels, strict=True))
    print(f"Accuracy: {right / len(paths):.1%} ({right} of {len(paths)})")
    if not any(picture.place for picture in pictures):
        from pandas import Series, crosstab  # here, for predict does without it

        answers = Series([found[path] or "none" for path in paths], name="answer")
        print(crosstab(Series(labels, name="label"), answers).to_string())


def write(pictures: Sequence[Picture], output: Path) -> None:
    """Write answers: OUTPUT is the CSV, the `.png` beside it the sheet."""
    write_csv(output, [row(picture) for picture in pictures])
    sheet, drawn = output.with_suffix(".png"), [picture for picture in pictures if picture.problem != NO_PICTURE]
    with replaced(sheet) as partial:
        contact_sheet(drawn[:SHEET_LIMIT]).save(partial, format="PNG")
    beyond = f", the first {SHEET_LIMIT} of them" if len(drawn) > SHEET_LIMIT else ""
    print(f"Probabilities: {shown(output)}\nContact sheet: {shown(sheet)}{beyond}")


@torch.inference_mode()
def classify(network: nn.Module, images: Tensor) -> Tensor:
    """Map raw images, uint8 (N, 1, 28, 28), to probabilities, float (N, C)."""
    return torch.cat([network(batch).softmax(dim=1) for batch in images.split(500)])  # larger ones wait for memory


def most_spread(classes: int, smoothing: float) -> float:
    """Return the sum of roots above which too many classes share what training with that SMOOTHING gives to one."""
    other = smoothing / classes
    return (1 - smoothing + other) ** 0.5 + (classes - 1) * other**0.5 + UNSURE


def unsure(probabilities: Sequence[float], smoothing: float = 0) -> bool:
    return sum(p**0.5 for p in probabilities) > most_spread(len(probabilities), smoothing)


def columns(probabilities: Sequence[float]) -> dict[str, Any]:
    """Return an answer's columns of a CSV: `digit,p0,p1,...`."""
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {"digit": best} | {f"p{label}": f"{p:.6f}" for label, p in enumerate(probabilities)}


def row(picture: Picture) -> dict[str, Any]:
    """Return a line of the CSV: `file,digit,confidence,unsure,p0,p1,...,problem`, with the box of one of several."""
    line = {"file": picture.file} | dict(zip(("box", "x", "y", "width", "height"), picture.place, strict=False))
    if p := picture.probabilities:
        line |= {"digit": "", "confidence": f"{max(p):.6f}", "unsure": "unsure" * picture.doubtful} | columns(p)
    return line | {"problem": picture.problem}


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
    for index, picture in enumerate(pictures):
        left, above = MARGIN + index % across * width, MARGIN + index // across * height
        answer, name = picture.problem, Path(str(picture.file)).name
        if picture.thumbnail:
            sheet.paste(picture.thumbnail, (left, above))
        if picture.digit is not None:
            seen = Image.fromarray(picture.digit[0].numpy())
            sheet.paste(seen.resize((CELL, CELL), Image.Resampling.NEAREST), (left + CELL, above))
            best = columns(picture.probabilities)["digit"]
            answer = f"{best} ({max(picture.probabilities):.1%}){' unsure' * picture.doubtful} {picture.problem}"
            name = f"{picture.place[0]} in {name}" if picture.place else name
        draw.rectangle((left - 1, above - 1, left + 2 * CELL, above + CELL), outline="#d0d0d0")
        draw.text((left, above + CELL + 6), f"{answer:.40}\n{name:.36}", "#202020", font)
    return sheet
