"""How well a checkpoint reads digits that do not come in MNIST's form.

    python benchmarks/pictures.py lightning_logs/version_0/checkpoints/best-....ckpt

Takes the first 1,000 test images of MNIST and makes pictures of them as people have them (other sizes, inverted, off
centre, on paper in uneven light, with noisy strokes), and harder ones of the first 300 (within cells and boxes, on a
desk, in shadows, on ruled and squared paper, cut off, tiny, faint, in colours). Brings each back into MNIST's form as
`predict --data.images` does. And scikit-learn's `load_digits`: 1,797 other people's digits of 8x8 pixels, of which the
network has seen none. Where there is a folder of strangers' pictures, these too, the same difficulties laid over them,
and numbers made of them. In the end, how confident wrong answers are, and answers for what is no digit. Prints tables;
with `--record` they are appended with their conditions to results/pictures.jsonl.
"""

from __future__ import annotations

import argparse
import colorsys
import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from records import add_flag, append
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import Module
from torch.nn import functional as F

from lit_mnist import LitMNIST
from lit_mnist.data import datasets
from lit_mnist.exact.reader import read_checkpoint
from lit_mnist.pictures import prepare as images
from lit_mnist.pictures import several

COUNT, HARDER = 1000, 300
CANVAS = 240
LETTERS = "AEFHKMNPRTUVWXYadefhkmnrtuvwx"  # those that no digit looks like
STRANGERS = Path("../shared/wild-digits")
MOUSE = "own-mouse"  # the origin of what no stranger drew


def uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def resized(digit: Tensor, generator: Generator) -> Tensor:
    """1 to 12 times the size, a factor for each axis within a tenth of the other."""
    scale = uniform(1, 12, generator)
    size = [round(28 * scale * uniform(0.95, 1.05, generator)) for _ in range(2)]
    return F.interpolate(digit[None, None], size, mode="bicubic", antialias=True)[0, 0].clamp(0, 1)


def inverted(digit: Tensor, generator: Generator) -> Tensor:
    return 1 - digit


def shifted(digit: Tensor, generator: Generator) -> Tensor:
    """Anywhere on a canvas of three times the size."""
    return placed(digit, 84, generator)


def placed(digit: Tensor, side: int, generator: Generator) -> Tensor:
    canvas = torch.zeros(side, side)
    above, left = (int(uniform(0, side - length, generator)) for length in digit.shape)
    canvas[above : above + digit.shape[0], left : left + digit.shape[1]] = digit
    return canvas


def on_paper(digit: Tensor, generator: Generator) -> Tensor:
    """A photograph: dark ink of some strength on a sheet with grain, light that falls off to one side, sensor noise."""
    size = [round(28 * uniform(3, 7, generator))] * 2
    ink = placed(F.interpolate(digit[None, None], size, mode="bicubic")[0, 0].clamp(0, 1), 240, generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 240), torch.linspace(-1, 1, 240), indexing="ij")
    slope = [uniform(-0.2, 0.2, generator) for _ in range(2)]
    light = 0.7 + slope[0] * x + slope[1] * y - uniform(0, 0.1, generator) * (x * x + y * y)
    grain = F.interpolate(torch.randn(1, 1, 80, 80, generator=generator), 240, mode="bilinear")[0, 0]
    noise = torch.randn(240, 240, generator=generator)
    return (light * (1 - uniform(0.5, 0.9, generator) * ink) + 0.015 * grain + 0.015 * noise).clamp(0, 1)


def noisy_strokes(digit: Tensor, generator: Generator) -> Tensor:
    """Ink that is uneven along the stroke, as of a dry pen, and a fifth of whose pixels have gone missing."""
    large = F.interpolate(digit[None, None], 112, mode="bicubic")[0, 0].clamp(0, 1)
    gone = torch.rand(112, 112, generator=generator) < 0.2
    strength = F.interpolate(torch.rand(1, 1, 14, 14, generator=generator), 112, mode="bilinear")[0, 0]
    return large * (0.6 + 0.4 * strength) * ~gone


VARIANTS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "other sizes": resized,
    "inverted": inverted,
    "shifted": shifted,
    "on paper": on_paper,
    "noisy strokes": noisy_strokes,
}


