"""How well a checkpoint reads digits that do not come in MNIST's form.

    python benchmarks/pictures.py lightning_logs/version_0/checkpoints/best-....ckpt

Takes the first 1,000 test images of MNIST, makes pictures of them as people have them (other sizes, inverted, off
centre, on paper in uneven light, with noisy strokes), and brings each back into MNIST's form as `predict --data.images`
does. And scikit-learn's `load_digits`: 1,797 other people's digits of 8x8 pixels, of which the network has seen none.
Prints a table; with `--record` it is appended with its conditions to results/pictures.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from records import add_flag, append
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import functional as F

from lit_mnist import LitMNIST
from lit_mnist.data import images, mnist
from lit_mnist.training.checkpoints import read_checkpoint

COUNT = 1000


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    add_flag(parser, "pictures")
    settings = parser.parse_args()
    read_checkpoint(settings.checkpoint)
    model = LitMNIST.load_from_checkpoint(settings.checkpoint, map_location="cpu", weights_only=True)
    network = model.network.eval()
    mnist.prepare(settings.root)
    originals, targets = mnist.load(settings.root, train=False)
    originals, targets = originals[:COUNT], targets[:COUNT]

    @torch.inference_mode()
    def correct(digits: Tensor, expected: Tensor) -> int:
        return int((network(digits).argmax(1) == expected).sum())

    rows = {"as they are": (correct(originals, targets), COUNT)}
    for name, variant in VARIANTS.items():
        generator = Generator().manual_seed(0)
        made = (variant(image[0] / 255, generator) for image in originals)
        digits = torch.stack([images.digit(levels) for levels in track(made, name, total=COUNT)])
        rows[name] = correct(digits, targets), COUNT
    others = load_digits()
    digits = torch.stack([images.digit(torch.from_numpy(levels).float() / 16) for levels in others.images])
    rows["load_digits, 8x8"] = correct(digits, torch.from_numpy(others.target)), len(others.target)

    print(f"\n{'pictures':<20}{'correct':>12}{'accuracy %':>12}")
    for name, (right, count) in rows.items():
        print(f"{name:<20}{f'{right}/{count}':>12}{100 * right / count:>12.2f}")
    record = {"checkpoint": settings.checkpoint.name, "model": dict(model.hparams), "correct": rows}
    append(settings, record)


if __name__ == "__main__":
    main()
