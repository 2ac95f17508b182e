"""A user's own pictures, brought into the form that MNIST's makers gave theirs.

That form (https://doi.org/10.1109/5.726791, section III.A): white ink on black, the digit scaled to fit a box of 20x20
pixels with its proportions and its grey levels kept, and set into 28x28 pixels with its centre of mass in the middle.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from lit_mnist.data.mnist import DataError
from lit_mnist.training.console import shortened

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"))
PIXEL_LIMIT = 50_000_000  # of a picture; decoded they take four bytes each
WORKING_SIZE = 256  # larger pictures are first reduced to this
BOX, SIDE = 20, 28


@dataclass
class Picture:
    """A file, and what the network sees of it: uint8 (1, 28, 28), or None with the reason why it sees nothing."""

    path: Path
    digit: Tensor | None = None
    problem: str = ""


def find(paths: list[str]) -> list[Path]:
    """The files that are meant: of a folder, those below it whose names end as pictures do.

    Raises:
        DataError: a path that is not there, or a folder without pictures.
    """
    found: list[Path] = []
    for name in paths:
        if not name:
            raise DataError("data.images must be files and folders, got an empty name")
        path, shown = Path(name), shortened(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            inside = [file for file in inside if "lightning_logs" not in file.relative_to(path).parts]  # our own sheets
            if not inside:
                raise DataError(f"data.images: the folder {shown} has no {', '.join(sorted(SUFFIXES))} in it")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"data.images: {shown} {'is no file' if path.exists() else 'does not exist'}")
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

    What is transparent takes the colour that the rest stands out from.

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
                picture = ImageOps.exif_transpose(opened)
                deep = is_deep(picture)
                if deep:
                    levels = np.asarray(picture, dtype=np.float32)
                else:
                    colours = picture.convert("RGBA")
                    if (factor := max(colours.size) // (2 * WORKING_SIZE)) > 1:
                        colours = colours.reduce(factor)
                    pixels = np.asarray(colours.convert("LA"), dtype=np.float32) / 255
    except UnusableError:
        raise
    except Image.DecompressionBombError:
        raise UnusableError(f"too large, at most {PIXEL_LIMIT:,} pixels are read") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for a broken file
        known = isinstance(error, UnidentifiedImageError)
        reason = f"no {', '.join(FORMATS)}" if known else f"broken: {' '.join(str(error).split())[:80]}"
        raise UnusableError(reason) from None
    if deep:
        low, high = float(levels.min()), float(levels.max())
        return torch.from_numpy((levels - low) / max(high - low, 1e-6))
    level, opaque = torch.from_numpy(pixels).unbind(2)
    if bool((opaque < 1).any()):
        ink = float((level * opaque).sum() / opaque.sum().clamp(min=1e-6))
        level = level * opaque + (1 - opaque) * (1.0 if ink < 0.5 else 0.0)
    return level


def is_deep(picture: Image.Image) -> bool:
    """Whether it has 16 bits or more a pixel, which Pillow's conversions would clip."""
    return picture.mode.startswith(("I", "F"))


def digit(levels: Tensor) -> Tensor:
    """Bring grey levels, float (H, W), into MNIST's form, uint8 (1, 28, 28).

    Raises:
        UnusableError: nothing stands out from the background.
    """
    small = reduced(levels)
    try:
        ink = ink_of(small)
    except UnusableError:
        small = levels = framed(small)  # perhaps cut so close that there is more ink than paper
        ink = ink_of(small)
    ink = ink * main_parts(ink > 0.3)
    rows, columns = ((ink > 0.1).any(side).nonzero().flatten()[[0, -1]].tolist() for side in (1, 0))
    if small is not levels and 3 * max(rows[1] - rows[0], columns[1] - columns[0]) < max(small.shape):
        return digit(around(levels, rows, columns, max(levels.shape) / max(small.shape)))
    ink = ink[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
    scale = BOX / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape]
    if size != list(ink.shape):
        ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0]
        # a thin line fades when it is reduced; MNIST's pens reach white
        ink = (ink / top(ink)).clamp(max=1)
    height, width = ink.shape
    mass = ink.sum()
    row = float((ink.sum(1) * torch.arange(height)).sum() / mass)
    column = float((ink.sum(0) * torch.arange(width)).sum() / mass)
    # in all of MNIST's images the centre of mass lies within half a pixel of the middle of pixel 14
    above = min(max(round(SIDE / 2 - row), 0), SIDE - height)
    left = min(max(round(SIDE / 2 - column), 0), SIDE - width)
    canvas = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    canvas[0, above : above + height, left : left + width] = (ink * 255).round().to(torch.uint8)
    return canvas