def scene(digit: Tensor, generator: Generator, room: tuple[float, float] = (0, 0), canvas: int = CANVAS) -> Tensor:
    """The digit's ink somewhere on a canvas, 35 to 60 % of it, with ROOM left above and to the left."""
    inked = (digit > 0.3).nonzero()
    (above, left), (below, right) = inked.min(0).values.tolist(), inked.max(0).values.tolist()
    digit = digit[above : below + 1, left : right + 1]
    scale = uniform(0.35, 0.6, generator) * CANVAS / max(digit.shape)
    size = [max(2, round(side * scale)) for side in digit.shape]
    ink = F.interpolate(digit[None, None], size, mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
    places = [
        int(uniform(share * canvas + 12, max(canvas - side - 12, share * canvas + 12), generator))
        for side, share in zip(ink.shape, room, strict=True)
    ]
    whole = torch.zeros(canvas + 80, canvas + 80)
    whole[places[0] : places[0] + size[0], places[1] : places[1] + size[1]] = ink
    return whole[:canvas, :canvas]


def photographed(ink: Tensor, generator: Generator, light: Tensor | float = 0.85, strength: float = 0.8) -> Tensor:
    noise = torch.randn(ink.shape, generator=generator)
    return (light * (1 - strength * ink) + 0.012 * noise).clamp(0, 1)


def coordinates(angle: float, canvas: int = CANVAS) -> Tensor:
    """How far each pixel lies from the canvas's middle along a direction, in degrees from the downward one."""
    y, x = torch.meshgrid(torch.arange(canvas) - canvas / 2, torch.arange(canvas) - canvas / 2, indexing="ij")
    turn = math.radians(angle)
    return y * math.cos(turn) + x * math.sin(turn)


def quarters(generator: Generator) -> int:
    return int(uniform(0, 4, generator))


def lines_at(offsets: list[float], angle: float, generator: Generator) -> Tensor:
    width = uniform(1.5, 4, generator)
    along = coordinates(angle)
    return torch.stack([(0.5 + width / 2 - (along - offset).abs()).clamp(0, 1) for offset in offsets]).amax(0)


def cell_lines(digit: Tensor, generator: Generator) -> Tensor:
    """A printed cell cut out roughly: one to four of its lines run along the edges of the picture."""
    ink = scene(digit, generator, (0.08, 0.08))[: CANVAS - 20, : CANVAS - 20]
    ink = F.pad(ink, (0, 20, 0, 20))
    for side in range(1 + quarters(generator)):
        offset = CANVAS / 2 - uniform(1, 12, generator)
        ink = torch.maximum(ink, lines_at([offset], 90 * side + uniform(-1.5, 1.5, generator), generator))
    return photographed(ink, generator)


def boxed(digit: Tensor, generator: Generator) -> Tensor:
    """A closed box drawn around the digit, clear of it, askew by up to 3 degrees."""
    ink = scene(digit, generator, (0.15, 0.15))
    inked = (ink > 0.3).nonzero()
    (above, left), (below, right) = inked.min(0).values.tolist(), inked.max(0).values.tolist()
    margin = [uniform(12, 30, generator) for _ in range(4)]
    angle, width = uniform(-3, 3, generator), uniform(1.5, 4, generator)
    y, x = coordinates(angle), coordinates(angle + 90)
    inside = torch.stack([
        y - (above - margin[0] - CANVAS / 2), (below + margin[1] - CANVAS / 2) - y,
        x - (left - margin[2] - CANVAS / 2), (right + margin[3] - CANVAS / 2) - x,
    ]).amin(0)  # fmt: skip
    return photographed(torch.maximum(ink, (0.5 + width / 2 - inside.abs()).clamp(0, 1)), generator)


def desk(digit: Tensor, generator: Generator) -> Tensor:
    """The sheet ends, and 15 to 40 % of the picture is a darker desk with a grain."""
    share = uniform(0.15, 0.4, generator)
    turns = quarters(generator)
    ink = scene(digit.rot90(-turns), generator, (share, 0))
    on_desk = coordinates(uniform(-3, 3, generator)) < (share - 0.5) * CANVAS
    grain = F.interpolate(torch.randn(1, 1, 60, 12, generator=generator), CANVAS, mode="bilinear")[0, 0]
    level = uniform(0.15, 0.45, generator)
    light = torch.where(on_desk, level + 0.03 * grain, 0.85)
    return photographed(ink, generator, light).rot90(turns)


def shadow(digit: Tensor, generator: Generator, blur: tuple[float, float]) -> Tensor:
    ink = scene(digit, generator)
    along = coordinates(uniform(0, 360, generator)) - uniform(-50, 50, generator)
    shade = (along / uniform(*blur, generator)).sigmoid()
    return photographed(ink, generator, 0.85 * (1 - uniform(0.35, 0.6, generator) * shade))


def hard_shadow(digit: Tensor, generator: Generator) -> Tensor:
    """Across the picture, 35 to 60 % of the light gone within a pixel or two."""
    return shadow(digit, generator, (0.2, 0.8))


def soft_shadow(digit: Tensor, generator: Generator) -> Tensor:
    """The same within 50 to 100 pixels."""
    return shadow(digit, generator, (12, 25))


def strip(digit: Tensor, generator: Generator) -> Tensor:
    """A dark strip of 3 to 10 % along one border, as of a scanner's lid."""
    share = uniform(0.03, 0.1, generator)
    turns = quarters(generator)
    ink = scene(digit.rot90(-turns), generator, (share, 0))
    light = torch.where(
        coordinates(uniform(-1, 1, generator)) < (share - 0.5) * CANVAS, uniform(0, 0.3, generator), 0.85
    )
    return photographed(ink, generator, light).rot90(turns)


def paper_lines(digit: Tensor, generator: Generator, pitch: tuple[float, float], angles: tuple[float, ...]) -> Tensor:
    ink = scene(digit, generator)
    distance, askew, strength = uniform(*pitch, generator), uniform(-2, 2, generator), uniform(0.25, 0.6, generator)
    start = uniform(0, distance, generator)
    offsets = [start + distance * index - CANVAS for index in range(int(2 * CANVAS / distance))]
    for angle in angles:
        ink = torch.maximum(ink, strength * lines_at(offsets, angle + askew, generator))
    return photographed(ink, generator)


def ruled(digit: Tensor, generator: Generator) -> Tensor:
    """Ruled paper: lines 30 to 75 % as dark as the ink, 30 to 70 pixels apart, askew by up to 2 degrees."""
    return paper_lines(digit, generator, (30, 70), (0,))


def squared(digit: Tensor, generator: Generator) -> Tensor:
    """Squared paper: the same both ways, 20 to 50 pixels apart."""
    return paper_lines(digit, generator, (20, 50), (0, 90))


def cut(digit: Tensor, generator: Generator) -> Tensor:
    """Cut off at each side between 4 % within the digit and 4 % outside."""
    ink = scene(digit, generator)
    inked = (ink > 0.3).nonzero()
    first, last = inked.min(0).values.tolist(), (inked.max(0).values + 1).tolist()
    slack = [round(0.04 * uniform(-1, 1, generator) * max(last[0] - first[0], last[1] - first[1])) for _ in range(4)]
    picture = photographed(ink, generator)
    return picture[first[0] - slack[0] : last[0] + slack[1], first[1] - slack[2] : last[1] + slack[3]]


def tiny(digit: Tensor, generator: Generator) -> Tensor:
    """30 to 60 pixels high in a picture of 1,000."""
    scale = uniform(30, 60, generator) / (0.5 * CANVAS)
    ink = scene(digit, generator)
    ink = F.interpolate(ink[None, None], scale_factor=scale, mode="bilinear", antialias=True)[0, 0]
    return photographed(placed(ink, 1000, generator), generator)


def low_contrast(digit: Tensor, generator: Generator) -> Tensor:
    """A pencil: ink that takes 10 to 20 % of the light, in noise."""
    return photographed(scene(digit, generator), generator, strength=uniform(0.1, 0.2, generator))


def colour_ink(digit: Tensor, generator: Generator) -> Tensor:
    """Ink of any hue on white or tinted paper, float (H, W, 3), yellow on white among it."""
    ink = scene(digit, generator)[..., None]
    colour = torch.tensor(colorsys.hsv_to_rgb(uniform(0, 1, generator), 1, uniform(0.6, 1, generator)))
    paper = torch.tensor(colorsys.hsv_to_rgb(uniform(0, 1, generator), uniform(0, 0.25, generator), 0.9))
    noise = torch.randn(CANVAS, CANVAS, 3, generator=generator)
    return (paper * (1 - ink) + 0.9 * colour * ink + 0.012 * noise).clamp(0, 1)


DIFFICULTIES: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "cell lines": cell_lines,
    "boxed": boxed,
    "desk": desk,
    "hard shadow": hard_shadow,
    "soft shadow": soft_shadow,
    "strip": strip,
    "ruled": ruled,
    "squared": squared,
    "cut": cut,
    "tiny": tiny,
    "low contrast": low_contrast,
    "colour ink": colour_ink,
}


