"""How well a checkpoint reads digits that do not come in MNIST's form.

Of MNIST's test images, and of scikit-learn's `load_digits` (other people's digits of 8x8 pixels), it makes pictures as
people have them, and numbers, and reads each as `predict` does; and letters, to see whether they are called unsure.
Where a checkpoint's training held images out, it says at which `report.UNSURE` 1 % of them are unsure.
"""

import colorsys
import math
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas
import torch
from PIL import Image, ImageDraw, ImageFont
from records import append, make_parser
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lit_mnist.data import datasets
from lit_mnist.data.datamodule import stratified_split
from lit_mnist.exact.console import UserError
from lit_mnist.exact.runs import read_checkpoint
from lit_mnist.network import load_network
from lit_mnist.pictures import prepare, report

CANVAS = 240
DIFFICULTIES = ["on paper", "cell lines", "boxed", "desk", "hard shadow", "soft shadow", "strip", "ruled", "squared"]
DIFFICULTIES += ["cut", "tiny", "low contrast", "colour ink"]
LETTERS = "AEFHKMNPRTUVWXYadefhkmnrtuvwx"  # those that no digit looks like


def cropped(ink: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Ink without the paper around it, and the box: first and last rows, first and last columns."""
    inked = (ink > 0.3).nonzero()
    (top, left), (bottom, right) = inked.min(0).values.tolist(), inked.max(0).values.tolist()
    return ink[top : bottom + 1, left : right + 1], (top, bottom, left, right)


def resized(ink: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(ink[None, None], size, mode="bicubic", antialias=True)[0, 0].clamp(0, 1)


def distance(angle: float) -> Tensor:
    """How far each pixel lies from the canvas's middle along a direction, in degrees from the downward one."""
    y, x = torch.meshgrid(torch.arange(CANVAS) - CANVAS / 2, torch.arange(CANVAS) - CANVAS / 2, indexing="ij")
    return y * math.cos(math.radians(angle)) + x * math.sin(math.radians(angle))


class Painter:
    """Makes pictures at random, the same ones from the same start."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def noise(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def grain(self, height: int, width: int) -> Tensor:
        return F.interpolate(self.noise(1, 1, height, width), CANVAS, mode="bilinear")[0, 0]

    def photograph(self, ink: Tensor, light: Tensor | float = 0.85, strength: float = 0.8) -> Tensor:
        return (light * (1 - strength * ink) + 0.012 * self.noise(*ink.shape)).clamp(0, 1)

    def place(self, ink: Tensor, side: int, starts: Sequence[float] = (0, 0), margin: int = 0) -> Tensor:
        """The ink somewhere on a canvas, from STARTS, its first row and column, to a margin at the other ends."""
        ends = (max(side - length - margin, start) for length, start in zip(ink.shape, starts, strict=True))
        top, left = (int(self.uniform(start, end)) for start, end in zip(starts, ends, strict=True))
        whole = torch.zeros(side + 80, side + 80)
        whole[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        return whole[:side, :side]

    def scene(self, digit: Tensor, room: tuple[float, float] = (0, 0)) -> Tensor:
        """The digit's ink somewhere on a canvas, 35 to 60 % of it, with ROOM left above and to the left."""
        digit, _ = cropped(digit)
        scale = self.uniform(0.35, 0.6) * CANVAS / max(digit.shape)
        ink = resized(digit, [max(2, round(side * scale)) for side in digit.shape])
        return self.place(ink, CANVAS, [share * CANVAS + 12 for share in room], 12)

    def lines(self, offsets: list[float], angle: float) -> Tensor:
        width, along = self.uniform(1.5, 4), distance(angle)
        return torch.stack([(0.5 + width / 2 - (along - offset).abs()).clamp(0, 1) for offset in offsets]).amax(0)

    def on_paper(self, digit: Tensor) -> Tensor:
        """Dark ink of some strength on a sheet with grain, light that falls off to one side, sensor noise."""
        side = round(28 * self.uniform(3, 7))
        ink = self.place(F.interpolate(digit[None, None], side, mode="bicubic")[0, 0].clamp(0, 1), CANVAS)
        y, x = torch.meshgrid(torch.linspace(-1, 1, CANVAS), torch.linspace(-1, 1, CANVAS), indexing="ij")
        light = 0.7 + self.uniform(-0.2, 0.2) * x + self.uniform(-0.2, 0.2) * y
        light = light - self.uniform(0, 0.1) * (x * x + y * y)
        grain, noise = self.grain(80, 80), self.noise(CANVAS, CANVAS)
        return (light * (1 - self.uniform(0.5, 0.9) * ink) + 0.015 * grain + 0.015 * noise).clamp(0, 1)

    def cell_lines(self, digit: Tensor) -> Tensor:
        """A printed cell cut out roughly: one to four of its lines run along the edges of the picture."""
        ink = F.pad(self.scene(digit, (0.08, 0.08))[: CANVAS - 20, : CANVAS - 20], (0, 20, 0, 20))
        for side in range(1 + int(self.uniform(0, 4))):
            offset = CANVAS / 2 - self.uniform(1, 12)
            ink = torch.maximum(ink, self.lines([offset], 90 * side + self.uniform(-1.5, 1.5)))
        return self.photograph(ink)

    def boxed(self, digit: Tensor) -> Tensor:
        """A closed box drawn around the digit, clear of it, askew by up to 3 degrees."""
        ink = self.scene(digit, (0.15, 0.15))
        margins, half = [self.uniform(12, 30) for _ in range(4)], CANVAS / 2
        angle, width = self.uniform(-3, 3), self.uniform(1.5, 4)
        (top, bottom, left, right), y, x = cropped(ink)[1], distance(angle) + half, distance(angle + 90) + half
        sides = (y - (top - margins[0]), bottom + margins[1] - y, x - (left - margins[2]), right + margins[3] - x)
        inside = torch.stack(sides).amin(0)
        return self.photograph(torch.maximum(ink, (0.5 + width / 2 - inside.abs()).clamp(0, 1)))

    def desk(self, digit: Tensor, shares: Sequence[float] = (0.15, 0.4), darkest: float = 0.15) -> Tensor:
        """The sheet ends, and 15 to 40 % of the picture is a darker desk with a grain."""
        share, turns = self.uniform(*shares), int(self.uniform(0, 4))
        ink = self.scene(digit.rot90(-turns), (share, 0))
        on_desk, grain = distance(self.uniform(-3, 3)) < (share - 0.5) * CANVAS, self.grain(60, 12)
        light = torch.where(on_desk, self.uniform(darkest, darkest + 0.3) + 0.03 * grain, 0.85)
        return self.photograph(ink, light).rot90(turns)

    def strip(self, digit: Tensor) -> Tensor:
        """A dark strip of 3 to 10 % along one border, as of a scanner's lid."""
        return self.desk(digit, (0.03, 0.1), 0)

    def hard_shadow(self, digit: Tensor, blur: tuple[float, float] = (0.2, 0.8)) -> Tensor:
        """Across the picture, 35 to 60 % of the light gone within a pixel or two."""
        ink = self.scene(digit)
        shade = ((distance(self.uniform(0, 360)) - self.uniform(-50, 50)) / self.uniform(*blur)).sigmoid()
        return self.photograph(ink, 0.85 * (1 - self.uniform(0.35, 0.6) * shade))

    def soft_shadow(self, digit: Tensor) -> Tensor:
        """The same within 50 to 100 pixels."""
        return self.hard_shadow(digit, (12, 25))

    def ruled(self, digit: Tensor, pitch: tuple[float, float] = (30, 70), angles: tuple[int, ...] = (0,)) -> Tensor:
        """Lines 30 to 75 % as dark as the ink, 30 to 70 pixels apart, askew by up to 2 degrees."""
        ink = self.scene(digit)
        apart, askew, strength = self.uniform(*pitch), self.uniform(-2, 2), self.uniform(0.25, 0.6)
        start = self.uniform(0, apart)
        offsets = [start + apart * index - CANVAS for index in range(int(2 * CANVAS / apart))]
        for angle in angles:
            ink = torch.maximum(ink, strength * self.lines(offsets, angle + askew))
        return self.photograph(ink)

    def squared(self, digit: Tensor) -> Tensor:
        """The same both ways, 20 to 50 pixels apart."""
        return self.ruled(digit, (20, 50), (0, 90))

    def cut(self, digit: Tensor) -> Tensor:
        """Cut off at each side between 4 % within the digit and 4 % outside."""
        ink = self.scene(digit)
        top, bottom, left, right = cropped(ink)[1]
        longer = max(bottom + 1 - top, right + 1 - left)
        slack = [round(0.04 * self.uniform(-1, 1) * longer) for _ in range(4)]
        return self.photograph(ink)[top - slack[0] : bottom + 1 + slack[1], left - slack[2] : right + 1 + slack[3]]

    def tiny(self, digit: Tensor) -> Tensor:
        """30 to 60 pixels high in a picture of 1,000."""
        scale, ink = self.uniform(30, 60) / (0.5 * CANVAS), self.scene(digit)[None, None]
        ink = F.interpolate(ink, scale_factor=scale, mode="bilinear", antialias=True)[0, 0]
        return self.photograph(self.place(ink, 1000))

    def low_contrast(self, digit: Tensor) -> Tensor:
        """A pencil: ink that takes 10 to 20 % of the light, in noise."""
        return self.photograph(self.scene(digit), strength=self.uniform(0.1, 0.2))

    def colour_ink(self, digit: Tensor) -> Tensor:
        """Ink of any hue on white or tinted paper, float (H, W, 3), yellow on white among it."""
        ink = self.scene(digit)[..., None]
        colour = torch.tensor(colorsys.hsv_to_rgb(self.uniform(0, 1), 1, self.uniform(0.6, 1)))
        paper = torch.tensor(colorsys.hsv_to_rgb(self.uniform(0, 1), self.uniform(0, 0.25), 0.9))
        return (paper * (1 - ink) + 0.9 * colour * ink + 0.012 * self.noise(CANVAS, CANVAS, 3)).clamp(0, 1)

    def letter(self, index: int) -> Tensor:
        """One in Pillow's own font, dark on light."""
        picture, font = Image.new("L", (CANVAS, CANVAS), 230), ImageFont.load_default(int(self.uniform(80, 160)))
        ImageDraw.Draw(picture).text((CANVAS / 2, CANVAS / 2), LETTERS[index % len(LETTERS)], 40, font, anchor="mm")
        return torch.from_numpy(np.array(picture)) / 255

    def number(self, inks: list[Tensor]) -> Tensor:
        """Digits in a row, 50 to 80 pixels high, 8 to 50 % of that apart, not quite level."""
        height = self.uniform(50, 80)
        spacing = self.uniform(0.08, 0.5) * height
        x, canvas = 40.0, torch.zeros(200, 1400)
        for ink in inks:
            ink, _ = cropped(ink)
            scale = height * self.uniform(0.9, 1.1) / ink.shape[0]
            ink = resized(ink, [max(2, round(side * scale)) for side in ink.shape])
            y = 55 + int(self.uniform(0, 0.1) * height)
            canvas[y : y + ink.shape[0], int(x) : int(x) + ink.shape[1]] = ink
            x += ink.shape[1] + spacing * self.uniform(0.7, 1.3)
        return self.photograph(canvas[:, : int(x) + 40])


def read(picture: Tensor) -> Tensor:
    """What the network sees of a picture, nothing where it is refused; colours go by way of a file."""
    levels, file = picture.numpy(), BytesIO()
    try:
        if picture.dim() == 3:
            Image.fromarray((levels * 255).round().astype(np.uint8)).save(file, format="PNG")
            levels = prepare.grey_levels(file)
        return prepare.find_one(levels)[0]
    except UserError:
        return torch.zeros(1, 28, 28, dtype=torch.uint8)


def read_numbers(network: nn.Module, inks: list[Tensor], labels: list[int]) -> Iterator[bool]:
    """Whether each of 50 numbers, postal codes of 5 and telephone numbers of 8 to 10 digits, is read whole."""
    painter = Painter()
    for index in range(50):
        length = 5 if index % 2 else int(painter.uniform(8, 11))
        chosen = torch.randint(len(inks), (length,), generator=painter.generator).tolist()
        picture = painter.number([inks[choice] for choice in chosen]).numpy()
        found = prepare.split(picture, partial(report.classify, network))
        answers = report.classify(network, torch.stack([seen for _, seen, _ in found if seen is not None])).argmax(1)
        yield answers.tolist() == [labels[choice] for choice in chosen]


def main() -> None:
    parser = make_parser(__doc__, "pictures")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=300, help="digits of each set (300)")
    options = parser.parse_args()
    checkpoint = read_checkpoint(options.checkpoint)
    network, smoothing = load_network(checkpoint), checkpoint["hyper_parameters"].get("label_smoothing", 0.0)
    datasets.prepare(options.root)
    images, targets = datasets.load(options.root, train=False)
    sets = {"MNIST": (images[:, 0] / 255, targets.tolist())}
    sets["load_digits"] = torch.from_numpy(load_digits().images).float() / 16, load_digits().target.tolist()
    rows: list[tuple[str, bool, bool | None]] = []

    def classify(name: str, seen: list[Tensor], labels: list[int]) -> Tensor:
        answers = report.classify(network, torch.stack(seen))
        for p, label in zip(answers.tolist(), labels, strict=False):
            rows.append((name, p.index(max(p)) == label, bool(report.columns(p, smoothing)["unsure"])))
        return answers

    for name, (levels, labels) in sets.items():
        inks = list(levels[: options.count])
        for difficulty in ("as they are", *DIFFICULTIES):
            make = getattr(Painter(), difficulty.replace(" ", "_"), lambda ink: ink)
            classify(f"{name}, {difficulty}", [read(make(ink)) for ink in track(inks, f"{name}, {difficulty}")], labels)
        rows += [(f"{name}, numbers", right, None) for right in read_numbers(network, inks, labels)]
    classify("the whole test set", [*images], sets["MNIST"][1])
    data, limit = {"val_size": 0} | checkpoint["datamodule_hyper_parameters"], None
    if data["val_size"]:
        images, targets = datasets.load(options.root, train=True)
        held_out = stratified_split(targets, data["val_size"], data["split_seed"])[1]
        answers = classify("held out of training", [*images[held_out]], targets[held_out].tolist())
        spread = answers.sqrt().sum(1).quantile(0.99).item()
        limit = round(report.UNSURE + spread - report.most_spread(answers.shape[1], smoothing), 3)
        print(f"1 % of the held-out images are unsure at UNSURE = {limit}")
    classify("letters", [read(letter) for letter in map(Painter().letter, range(200))], [-1] * 200)
    groups = pandas.DataFrame(rows, columns=["pictures", "right", "unsure"]).groupby("pictures", sort=False)
    table = groups["right"].agg(["sum", "count"]).assign(unsure=groups["unsure"].sum())
    print(table.to_string())
    record = {"checkpoint": options.checkpoint.name, "model": dict(checkpoint["hyper_parameters"])}
    append(options, record | {"UNSURE for 1 %": limit, "correct, of, unsure": table.T.to_dict("list")})


if __name__ == "__main__":
    main()
