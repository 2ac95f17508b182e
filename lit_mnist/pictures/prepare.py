"""Brings a user's own pictures into the form that MNIST's makers gave theirs, and finds several digits in one.

That form (https://doi.org/10.1109/5.726791, section III.A): white ink on black, the digit scaled to fit a box of 20x20
pixels with its proportions and its grey levels kept, and set into 28x28 pixels with its centre of mass in the middle.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
TILTS = [0, *range(-15, -1), *range(2, 16)]  # of lined paper, in degrees
SQUARE = np.ones((3, 3), np.uint8)  # a pixel and those around it
MAX_PARTS = 400  # of a digit's size, in a picture of several
Image.MAX_IMAGE_PIXELS = 25_000_000  # Pillow refuses twice as many; decoded they take four bytes each

Pixels = NDArray[Any]  # float32 (H, W); cv2's types only say that its results are arrays
Mask = NDArray[Any]  # uint8 (H, W), 0 or 1
Box = tuple[int, ...]  # x, y, width, height
Classify = Callable[[Tensor], Tensor]
Found = tuple[Box, Tensor | None, str]  # where, in MNIST's form unless it was left out, and why or what is doubtful


class Part(NamedTuple):
    """What hangs together, or is one digit: its box, its area in pixels, and the numbers of its components."""

    box: Box
    area: int
    labels: list[int]


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
    if opaque.min() == 1:
        return level
    ink = (level * opaque).sum() / max(opaque.sum(), 1e-6)
    return level * opaque + (1 - opaque) * (ink < 0.5)  # the ink stands out from what is transparent


def mixed(colours: Pixels) -> Pixels:
    """Mix red, green and blue (H, W, 3) to one level along the colour by which pixels differ most from those around."""
    small = shrunk(colours, WORKING_SIZE)
    details = (small - cv2.blur(small, [1 + max(small.shape) // 4] * 2)).reshape(-1, 3)
    mixture = np.linalg.eigh(details.T @ details)[1][:, -1]
    mixture *= np.sign(mixture.sum()) / np.abs(mixture).sum()
    return np.asarray(colours @ mixture - mixture.clip(max=0).sum())


def sheet(levels: Pixels, small: Pixels) -> tuple[Pixels, tuple[int, int]]:
    """Cut out a note, a sheet or a screen's canvas that lies within the picture, if it has ink; and where it begins.

    SMALL is the same picture at the working size.
    """
    small = cv2.medianBlur((small * 255).clip(0, 255).astype(np.uint8), 3)
    _, light = cv2.threshold(small, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    for mask in (light, 1 - light):
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        outline = max(outlines, key=cv2.contourArea, default=np.zeros((1, 1, 2), np.int32))
        side, box = min(cv2.minAreaRect(outline)[1]), cv2.boundingRect(outline)
        if side < 0.24 * max(mask.shape) or at_border(box, mask.shape) or not is_rectangle(outline):
            continue
        whole = cv2.drawContours(np.zeros_like(mask), [outline], -1, 1, cv2.FILLED)
        inner = cv2.erode(whole, np.ones([max(3, int(0.04 * side))] * 2, np.uint8))
        marks = cv2.connectedComponentsWithStats(inner * (1 - mask))[2][1:]
        drawn = (marks[:, cv2.CC_STAT_HEIGHT] > max(3, 0.05 * side)).any() and marks[:, -1].sum() < 0.2 * inner.sum()
        edge = cv2.drawContours(np.zeros_like(mask), [outline], -1, 1) > 0
        steps = cv2.morphologyEx(small, cv2.MORPH_GRADIENT, SQUARE)[edge]  # light that falls off has none
        beyond = cv2.dilate(whole, np.ones([1 + int(0.5 * side)] * 2, np.uint8)) > whole  # of a cell the next one
        if drawn and mask[beyond].mean() < 0.2 and np.quantile(steps, 0.1) >= 12:
            inner = cv2.resize(inner, levels.shape[::-1], interpolation=cv2.INTER_NEAREST)
            x, y, width, height = cv2.boundingRect(inner)
            part, inner = (each[y : y + height, x : x + width] for each in (levels, inner))
            return np.where(inner, part, np.median(part[inner > 0])).astype(np.float32), (x, y)
    return levels, (0, 0)


def is_rectangle(outline: Any) -> bool:
    return bool(cv2.contourArea(outline) >= 0.89 * np.prod(cv2.minAreaRect(outline)[1]))


def find_one(levels: Pixels, closer: bool = False) -> tuple[Tensor, str]:
    """Bring the one digit into MNIST's form, uint8 (1, 28, 28), and say what is doubtful; UserError for none."""
    pixels, small = levels, shrunk(levels, WORKING_SIZE)
    if not closer and (pixels := sheet(levels, small)[0]) is not levels:
        small = shrunk(pixels, WORKING_SIZE)
    ink = unruled(unboxed(ink_of(small, small is not pixels))[0], closer)
    labels, parts = parts_of(ink, 100)
    whole = [part for part in parts[:100] if not at_border(part.box, ink.shape, 0.02)]  # noise makes thousands
    parts = [part for part in whole if max(part.box[2:]) >= 0.05 * max(ink.shape)] or parts[:100]
    if not parts:
        raise UserError("nothing stands out from the background")
    largest = max(part.area * part.box[3] for part in parts)
    digits = united([part for part in parts if part.area * part.box[3] >= 0.1 * largest], np.inf, 0.3)
    main = max(digits, key=lambda part: part.area * part.box[3])
    ink = ink * cv2.dilate(np.isin(labels, main.labels).astype(np.uint8), np.ones((7, 7), np.uint8))  # with soft edges
    x, y, width, height = cv2.boundingRect(inked(ink, 0.1))
    doubt = "more than one digit?" * (sum(0.6 * height <= part.box[3] <= 1.7 * height for part in digits) > 1)
    if small is not pixels and 3 * max(width, height) < max(small.shape):  # look again
        scale, margin = max(pixels.shape) / max(small.shape), max(width, height) / 2 + 2
        top, left = (max(0, int((start - margin) * scale)) for start in (y, x))
        bottom, right = (int((stop + margin) * scale) for stop in (y + height, x + width))
        return find_one(pixels[top:bottom, left:right], closer=True)[0], doubt
    return in_form(ink[y : y + height, x : x + width]), doubt