def number(inks: list[Tensor], generator: Generator) -> tuple[Tensor, list[tuple[int, int]]]:
    """Digits in a row, 50 to 80 pixels high, 8 to 50 % of that apart, not quite level; and the columns of each."""
    height = uniform(50, 80, generator)
    spacing = uniform(0.08, 0.5, generator) * height
    x = 40.0
    columns: list[tuple[int, int]] = []
    canvas = torch.zeros(200, 1400)
    for ink in inks:
        inked = (ink > 0.3).nonzero()
        (above, left), (below, right) = inked.min(0).values.tolist(), inked.max(0).values.tolist()
        ink = ink[above : below + 1, left : right + 1]
        scale = height * uniform(0.9, 1.1, generator) / ink.shape[0]
        size = [max(2, round(side * scale)) for side in ink.shape]
        ink = F.interpolate(ink[None, None], size, mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
        y, start = 55 + int(uniform(0, 0.1, generator) * height), int(x)
        canvas[y : y + size[0], start : start + size[1]] = ink
        columns.append((start, start + size[1]))
        x += size[1] + spacing * uniform(0.7, 1.3, generator)
    return photographed(canvas[:, : int(x) + 40], generator), columns


def read(picture: Tensor) -> Tensor:
    """What the network sees of a picture, nothing where it is told to show none; colours go by way of a file."""
    try:
        if picture.dim() == 2:
            return images.digit(picture)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            Image.fromarray((picture * 255).round().to(torch.uint8).numpy()).save(path)
            return images.digit(images.grey_levels(path))
    except images.UnusableError:
        return torch.zeros(1, 28, 28, dtype=torch.uint8)


def strangers(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Files, labels and origins of other people's pictures, by the folder's labels.csv."""
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = torch.tensor([int(row["label"]) for row in rows])
    return [folder / row["file"] for row in rows], labels, [row["origin"] for row in rows]


def plain_ink(path: Path) -> Tensor:
    """The ink of a stranger's picture with an even background, float (H, W), by its border alone."""
    levels = images.grey_levels(path)
    border = torch.cat([levels[0], levels[-1], levels[:, 0], levels[:, -1]]).median()
    ink = (levels - border).abs()
    return ((ink / ink.max() - 0.25) / 0.5).clamp(0, 1)


def numbers_read(network: Module, inks: list[Tensor], labels: Tensor) -> tuple[int, int]:
    """How many digits of 50 numbers, postal codes of 5 and telephone numbers of 8 to 10, are read in their places."""
    generator = Generator().manual_seed(0)
    right = total = 0
    for index in range(50):
        length = 5 if index % 2 else int(uniform(8, 11, generator))
        chosen = torch.randint(len(inks), (length,), generator=generator).tolist()
        picture, columns = number([inks[choice] for choice in chosen], generator)
        found = several.split(picture)
        answers = network(torch.stack([digit for _, digit in found])).argmax(1).tolist()
        for choice, (first, last) in zip(chosen, columns, strict=True):
            pairs = zip(found, answers, strict=True)
            there = [answer for ((x, _, width, _), _), answer in pairs if first <= x + width / 2 <= last]
            right += there == [int(labels[choice])]
        total += length
    return right, total


def letter(index: int, generator: Generator) -> Tensor:
    """One that is no digit, in Pillow's own font, dark on light."""
    picture = Image.new("L", (CANVAS, CANVAS), 230)
    font = ImageFont.load_default(int(uniform(80, 160, generator)))
    draw = ImageDraw.Draw(picture)
    draw.text((CANVAS / 2, CANVAS / 2), LETTERS[index % len(LETTERS)], 40, font, anchor="mm")
    return torch.from_numpy(np.array(picture)).float() / 255


def scribble(index: int, generator: Generator) -> Tensor:
    """A smooth line through 6 to 12 places."""
    places = torch.rand(1, 2, int(uniform(6, 13, generator)), generator=generator) * 140 + 50
    curve = F.interpolate(places, 200, mode="linear", align_corners=True)
    curve = F.avg_pool1d(F.pad(curve, (8, 8), mode="replicate"), 17, stride=1)[0].T
    picture = Image.new("L", (CANVAS, CANVAS), 230)
    points = [(x, y) for x, y in curve.tolist()]
    ImageDraw.Draw(picture).line(points, 40, int(uniform(4, 14, generator)), joint="curve")
    return torch.from_numpy(np.array(picture)).float() / 255


def blank(index: int, generator: Generator) -> Tensor:
    """Paper in uneven light, with noise."""
    return on_paper(torch.zeros(28, 28), generator)


NO_DIGITS = {"letters": letter, "scribbles": scribble, "blanks": blank}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    parser.add_argument(
        "--strangers", type=Path, default=Path("../shared/wild-digits"), help="folder with a labels.csv"
    )
    add_flag(parser, "pictures")
    settings = parser.parse_args()
    read_checkpoint(settings.checkpoint)
    model = LitMNIST.load_from_checkpoint(settings.checkpoint, map_location="cpu", weights_only=True)
    network = model.network.eval()
    datasets.prepare(settings.root)
    originals, targets = datasets.load(settings.root, train=False)
    originals, targets = originals[:COUNT], targets[:COUNT]
    rows: dict[str, tuple[int, int]] = {}
    confidences: dict[str, list[float]] = {"right answers": [], "wrong answers": []}

    def score(name: str, pictures: Iterable[Tensor], expected: Tensor) -> None:
        digits = torch.stack([read(picture) for picture in track(pictures, name, total=len(expected))])
        add(name, digits, expected)

    def add(name: str, digits: Tensor, expected: Tensor) -> None:
        confidence, answers = network(digits).softmax(1).max(1)
        right = answers == expected
        rows[name] = int(right.sum()), len(expected)
        confidences["right answers"] += confidence[right].tolist()
        confidences["wrong answers"] += confidence[~right].tolist()

    with torch.inference_mode():
        add("as they are", originals, targets)
        for name, variant in (VARIANTS | DIFFICULTIES).items():
            generator = Generator().manual_seed(0)
            count = COUNT if name in VARIANTS else HARDER
            score(name, (variant(image[0] / 255, generator) for image in originals[:count]), targets[:count])
        others = load_digits()
        small = (torch.from_numpy(levels).float() / 16 for levels in others.images)
        score("load_digits, 8x8", small, torch.from_numpy(others.target))
        if (settings.strangers / "labels.csv").is_file():
            files, labels, origins = strangers(settings.strangers)
            drawn = torch.tensor([origin == MOUSE for origin in origins])
            read_files = [images.grey_levels(path) for path in files]
            for name, chosen in (("strangers'", ~drawn), ("with the mouse", drawn)):
                indices = chosen.nonzero().flatten().tolist()
                score(name, (read_files[index] for index in indices), labels[chosen])
            inks = [plain_ink(path) for path in files]
            for name, variant in DIFFICULTIES.items():
                generator = Generator().manual_seed(0)
                score(f"others' {name}", (variant(ink, generator) for ink in inks), labels)
            own = [ink for ink, origin in zip(inks, origins, strict=True) if origin != MOUSE]
            rows["strangers' numbers"] = numbers_read(network, own, labels[~drawn])
        else:
            print(f"No strangers' pictures: {settings.strangers} has no labels.csv")
        refused = {}
        for name, make in NO_DIGITS.items():
            generator = Generator().manual_seed(0)
            digits = torch.stack([read(make(index, generator)) for index in range(200)])
            shown = digits.flatten(1).bool().any(1)
            refused[name] = int((~shown).sum())
            confidences[name] = network(digits[shown]).softmax(1).amax(1).tolist() if shown.any() else []

    print(f"\n{'pictures':<28}{'correct':>12}{'accuracy %':>12}")
    for name, (right, total) in rows.items():
        print(f"{name:<28}{f'{right}/{total}':>12}{100 * right / total:>12.2f}")
    print(f"\n{'confidence of':<20}{'n':>7}{'refused':>9}{'median %':>10}{'over 90 %':>11}{'over 99 %':>11}")
    summary = {}
    for name, values in confidences.items():
        levels = torch.tensor(values or [0.0])
        shares = [float((levels > level).float().mean()) for level in (0.9, 0.99)]
        summary[name] = [len(values), refused.get(name, 0), float(levels.median()), *shares]
        median, *above = (f"{100 * value:.1f}" for value in summary[name][2:])
        print(f"{name:<20}{len(values):>7}{refused.get(name, 0):>9}{median:>10}{above[0]:>11}{above[1]:>11}")
    record = {"checkpoint": settings.checkpoint.name, "model": dict(model.hparams), "correct": rows}
    append(settings, record | {"confidence": summary})


if __name__ == "__main__":
    main()
