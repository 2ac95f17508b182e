"""Brings a user's own pictures into the form that MNIST's makers gave theirs, and finds several digits in one.

That form (https://doi.org/10.1109/5.726791, section III.A): white ink on black, the digit scaled to fit a box of 20x20
pixels with its proportions and its grey levels kept, and set into 28x28 pixels with its centre of mass in the middle.
"""

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lit_mnist.exact.console import UserError, shortened

warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd and large files; what it cannot read, it raises
Image.init()
Image.ID.remove("EPS")  # which is a program, and starts Ghostscript
with suppress(ImportError):
    from pillow_heif import HeifImagePlugin  # noqa: F401, which registers what it reads
NO_PICTURE = "no picture that Pillow reads" + "; HEIC needs pip install 'lit_mnist[heic]'" * ("HEIF" not in Image.ID)
FINE_SIZE = 1024  # large pictures are decoded to less than twice this, and at least this
WORKING_SIZE = 256  # the size at which their digit is looked for
BOX, SIDE = 20, 28
MAX_PARTS = 400  # of a digit's size, in a picture of several
Image.MAX_IMAGE_PIXELS = 25_000_000  # Pillow refuses twice as many; decoded they take four bytes each

Pixels = NDArray[Any]  # float32 (H, W); cv2's types only say that its results are arrays
Mask = NDArray[Any]  # uint8 (H, W), 0 or 1
Box = tuple[int, ...]  # x, y, width, height
Part = tuple[Box, list[int]]  # what hangs together, by the numbers of its components