def around(levels: Tensor, rows: list[int], columns: list[int], scale: float) -> Tensor:
    """A small digit in a large picture: the pixels about it, with as much paper on all sides as half the digit."""
    margin = max(rows[1] - rows[0], columns[1] - columns[0]) / 2 + 2
    (above, below), (left, right) = (
        (max(0, int((first - margin) * scale)), int((last + 1 + margin) * scale)) for first, last in (rows, columns)
    )
    return levels[above:below, left:right]


def framed(levels: Tensor) -> Tensor:
    """Paper on all sides, of those pixels of the border that lie nearest to its median: with their noise."""
    border = torch.cat([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    paper = border[(border - border.median()).abs().argsort()[: 3 * len(border) // 4]]
    margin = 1 + max(levels.shape) // 6
    height, width = levels.shape
    canvas = paper[torch.arange((height + 2 * margin) * (width + 2 * margin)) % len(paper)]
    canvas = canvas.view(height + 2 * margin, width + 2 * margin)
    canvas[margin : margin + height, margin : margin + width] = levels
    return canvas


def reduced(levels: Tensor) -> Tensor:
    """Shrink so that the longer side is at most WORKING_SIZE; smaller pictures stay as they are."""
    scale = WORKING_SIZE / max(levels.shape)
    if scale >= 1:
        return levels
    size = [max(1, round(side * scale)) for side in levels.shape]
    return F.interpolate(levels[None, None], size, mode="bilinear", antialias=True)[0, 0]


def top(ink: Tensor) -> Tensor:
    """The level of full ink: nearly the highest, so that single bright pixels do not decide."""
    inked = ink[ink > 0.5 * ink.max()]
    return inked.quantile(0.9) if len(inked) else ink.max()


def ink_of(levels: Tensor) -> Tensor:
    """What stands out from the background, float (H, W) from 0 (paper) to 1 (full ink), dark on light or the reverse.

    The background is a surface of second order, fitted to the pixels that lie near it, so uneven light does not count.

    Raises:
        UnusableError: nothing stands out.
    """
    height, width = levels.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=2).view(-1, 6).double()
    values = levels.flatten().double()
    residuals = values - values.median()
    near = torch.ones_like(values, dtype=torch.bool)
    for _ in range(8):
        spread = 1.4826 * residuals[near].abs().median()
        near = residuals.abs() <= torch.maximum(3 * spread, torch.tensor(0.02))
        surface = torch.linalg.lstsq(terms[near], values[near, None], driver="gelsd").solution
        residuals = values - (terms @ surface).flatten()
    if (residuals**3).sum() < 0:  # ink is the smaller part, and stands out further
        residuals = -residuals / (terms @ surface).flatten().clamp(min=0.05)  # dark ink takes its share of the light
    noise = 1.4826 * residuals[near].abs().median()
    full = float(top(residuals))
    if not full > max(0.04, 5 * float(noise)):
        raise UnusableError("nothing stands out from the background")
    ink = (residuals.view(height, width) / full).clamp(0, 1).float()
    floor = 3 * float(noise) / full
    return torch.where(ink > floor, ink, 0.0)


def main_parts(inked: Tensor) -> Tensor:
    """Of a mask (H, W), the parts at least a tenth as large as the largest, with their surroundings: specks go.

    A part is what hangs together; its pixels get one number, the highest of them, by passing numbers on to neighbours.
    """
    shape = inked.shape
    # joined over gaps of a pixel or two, and coarse enough to be quick
    factor = max(1, max(shape) // 64)
    coarse = F.max_pool2d(inked[None, None].float(), factor, ceil_mode=True)
    numbers = (torch.arange(coarse.numel(), dtype=torch.float32).view_as(coarse) + 1) * coarse
    while True:
        passed_on = F.max_pool2d(numbers, 3, stride=1, padding=1) * coarse
        if torch.equal(passed_on, numbers):
            break
        numbers = passed_on
    parts, sizes = numbers[numbers > 0].unique(return_counts=True)
    kept = torch.isin(numbers, parts[sizes >= 0.1 * sizes.max()]).float()
    around = F.max_pool2d(kept, 3, stride=1, padding=1)
    return F.interpolate(around, scale_factor=factor, mode="nearest")[0, 0, : shape[0], : shape[1]]
