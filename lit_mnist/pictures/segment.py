"""Finds several digits in one picture: a number, a row of cells, a sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from lit_mnist.exact.errors import UserError
from lit_mnist.pictures.prepare import (
    FINE_SIZE,
    Box,
    Picture,
    Pixels,
    grey_levels,
    in_form,
    ink_of,
    inked,
    ones,
    shrunk,
    unruled,
    without_boxes,
)

MAX_PARTS = 400  # of a digit's size
Part = tuple[Box, list[int]]  # what hangs together, by the numbers of its components


def load_split(file: Path) -> list[Picture]:
    """Read one file that shows several digits; if there are none, the one result says why."""
    try:
        levels = grey_levels(file)
        with Image.open(file) as opened:
            scale = max(opened.size) / max(levels.shape)
        return [Picture(file, digit, "", n, scaled(box, scale)) for n, (box, digit) in enumerate(split(levels), 1)]
    except UserError as error:
        return [Picture(file, problem=str(error))]


def split(levels: Pixels) -> list[tuple[Box, Tensor]]:
    """Find the digits of one picture, line by line: each with its box, in MNIST's form, uint8 (1, 28, 28).

    Raises:
        UserError: nothing stands out from the background, or too much does.
    """
    pixels = shrunk(levels, FINE_SIZE)
    ink = unruled(ink_of(pixels))
    side = 1 + max(ink.shape) // 500
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.dilate(inked(ink), ones(side, side)))
    heights, longer = stats[1:, cv2.CC_STAT_HEIGHT], stats[1:, 2:4].max(1)
    large = (heights >= 0.1 * heights.max(initial=0)) & (longer >= max(ink.shape) / 150)  # the others are specks
    parts = (1 + np.flatnonzero(large)).tolist()
    if len(parts) > MAX_PARTS:
        raise UserError(f"{len(parts)} parts of a digit's size, at most {MAX_PARTS} are read")
    if not parts:
        raise UserError("nothing stands out from the background")
    parts = sorted(parts, key=lambda part: -int(stats[part, cv2.CC_STAT_AREA]))
    parts = [part for part in parts if not at_border(stats[part], ink.shape)] or parts
    digits = without_boxes(stats, parts)
    tallest = max(int(stats[part, 3]) for part in digits)
    height = float(np.median([stats[part, 3] for part in digits if stats[part, 3] >= 0.4 * tallest]))
    found = united([(bounds(stats[[part]]), [part]) for part in digits], 1.6 * height)
    read = []
    for (x, y, across, down), group in in_lines([item for item in found if item[0][3] >= 0.4 * height]):
        rows, columns = slice(y, y + down), slice(x, x + across)
        own = np.isin(labels[rows, columns], group)
        box = scaled((x, y, across, down), max(levels.shape) / max(pixels.shape))
        read.append((box, in_form(ink[rows, columns] * own)))
    return read


def at_border(part: Any, shape: tuple[int, ...]) -> bool:
    x, y, width, height, _ = part
    return bool(min(x, y) <= 1 or x + width >= shape[1] - 1 or y + height >= shape[0] - 1)


def united(parts: list[Part], tallest: float) -> list[Part]:
    """Join the parts that lie one above the other and together are no taller than a digit: the two strokes of a 5."""
    digits: list[Part] = []
    for box, own in parts:
        for other in digits:
            joined = bounds(np.array([box, other[0]]))
            if box[2] + other[0][2] - joined[2] >= 0.3 * min(box[2], other[0][2]) and joined[3] <= tallest:
                digits.remove(other)
                box, own = joined, own + other[1]
                break
        digits.append((box, own))
    return digits


def scaled(box: Box, scale: float) -> Box:
    x, y, width, height = (round(scale * side) for side in box)
    return x, y, width, height


def bounds(boxes: Any) -> Box:
    """Return the box around several."""
    x, y = boxes[:, :2].min(0).tolist()
    right, below = (boxes[:, :2] + boxes[:, 2:4]).max(0).tolist()
    return x, y, right - x, below - y


def in_lines(boxes: list[Part]) -> list[Part]:
    """Sort into reading order: a line has its middles at the height of its highest box, and runs left to right."""
    ordered = []
    while boxes:
        _, y, _, height = min((box for box, _ in boxes), key=lambda box: box[1] + box[3] / 2)
        line = [item for item in boxes if y <= item[0][1] + item[0][3] / 2 <= y + height]
        ordered += sorted(line)
        boxes = [item for item in boxes if item not in line]
    return ordered