def grey_levels(file: Path | BinaryIO) -> Pixels:
    """Decode a picture's first frame, upright, to grey levels from 0 (black) to 1, or raise UserError."""
    try:
        with Image.open(file) as opened:
            opened.draft(opened.mode, (FINE_SIZE, FINE_SIZE))  # a JPEG is decoded at the size that is needed
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):  # 16 bits or more, which Pillow's conversions would clip
                levels = np.nan_to_num(np.array(picture, dtype=np.float32), posinf=0, neginf=0)
                return (levels - levels.min()) / max(levels.max() - levels.min(), 1e-6)
            colours = picture.convert("RGBA").reduce(max(1, max(picture.size) // FINE_SIZE))
    except UnidentifiedImageError:
        raise UserError(NO_PICTURE) from None
    except Exception as error:  # Pillow's decoders raise a dozen types for a broken file
        raise UserError(f"cannot be read: {shortened(str(error))}") from None
    pixels = np.asarray(colours, dtype=np.float32) / 255
    level, opaque = mixed(pixels[..., :3]), pixels[..., 3]
    ink = (level * opaque).sum() / max(opaque.sum(), 1e-6)
    return level * opaque + (1 - opaque) * (ink < 0.5)  # the ink stands out from what is transparent


def mixed(colours: Pixels) -> Pixels:
    """Mix red, green and blue (H, W, 3) to one level along the colour by which pixels differ most from those around."""
    small = shrunk(colours, WORKING_SIZE)
    details = (small - cv2.blur(small, [odd(max(small.shape) / 4)] * 2)).reshape(-1, 3)
    mixture = np.linalg.eigh(details.T @ details)[1][:, -1]
    mixture *= np.sign(mixture.sum()) / np.abs(mixture).sum()
    return np.asarray(colours @ mixture - mixture.clip(max=0).sum())


def digit(pixels: Pixels) -> Tensor:
    """Bring grey levels into MNIST's form, uint8 (1, 28, 28), or raise UserError if nothing stands out."""
    small = shrunk(pixels, WORKING_SIZE)
    ink = ink_of(small)
    unlined = unruled(ink)
    parts = digit_parts(inked(unlined))  # no specks, nothing that crosses the border, no box around it
    if not fits(cv2.boundingRect(parts), ink.shape):  # what is left without ruled lines has no digit
        unlined, parts = ink, digit_parts(inked(ink))
    around = 3 + 2 * (max(ink.shape) // 100)
    ink = unlined * cv2.dilate(parts, ones(around, around))
    x, y, width, height = cv2.boundingRect(inked(ink, 0.1))
    if not width:
        raise UserError("nothing stands out from the background")
    if small is not pixels and 3 * max(width, height) < max(small.shape):  # look again, closer
        scale, margin = max(pixels.shape) / max(small.shape), max(width, height) / 2 + 2
        top, left = (max(0, int((start - margin) * scale)) for start in (y, x))
        bottom, right = (int((stop + margin) * scale) for stop in (y + height, x + width))
        return digit(pixels[top:bottom, left:right])
    return in_form(ink[y : y + height, x : x + width])


def in_form(ink: Pixels) -> Tensor:
    """Scale ink to the box, and set it into 28x28 pixels by its centre of mass."""
    scale = BOX / max(ink.shape)
    if scale != 1:
        if scale < 1:
            ink = cv2.GaussianBlur(ink, (0, 0), 0.3 / scale)  # as soft as MNIST's
        ink = resized(ink, scale)
        ink = (ink / full_level(ink)).clip(max=1)  # a thin line fades when it is reduced; MNIST's pens reach white
    height, width = ink.shape
    # in all of MNIST's images the centre of mass lies within half a pixel of the middle of pixel 14
    row, column = (ink.sum(1 - axis) @ np.arange(ink.shape[axis]) / ink.sum() for axis in (0, 1))
    top = min(max(round(SIDE / 2 - row), 0), SIDE - height)
    left = min(max(round(SIDE / 2 - column), 0), SIDE - width)
    sides = (top, SIDE - height - top), (left, SIDE - width - left)
    return torch.from_numpy(np.pad((ink * 255).round().astype(np.uint8), sides)[None])


def resized(pixels: Pixels, scale: float) -> Pixels:
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def shrunk(pixels: Pixels, side: int) -> Pixels:
    """Reduce it until its longer side is at most SIDE; smaller pictures stay as they are."""
    return resized(pixels, side / max(pixels.shape)) if max(pixels.shape) > side else pixels


def odd(side: float) -> int:
    return max(3, int(side) // 2 * 2 + 1)


def full_level(ink: Pixels) -> float:
    """Find the level of full ink: nearly the highest, so that single bright pixels do not decide."""
    return float(np.quantile(ink[ink >= 0.5 * ink.max()], 0.9))


def ink_of(levels: Pixels) -> Pixels:
    """Separate ink, dark or light, from 0 (paper) to 1 (full ink), of uneven light; UserError if nothing stands out."""
    low, high = float(levels.min()), float(levels.max())
    eight_bits = ((levels - low) / max(high - low, 0.02) * 255).astype(np.uint8)
    median = cv2.medianBlur(eight_bits, odd(min(255, max(levels.shape) / 2)))
    dark = ((eight_bits - median.astype(np.float32)) ** 3).sum() < 0  # ink is the smaller part, and differs more
    levels = (1 - levels if dark else levels).astype(np.float32)
    smooth = cv2.medianBlur(levels, 5 if min(levels.shape) > 60 else 3)
    window = odd(min(max(12, max(levels.shape) * 0.3), WORKING_SIZE * 0.4))
    kernel = ones(window, window)
    paper = cv2.morphologyEx(smooth, cv2.MORPH_OPEN, kernel)
    ink: Pixels = levels - paper
    # the same, except that what lies along the border counts as paper: light may fall off towards it
    wide = cv2.copyMakeBorder(smooth, window, window, window, window, cv2.BORDER_REPLICATE)
    beyond = cv2.morphologyEx(wide, cv2.MORPH_OPEN, kernel)[window:-window, window:-window]
    inner: Pixels = levels - beyond
    if dark:  # ink takes its share of the light
        least = 0.45 * np.quantile(1 - paper, 0.9)
        ink, inner = ink / (1 - paper).clip(min=least), inner / (1 - beyond).clip(min=least)
    lower, quarter = np.quantile(inner, (0.1, 0.25))  # both of paper, even if there is more ink than paper
    noise = float(quarter - lower) / 0.607  # of a normal distribution
    bias = quarter + 0.674 * noise
    full = full_level((inner - bias).clip(min=0))
    if not full > max(0.04, 5 * noise):
        raise UserError("nothing stands out from the background")
    ink = ((ink - bias) / full).clip(0, 1)
    return np.where(ink > 3 * noise / full, ink, 0).astype(np.float32)


def inked(ink: Pixels, share: float = 0.3) -> Mask:
    return (ink > share).astype(np.uint8)


def unruled(ink: Pixels) -> Pixels:
    """Remove ruled lines except where strokes cross them."""
    faint = inked(ink, 0.15)
    lines = ruled_lines(faint)
    if not lines.any():
        return ink
    level = float(np.median(ink[(lines & faint) > 0]))
    crossing = cv2.morphologyEx(inked(ink) * (1 - lines), cv2.MORPH_CLOSE, ones(9, 9))
    return np.where((lines > 0) & (crossing == 0) & (ink < level + 0.25), 0, ink).astype(np.float32)


def fits(box: Any, shape: tuple[int, ...]) -> bool:
    """Tell whether a box is large enough for a digit, and has paper on all sides."""
    (x, y, width, height), (down, across) = box, shape
    clear = 0.02 * across < x < 0.98 * across - width and 0.02 * down < y < 0.98 * down - height
    large = max(width, height) >= 0.1 * max(shape)
    return bool(clear and large and height < 0.9 * down and width < 0.9 * across)


def ruled_lines(mask: Mask) -> Mask:
    """Find straight thin lines, nearly level or upright, if at least two run from one border to the opposite one."""
    found, ruled = np.zeros_like(mask), False
    for turned, target in ((mask, found), (np.ascontiguousarray(mask.T), found.T)):
        width = turned.shape[1]
        closed = cv2.morphologyEx(turned, cv2.MORPH_CLOSE, ones(1, width // 40))
        runs = cv2.morphologyEx(closed, cv2.MORPH_OPEN, ones(1, max(3, width // 12)))
        bold = cv2.morphologyEx(runs, cv2.MORPH_OPEN, ones(max(3, width // 25), 1))
        _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.dilate(cv2.subtract(runs, bold), ones(3, 3)))
        left, lengths = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_WIDTH]
        ruled |= bool((lengths[1:] > 0.9 * width).sum() > 1)  # one may be a digit's own
        lines = (left <= 2) | (left + lengths >= width - 2)  # a bold stroke may cut them
        lines[0] = False
        target |= lines[labels].astype(np.uint8)
    return found * ruled


def ones(height: int, width: int) -> Mask:
    return np.ones((max(1, height), max(1, width)), np.uint8)


def digit_parts(mask: Mask) -> Mask:
    """Keep, of the parts that nearly touch, those at least a tenth as large as the largest."""
    side = 1 + max(mask.shape) // 100
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.dilate(mask, ones(side, side)))
    areas = stats[:, cv2.CC_STAT_AREA]
    parts = [int(part) + 1 for part in areas[1:].argsort()[::-1][:100]]  # noise makes thousands
    parts = without_boxes(stats, [part for part in parts if fits(stats[part, :4], mask.shape)] or parts)
    kept = [part for part in parts if areas[part] >= 0.1 * areas[parts[0]]]
    return np.isin(labels, kept).astype(np.uint8)


def without_boxes(stats: Any, parts: list[int]) -> list[int]:
    """Leave out each part that is a box around another one of a digit's size."""
    starts, sizes, areas = stats[parts, :2], stats[parts, 2:4], stats[parts, cv2.CC_STAT_AREA]
    inside = (starts[:, None] < starts) & ((starts + sizes)[:, None] > starts + sizes)  # (outer, inner, axis)
    boxes = inside.all(2) & (sizes[:, 1] > 0.25 * sizes[:, 1:]) & (areas < 0.35 * sizes.prod(1))[:, None]
    return [part for part, box in zip(parts, boxes.any(1), strict=True) if not box]


def split(levels: Pixels) -> list[tuple[Box, Tensor]]:
    """Find the digits line by line, each with its box, uint8 (1, 28, 28); UserError if nothing, or too much, is ink."""
    pixels = shrunk(levels, FINE_SIZE)
    ink = unruled(ink_of(pixels))
    side = 1 + max(ink.shape) // 500
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.dilate(inked(ink), ones(side, side)))
    heights, longer = stats[1:, cv2.CC_STAT_HEIGHT], stats[1:, 2:4].max(1)
    large = (heights >= 0.1 * heights.max(initial=0)) & (longer >= max(ink.shape) / 150)  # the others are specks
    parts = sorted((1 + np.flatnonzero(large)).tolist(), key=lambda part: -int(stats[part, cv2.CC_STAT_AREA]))
    if len(parts) > MAX_PARTS:
        raise UserError(f"{len(parts)} parts of a digit's size, at most {MAX_PARTS} are read")
    if not parts:
        raise UserError("nothing stands out from the background")
    clear = (stats[:, :2].min(1) > 1) & (stats[:, :2] + stats[:, 2:4] < np.array(ink.shape[::-1]) - 1).all(1)
    parts = [part for part in parts if clear[part]] or parts  # of those at the border only if there are no others
    digits = without_boxes(stats, parts)
    tall = stats[digits, cv2.CC_STAT_HEIGHT]
    height = float(np.median(tall[tall >= 0.4 * tall.max()]))
    found = united([(tuple(stats[part, :4].tolist()), [part]) for part in digits], 1.6 * height)
    scale = max(levels.shape) / max(pixels.shape)
    read = []
    for box, group in in_lines([item for item in found if item[0][3] >= 0.4 * height]):
        x, y, across, down = box
        place = slice(y, y + down), slice(x, x + across)
        seen = in_form(ink[place] * np.isin(labels[place], group))
        read.append((tuple(round(side * scale) for side in box), seen))
    return read


def united(parts: list[Part], tallest: float) -> list[Part]:
    """Join the parts that lie one above the other and together are no taller than a digit: the two strokes of a 5."""
    digits: list[Part] = []
    for box, own in parts:
        for other in digits:
            (x, y, width, height), (left, top, across, down) = box, other[0]
            start, above = min(x, left), min(y, top)
            joined = start, above, max(x + width, left + across) - start, max(y + height, top + down) - above
            if box[2] + other[0][2] - joined[2] >= 0.3 * min(box[2], other[0][2]) and joined[3] <= tallest:
                digits.remove(other)
                box, own = joined, own + other[1]
                break
        digits.append((box, own))
    return digits


def in_lines(boxes: list[Part]) -> list[Part]:
    """Sort into reading order: a line has its middles at the height of its highest box, and runs left to right."""
    if not boxes:
        return []
    _, y, _, height = min((box for box, _ in boxes), key=lambda box: box[1] + box[3] / 2)
    line = [item for item in boxes if y <= item[0][1] + item[0][3] / 2 <= y + height]
    return sorted(line) + in_lines([item for item in boxes if item not in line])