def in_form(ink: Pixels) -> Tensor:
    """Scale ink to the box, and set it into 28x28 pixels by its centre of mass."""
    if max(ink.shape) > BOX:
        ink = cv2.GaussianBlur(ink, (0, 0), 0.3 * max(ink.shape) / BOX)  # as soft as MNIST's
    ink = shrunk(ink, BOX, enlarge=True)
    ink = (ink / full_level(ink)).clip(max=1)  # a thin line fades when it is reduced; MNIST's pens reach white
    sides = []
    for axis, length in enumerate(ink.shape):
        middle = ink.sum(1 - axis) @ np.arange(length) / ink.sum()
        # in all of MNIST's images it lies within half a pixel of the middle of pixel 14
        before = min(max(round(SIDE / 2 - middle), 0), SIDE - length)
        sides.append((before, SIDE - length - before))
    return torch.from_numpy(np.pad((ink * 255).round().astype(np.uint8), sides)[None])


def shrunk(pixels: Pixels, side: int, enlarge: bool = False) -> Pixels:
    """Scale it until its longer side is at most SIDE; ENLARGE it to that too."""
    scale = side / max(pixels.shape)
    if scale == 1 or (scale > 1 and not enlarge):
        return pixels
    height, width = (max(1, round(scale * length)) for length in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def full_level(ink: Pixels) -> float:
    """Find the level of full ink: nearly the highest, so that single bright pixels do not decide."""
    return float(np.quantile(ink[ink >= 0.5 * ink.max()], 0.9))


def ink_of(levels: Pixels, page: bool) -> Pixels:
    """Separate ink, dark or light, from 0 (paper) to 1 (full ink), of uneven light; UserError if nothing stands out.

    A large picture is a PAGE: there is paper around its ink, and the sheet may end within it. A digit may fill another.
    """
    margin = min(levels.shape) // 50 * page
    middle = shrunk(levels[margin : len(levels) - margin, margin : levels.shape[1] - margin], WORKING_SIZE // 2)
    coarse = cv2.normalize(middle, np.empty(0), 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    around = max(1, max(coarse.shape) // 4)
    wide = cv2.medianBlur(np.pad(coarse, around, "symmetric" if page else "edge"), 2 * around + 1)
    beyond = coarse - wide[around:-around, around:-around].astype(np.float32)
    edges = cv2.morphologyEx(coarse, cv2.MORPH_GRADIENT, SQUARE)  # a lamp's reflection has none
    push = edges * beyond**3
    for mask in (beyond > 20, beyond < -20):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        rim = np.bincount(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]), minlength=len(stats))
        aside = (rim > 0) & ((stats[:, 2:4] / mask.shape[::-1]).min(1) < 0.5)
        push[aside[labels]] /= 4  # a shadow's edge, or what lies beside a sheet
    dark = push.sum() < 0  # ink is the smaller part, and differs more
    levels = (1 - levels if dark else levels).astype(np.float32)
    smooth = cv2.medianBlur(levels, 5 if min(levels.shape) > 60 else 3)
    reduced, side = shrunk(smooth, FINE_SIZE // 2), max(levels.shape)
    reach = int(min(max(6, 0.15 * side), 0.2 * WORKING_SIZE) * max(reduced.shape) / side)  # more than half a stroke
    kernel, inside = np.ones([2 * reach + 1] * 2, np.uint8), (slice(reach, -reach),) * 2
    eroded = cv2.erode(np.pad(reduced, reach, "edge"), kernel)
    wider = np.ones([2 * reach + 1 + 2 * (reduced is not smooth)] * 2, np.uint8)  # nothing remains of a sheet's edge
    opened = cv2.dilate(eroded[inside], wider), cv2.dilate(eroded, wider)[inside]
    # the second takes what lies along the border for paper, too: light may fall off towards it
    paper, outer = (cv2.resize(each, levels.shape[::-1]) for each in opened)
    ink, inner = levels - paper, levels - outer
    if dark:  # ink takes its share of the light
        least = max(0.01, 0.45 * np.quantile(1 - paper[::3, ::3], 0.9))
        ink, inner = ink / (1 - paper).clip(min=least), inner / (1 - outer).clip(min=least)
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


def rotated(mask: Mask, degrees: float) -> Mask:
    if not degrees:
        return mask
    turn = cv2.getRotationMatrix2D((mask.shape[1] / 2, mask.shape[0] / 2), degrees, 1)
    return cv2.warpAffine(mask, turn, mask.shape[::-1], flags=cv2.INTER_NEAREST)


def tilt_of(mask: Mask) -> float:
    """Return the angle in degrees by which the lines of a mask have to be rotated to be level and upright."""
    small = shrunk(mask * np.float32(1), 128)
    turns = [rotated(small, tilt) for tilt in TILTS]
    peaks = [np.square(turned.sum(0)).sum() + np.square(turned.sum(1)).sum() for turned in turns]
    return TILTS[int(np.argmax(peaks))]


def unruled(ink: Pixels, ruled: bool = False) -> Pixels:
    """Remove straight thin lines, except where strokes cross them, if RULED or if two run from border to border."""
    faint = inked(ink, 0.15)
    rim = np.ones_like(faint)
    rim[3:-3, 3:-3] = 0
    if not (faint & rim).any():
        return ink
    tilt = tilt_of(faint) if min(ink.shape) > 50 else 0  # a smaller picture is all digit
    margin = int(0.3 * max(ink.shape)) if tilt else 0  # for the corners
    level, rim = (rotated(np.pad(mask, margin), tilt) for mask in (faint, rim))
    found = np.zeros_like(level)
    for turned, target, ends in ((level, found, rim), (np.ascontiguousarray(level.T), found.T, rim.T)):
        width = ink.shape[1] if turned is level else len(ink)
        closed = cv2.morphologyEx(turned, cv2.MORPH_CLOSE, np.ones((1, 1 + width // 40), np.uint8))
        runs = cv2.morphologyEx(closed, cv2.MORPH_OPEN, np.ones((1, max(3, width // 12)), np.uint8))
        strokes = cv2.morphologyEx(runs, cv2.MORPH_OPEN, np.ones((max(3, width // 25), 1), np.uint8))
        _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.dilate(cv2.subtract(runs, strokes), SQUARE))
        ruled |= bool((stats[1:, cv2.CC_STAT_WIDTH] > 0.9 * width).sum() > 1)  # one may be a digit's own
        lines = np.bincount(labels[ends > 0], minlength=len(stats)) > 0  # a bold stroke may cut them
        target |= (lines[labels] & (labels > 0)).astype(np.uint8)
    found = rotated(found, -tilt)[margin : margin + len(ink), margin : margin + ink.shape[1]]
    if not ruled or not (found & faint).any():
        return ink
    usual = float(np.median(ink[(found & faint) > 0]))
    crossing = cv2.morphologyEx(inked(ink) * (1 - found), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    return np.where((found > 0) & (crossing == 0) & (ink < usual + 0.25), 0, ink).astype(np.float32)


def at_border(box: Any, shape: tuple[int, ...], share: float = 0) -> bool:
    """Tell whether less than two pixels, or a SHARE of the picture, are free on a side of a box."""
    (x, y, width, height), (down, across) = box, shape
    right, below = across - x - width, down - y - height
    return bool(min(x, right) <= max(1, share * across) or min(y, below) <= max(1, share * down))


def parts_of(ink: Pixels, share: int) -> tuple[Any, list[Part]]:
    """Find what hangs together, or nearly, by a SHAREth of the longer side: numbered pixels, and the largest first."""
    side = 1 + max(ink.shape) // share
    _, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.dilate(inked(ink), np.ones((side, side), np.uint8)))
    order = stats[1:, cv2.CC_STAT_AREA].argsort()[::-1].tolist()
    return labels, [Part(tuple(stats[n + 1, :4].tolist()), int(stats[n + 1, 4]), [n + 1]) for n in order]


def unboxed(ink: Pixels) -> tuple[Pixels, list[Box]]:
    """Remove (in place) printed cells and drawn boxes, even touched by a digit, with something of its size in them."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(inked(ink, 0.2))
    boxes: list[Box] = []
    for part in (1 + np.flatnonzero(stats[1:, 2:4].min(1) >= 16)).tolist():
        x, y, width, height = stats[part, :4].tolist()
        place = slice(y, y + height), slice(x, x + width)
        own = (labels[place] == part).astype(np.uint8)
        outlines, (tree,) = cv2.findContours(own, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        holes = [cv2.convexHull(outline) for outline, (*_, outer) in zip(outlines, tree, strict=True) if outer >= 0]
        least = 0.3 if at_border((x, y, width, height), ink.shape) else 0.1  # squared paper is no table
        cells = [hole for hole in holes if min(cv2.minAreaRect(hole)[1]) >= least * min(width, height)]
        straight = [cell for cell in cells if is_rectangle(cell)]
        hull = cv2.convexHull(cv2.findNonZero(own))
        if min(cv2.minAreaRect(hull)[1]) < 16:  # a line that lies askew
            continue
        # or one ring, as around a digit, or a drawn box that is open: a digit's own has nothing in it
        found = straight or (cells or [hull] * is_rectangle(hull)) * (len(cells) < 2)
        if sum(map(cv2.contourArea, found)) < 0.5 * np.prod(cv2.minAreaRect(hull)[1]):
            continue
        side = float(np.median([min(cv2.minAreaRect(cell)[1]) for cell in found]))
        inside = cv2.drawContours(np.zeros_like(own), straight and cells, -1, 1, cv2.FILLED)
        cv2.drawContours(inside, cells, -1, 0, max(3, int(0.05 * side)))
        bare = np.where(cv2.dilate(own, SQUARE) > inside, 0, ink[place])
        if max((part.box[3] for part in parts_of(bare, 100)[1]), default=0) >= 0.25 * side:
            ink[place] = bare
            boxes.append((x, y, width, height))
    return ink, boxes


def pieces(ink: Pixels, classify: Classify | None) -> list[tuple[Box, Tensor]]:
    """Return the digit in a part's ink and its box, or those of both halves if the network is surer of each."""

    def piece(left: int, right: int) -> tuple[Box, Tensor]:
        x, y, width, height = cv2.boundingRect(inked(ink[:, left:right], 0.1))
        return (left + x, y, width, height), in_form(ink[y : y + height, left + x : left + x + width])

    height, width = ink.shape
    found: list[tuple[Box, Tensor]] = [((0, 0, width, height), in_form(ink))]
    if classify and width > max(0.9 * height, 20):
        for cut in np.linspace(0.25 * width, 0.75 * width, 13).astype(int).tolist():
            found += [piece(0, cut), piece(cut, width)]
        sure = classify(torch.stack([seen for _, seen in found])).amax(1)
        both = sure[1:].view(-1, 2).amin(1)
        if both.max() > sure[0] + 0.05:
            first = 1 + 2 * int(both.argmax())
            return found[first : first + 2]
    return found[:1]


def split(levels: Pixels, classify: Classify | None = None) -> list[Found]:
    """Find the digits line by line, then what was left out; UserError if nothing, or too much, is ink.

    CLASSIFY maps digits, uint8 (N, 1, 28, 28), to probabilities, float (N, C): it decides whether two touch.
    """
    whole, corner = sheet(levels, shrunk(levels, WORKING_SIZE))
    pixels = shrunk(whole, FINE_SIZE)
    ink, boxes = unboxed(ink_of(pixels, max(pixels.shape) > WORKING_SIZE))
    ink = unruled(ink)
    labels, parts = parts_of(ink, 500)
    heights = [part.box[3] for part in parts if not at_border(part.box, ink.shape)] or [part.box[3] for part in parts]
    tallest = max(heights, default=0)
    parts = [part for part in parts if part.box[3] >= 0.1 * tallest and max(part.box[2:]) >= max(ink.shape) / 150]
    if not 0 < len(parts) <= MAX_PARTS:
        raise UserError(f"{len(parts)} parts of a digit's size, from 1 to {MAX_PARTS} are read")
    height = float(np.median([tall for tall in heights if tall >= 0.4 * tallest]))

    def problem(part: Part) -> str:
        width, tall = part.box[2:]
        if at_border(part.box, ink.shape) and (abs(tall / height - 1) > 0.5 or width > 1.5 * height):
            return "touches the border"
        if max(width, tall) > 1.6 * height and min(width, tall) < 0.12 * max(width, tall):
            return "a line"
        return "too small" * (tall < 0.4 * height)

    strokes = [part for part in parts if problem(part) in ("", "too small")]
    ordered = in_order(united(strokes, 1.6 * height, -1), 0.5 * height)
    ordered += [part for part in parts if part not in strokes]
    reasons = [*((part, problem(part)) for part in ordered), *((Part(box, 0, []), "a box") for box in boxes)]
    found: list[Found] = []
    scale = max(whole.shape) / max(pixels.shape)
    for part, reason in sorted(reasons, key=lambda answer: answer[1] != ""):  # what is left out last
        x, y, width, tall = part.box
        place = slice(y, y + tall), slice(x, x + width)
        own = ink[place] * np.isin(labels[place], part.labels)
        doubt = "touches the border" * at_border(part.box, ink.shape)
        digits = [((0, 0, width, tall), None)] if reason else pieces(own, classify)
        for (left, top, *size), seen in digits:
            left, top, *size = (round(scale * side) for side in (x + left, y + top, *size))
            found.append(((left + corner[0], top + corner[1], *size), seen, reason or doubt))
    return found


def united(parts: list[Part], largest: float, beside: float) -> list[Part]:
    """Join parts one above the other, as a 5's strokes, and those BESIDE times their size apart, to a digit's size."""
    digits: list[Part] = []
    for part in parts:
        for other in digits.copy():
            (x, y, width, height), (left, top, across, down) = part.box, other.box
            start, above = min(x, left), min(y, top)
            joined = start, above, max(x + width, left + across) - start, max(y + height, top + down) - above
            smaller = min(max(width, height), max(across, down))
            gap, gap_down = joined[2] - width - across, joined[3] - height - down
            near = gap <= max(beside * smaller, -0.3 * min(width, across)) and gap_down <= 0.3 * smaller
            if near and max(joined[2:]) <= largest:
                digits.remove(other)
                part = Part(joined, part.area + other.area, part.labels + other.labels)
        digits.append(part)
    return digits


def in_order(parts: list[Part], apart: float) -> list[Part]:
    """Sort into reading order: lines rise as the steps from digit to digit do, and lie APART, in pixels."""
    boxes = np.array([part.box for part in parts]).reshape(-1, 4)
    middles, slopes = boxes[:, :2] + boxes[:, 2:] / 2, []
    for middle in middles:
        ahead = middles - middle
        ahead = ahead[ahead[:, 0] > 2 * np.abs(ahead[:, 1])]
        if len(ahead):
            across, down = ahead[ahead[:, 0].argmin()]
            slopes.append(down / across)
    course = middles @ (-np.median(slopes or [0]), 1)
    order = course.argsort()
    lines = np.split(order, 1 + np.flatnonzero(np.diff(course[order]) > apart))
    return [part for line in lines for part in sorted(parts[index] for index in line)]
