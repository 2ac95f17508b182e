"""Finds several digits in one picture: a number, a row of cells, a sheet."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from torch import Tensor

from lit_mnist.exact.errors import UserError
from lit_mnist.pictures import prepare
from lit_mnist.pictures.prepare import Pixels

MAX_PARTS = 400  # of a digit's size
Box = tuple[int, int, int, int]  # x, y, width, height
Part = tuple[Box, list[int]]  # what hangs together, by the numbers of its components


def split(levels: Pixels) -> list[tuple[Box, Tensor]]:
    """Find the digits of one picture, line by line: each with its box, in MNIST's form, uint8 (1, 28, 28).

    Raises UserError if nothing stands out from the background, or too much does.
    """
    pixels = prepare.shrunk(levels, prepare.FINE_SIZE)
    ink = prepare.unruled(prepare.ink_of(pixels))
    side = 1 + max(ink.shape) // 500
    joined = cv2.dilate(prepare.inked(ink), prepare.ones(side, side))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(joined)
    heights, longer = stats[1:, cv2.CC_STAT_HEIGHT], stats[1:, 2:4].max(1)
    large = (heights >= 0.1 * heights.max(initial=0)) & (longer >= max(ink.shape) / 150)  # the others are specks
    parts = (1 + np.flatnonzero(large)).tolist()
    if len(parts) > MAX_PARTS:
        raise UserError(f"{len(parts)} parts of a digit's size, at most {MAX_PARTS} are read")
    if not parts:
        raise UserError("nothing stands out from the background")
    parts = sorted(parts, key=lambda part: -int(stats[part, cv2.CC_STAT_AREA]))
    clear = (stats[:, :2].min(1) > 1) & (stats[:, :2] + stats[:, 2:4] < np.array(ink.shape[::-1]) - 1).all(1)
    parts = [part for part in parts if clear[part]] or parts  # of those at the border only if there are no others
    digits = prepare.without_boxes(stats, parts)
    tallest = max(int(stats[part, 3]) for part in digits)
    height = float(np.median([stats[part, 3] for part in digits if stats[part, 3] >= 0.4 * tallest]))
    found = united([(bounds(stats[[part]]), [part]) for part in digits], 1.6 * height)
    scale = max(levels.shape) / max(pixels.shape)
    read: list[tuple[Box, Tensor]] = []
    for (x, y, across, down), group in in_lines([item for item in found if item[0][3] >= 0.4 * height]):
        rows, columns = slice(y, y + down), slice(x, x + across)
        own = np.isin(labels[rows, columns], group)
        left, top, width, high = (round(side * scale) for side in (x, y, across, down))
        read.append(((left, top, width, high), prepare.in_form(ink[rows, columns] * own)))
    return read


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
