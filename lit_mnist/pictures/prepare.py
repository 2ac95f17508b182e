"""A user's own pictures, brought into the form that MNIST's makers gave theirs.

That form (https://doi.org/10.1109/5.726791, section III.A): white ink on black, the digit scaled to fit a box of 20x20
pixels with its proportions and its grey levels kept, and set into 28x28 pixels with its centre of mass in the middle.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"))
PIXEL_LIMIT = 50_000_000  # of a picture; decoded they take four bytes each
FINE_SIZE = 1024  # large pictures are decoded to less than twice this
WORKING_SIZE = 256  # where their digit is looked for
BOX, SIDE = 20, 28

Pixels = NDArray[Any]  # float32 (H, W); cv2 says of its own results only that they are arrays
Mask = NDArray[Any]  # uint8 (H, W), 0 or 1
Box = tuple[int, int, int, int]  # x, y, width, height


@dataclass
class Picture:
    """A file, and what the network sees of it: uint8 (1, 28, 28), or None with the reason why it sees nothing."""

    path: Path
    digit: Tensor | None = None
    problem: str = ""
    number: int = 0  # with several digits in a file, from 1 in the order of reading
    box: Box = (0, 0, 0, 0)  # the digit's, then


def find(paths: list[str]) -> list[Path]:
    """The files that are meant: of a folder, those below it whose names end as pictures do.

    Raises:
        UserError: a path that is not there, or a folder without pictures.
    """
    found: list[Path] = []
    for name in paths:
        if not name:
            raise UserError("data.images must be files and folders, got an empty name")
        path, shown = Path(name), shortened(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            inside = [file for file in inside if "lightning_logs" not in file.relative_to(path).parts]  # our own sheets
            if not inside:
                raise UserError(f"data.images: the folder {shown} has no {', '.join(sorted(SUFFIXES))} in it")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"data.images: {shown} {'is no file' if path.exists() else 'does not exist'}")
    return found


def load(path: Path) -> Picture:
    """Read one file. What is wrong with it is told in the result, not raised: the other files go on."""
    try:
        return Picture(path, digit(grey_levels(path)))
    except UnusableError as error:
        return Picture(path, problem=str(error))


class UnusableError(ValueError):
    """A picture that cannot be read, or shows nothing."""


def grey_levels(path: Path) -> Tensor:
    """Decode a picture's first frame, upright, to grey levels, float (H, W) from 0 (black) to 1.

    Grey is the mixture of the colours that shows the most; what is transparent takes the level that the rest stands out
    from. Large pictures are reduced to 1,024 to 2,047 pixels.

    Raises:
        UnusableError: no picture of a known format, one that is broken, or one that is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below refuses them
            with Image.open(path, formats=FORMATS) as opened:
                width, height = opened.size  # from the header: nothing is decoded yet
                if width * height > PIXEL_LIMIT:
                    raise UnusableError(f"{width}x{height} pixels, at most {PIXEL_LIMIT:,} are read")
                opened.draft(opened.mode, (FINE_SIZE, FINE_SIZE))  # a JPEG is decoded at the size that is needed
                picture = ImageOps.exif_transpose(opened)
                if is_deep(picture):
                    levels = torch.from_numpy(np.array(picture, dtype=np.float32)).nan_to_num(0, 0, 0)
                    return (levels - levels.min()) / (levels.max() - levels.min()).clamp(min=1e-6)
                colours = picture.convert("RGBA").reduce(max(1, max(picture.size) // FINE_SIZE))
    except UnusableError:
        raise
    except Image.DecompressionBombError:
        raise UnusableError(f"too large, at most {PIXEL_LIMIT:,} pixels are read") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for a broken file
        known = isinstance(error, UnidentifiedImageError)
        reason = f"no {', '.join(FORMATS)}" if known else f"broken: {' '.join(str(error).split())[:80]}"
        raise UnusableError(reason) from None
    pixels = np.asarray(colours, dtype=np.float32) / 255
    level, opaque = mixed(pixels[..., :3]), pixels[..., 3]
    if opaque.min() < 1:
        ink = (level * opaque).sum() / max(opaque.sum(), 1e-6)
        level = level * opaque + (1 - opaque) * (ink < 0.5)
    return torch.from_numpy(level)


def mixed(colours: Pixels) -> Pixels:
    """Mix red, green and blue (H, W, 3) to one level along the colour by which pixels differ most from those around."""
    small = shrunk(colours, WORKING_SIZE)
    details = (small - cv2.blur(small, [odd(max(small.shape) / 4)] * 2)).reshape(-1, 3)
    mixture = np.linalg.eigh(details.T @ details)[1][:, -1]
    mixture *= np.sign(mixture.sum()) / np.abs(mixture).sum()
    level: Pixels = colours @ mixture - mixture.clip(max=0).sum()
    return level


def is_deep(picture: Image.Image) -> bool:
    """Whether it has 16 bits or more a pixel, which Pillow's conversions would clip."""
    return picture.mode.startswith(("I", "F"))


def digit(levels: Tensor) -> Tensor:
    """Bring grey levels, float (H, W), into MNIST's form, uint8 (1, 28, 28).

    Raises:
        UnusableError: nothing stands out from the background.
    """
    pixels = levels.numpy()
    small = shrunk(pixels, WORKING_SIZE)
    ink = main_parts(ink_of(small))
    x, y, width, height = cv2.boundingRect(inked(ink, 0.1))
    if not width:
        raise UnusableError("nothing stands out from the background")
    if small is not pixels and 3 * max(width, height) < max(small.shape):  # once more, from the pixels about it
        scale, margin = max(pixels.shape) / max(small.shape), max(width, height) / 2 + 2
        first = (max(0, int((start - margin) * scale)) for start in (y, x))
        last = (int((stop + margin) * scale) for stop in (y + height, x + width))
        rows, columns = (slice(*ends) for ends in zip(first, last, strict=True))
        return digit(torch.from_numpy(pixels[rows, columns]))
    return in_form(ink[y : y + height, x : x + width])


def in_form(ink: Pixels) -> Tensor:
    """Scale ink to the box, and set it into 28x28 pixels by its centre of mass."""
    scale = BOX / max(ink.shape)
    if scale != 1:
        if scale < 1:
            ink = cv2.GaussianBlur(ink, (0, 0), 0.3 / scale)  # as soft as MNIST's
        ink = resized(ink, scale)
        ink = (ink / top(ink)).clip(max=1)  # a thin line fades when it is reduced; MNIST's pens reach white
    height, width = ink.shape
    # in all of MNIST's images the centre of mass lies within half a pixel of the middle of pixel 14
    row, column = (ink.sum(1 - axis) @ np.arange(ink.shape[axis]) / ink.sum() for axis in (0, 1))
    above = min(max(round(SIDE / 2 - row), 0), SIDE - height)
    left = min(max(round(SIDE / 2 - column), 0), SIDE - width)
    canvas = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    canvas[0, above : above + height, left : left + width] = torch.from_numpy((ink * 255).round()).to(torch.uint8)
    return canvas


def resized(pixels: Pixels, scale: float) -> Pixels:
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def shrunk(pixels: Pixels, side: int) -> Pixels:
    """Its longer side at most SIDE; smaller pictures stay as they are."""
    return resized(pixels, side / max(pixels.shape)) if max(pixels.shape) > side else pixels


def odd(side: float) -> int:
    return max(3, int(side) // 2 * 2 + 1)


def top(ink: Pixels) -> float:
    """The level of full ink: nearly the highest, so that single bright pixels do not decide."""
    return float(np.quantile(ink[ink >= 0.5 * ink.max()], 0.9))


def ink_of(levels: Pixels) -> Pixels:
    """What stands out from the background, from 0 (paper) to 1 (full ink), dark on light or the reverse.

    The background is what is left when strokes are closed over: it follows the light, and the edges of shadows.

    Raises:
        UnusableError: nothing stands out.
    """
    low, high = float(levels.min()), float(levels.max())
    eight_bits = ((levels - low) / max(high - low, 0.02) * 255).astype(np.uint8)
    median = cv2.medianBlur(eight_bits, odd(min(255, max(levels.shape) / 2)))
    dark = ((eight_bits - median.astype(np.float32)) ** 3).sum() < 0  # ink is the smaller part, and stands out further
    levels = (1 - levels if dark else levels).astype(np.float32)
    smooth = cv2.medianBlur(levels, 5 if min(levels.shape) > 60 else 3)
    window = odd(min(max(12, max(levels.shape) * 0.3), WORKING_SIZE * 0.4))
    kernel = ones(window, window)
    paper = cv2.morphologyEx(smooth, cv2.MORPH_OPEN, kernel)
    ink: Pixels = levels - paper
    # the same but that what lies along the border is paper, as light that falls off towards it is
    wide = cv2.copyMakeBorder(smooth, window, window, window, window, cv2.BORDER_REPLICATE)
    beyond = cv2.morphologyEx(wide, cv2.MORPH_OPEN, kernel)[window:-window, window:-window]
    inner: Pixels = levels - beyond
    if dark:  # ink takes its share of the light
        least = 0.45 * np.quantile(1 - paper, 0.9)
        ink, inner = ink / (1 - paper).clip(min=least), inner / (1 - beyond).clip(min=least)
    lower, quarter = np.quantile(inner, (0.1, 0.25))  # both of paper, though there be more ink than paper
    noise = float(quarter - lower) / 0.607  # of a normal distribution
    bias = quarter + 0.674 * noise
    full = top((inner - bias).clip(min=0))
    if not full > max(0.04, 5 * noise):
        raise UnusableError("nothing stands out from the background")
    ink = ((ink - bias) / full).clip(0, 1)
    return np.where(ink > 3 * noise / full, ink, 0).astype(np.float32)


def main_parts(ink: Pixels) -> Pixels:
    """The digit's ink alone: without specks, what comes in over the border, a box around it, and ruled lines."""
    unlined = unruled(ink)
    remaining = digit_parts(inked(unlined))
    if unlined is not ink and fits(cv2.boundingRect(remaining), ink.shape):
        return unlined * surroundings(remaining)
    return ink * surroundings(digit_parts(inked(ink)))


def inked(ink: Pixels, share: float = 0.3) -> Mask:
    return (ink > share).astype(np.uint8)


def unruled(ink: Pixels) -> Pixels:
    """Without ruled lines, but where strokes cross them: the very same ink if there are none."""
    faint = inked(ink, 0.15)
    lines = ruled_lines(faint)
    if not lines.any():
        return ink
    level = float(np.median(ink[(lines & faint) > 0]))
    crossing = cv2.morphologyEx(inked(ink) * (1 - lines), cv2.MORPH_CLOSE, ones(9, 9))
    return np.where((lines > 0) & (crossing == 0) & (ink < level + 0.25), 0, ink).astype(np.float32)


def surroundings(mask: Mask) -> Mask:
    around = 3 + 2 * (max(mask.shape) // 100)
    return cv2.dilate(mask, ones(around, around))


def fits(box: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is large enough for a digit, and has paper on all sides."""
    x, y, width, height = box
    above, left = shape[0] / 50, shape[1] / 50
    return bool(
        x > left and y > above and x + width < shape[1] - left and y + height < shape[0] - above
        and 0.1 * max(shape) <= max(width, height) and height < 0.9 * shape[0] and width < 0.9 * shape[1]
    )  # fmt: skip


def ruled_lines(mask: Mask) -> Mask:
    """Straight thin lines, nearly level or upright, where at least two go from one border to the opposite one."""
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
    """Of the parts that hang together, nearly, those at least a tenth as large as the largest."""
    joined = cv2.dilate(mask, ones(*[1 + max(mask.shape) // 100] * 2))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(joined)
    areas = stats[1:, cv2.CC_STAT_AREA]
    parts = [int(part) + 1 for part in areas.argsort()[::-1][:100]]  # of noise there are thousands
    if inside := [part for part in parts if fits(stats[part, :4], mask.shape)]:
        parts = inside
    hollow = {part for part in parts if any(encloses(stats[part], stats[other]) for other in parts)}
    parts = [part for part in parts if part not in hollow]
    largest = max((stats[part, cv2.CC_STAT_AREA] for part in parts), default=0)
    kept = [part for part in parts if stats[part, cv2.CC_STAT_AREA] >= 0.1 * largest]
    return np.isin(labels, kept).astype(np.uint8)


def encloses(outer: Any, inner: Any) -> bool:
    """Whether a part is a box that another one, of a digit's size, lies in."""
    x, y, width, height, area = outer
    left, above, across, down, _ = inner
    return bool(
        x < left and y < above and left + across < x + width and above + down < y + height
        and down > 0.25 * height and area < 0.35 * width * height
    )  # fmt: skip
