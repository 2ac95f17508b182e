"""How fast batches of 128 normalised images come: from tensors in memory, and as text books do it.

    python benchmarks/input_path.py

Both give float (128, 1, 28, 28), shuffled, from MNIST's 60,000 training images, in one process without workers: ours by
`TensorBatches` and `normalise`, the other by `DataLoader` over torchvision's `MNIST` with `ToTensor` and `Normalize`.
They take turns in one run, because timings on shared machines drift. Prints a table; with `--record` the
figures are appended with their conditions to results/input_path.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch
from records import add_flag, append
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.network import MEAN, STD, normalise

BATCH_SIZE = 128


def images_per_second(batches: Iterable[Any], limit: int, raw: bool) -> float:
    images_seen = 0
    started = perf_counter()
    for images, _ in batches:
        images_seen += len(normalise(images) if raw else images)
        if images_seen >= limit:
            break
    return images_seen / (perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    parser.add_argument("--rounds", type=int, default=7, help="how often both are measured, in turns (7)")
    add_flag(parser, "input_path")
    settings = parser.parse_args()

    datasets.prepare(settings.root)
    ours = TensorBatches(*datasets.load(settings.root, train=True), BATCH_SIZE, seed=1)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    theirs = DataLoader(datasets.MNIST(settings.root, transform=transform), BATCH_SIZE, shuffle=True)

    first, _ = next(iter(theirs))
    assert first.shape == normalise(next(iter(ours))[0]).shape
    image, _ = theirs.dataset[7]
    torch.testing.assert_close(normalise(ours.images[7]), image)  # the same image comes out the same

    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in track(range(settings.rounds), "measuring"):
        ours.sampler.set_epoch(number)
        rates["ours"].append(images_per_second(ours, 60_000, raw=True))
        rates["theirs"].append(images_per_second(theirs, 6_000, raw=False))
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
    print(f"\n{'images a second':<28}{'median':>12}{'lowest':>12}{'highest':>12}")
    for name, label in (("ours", "TensorBatches"), ("theirs", "DataLoader, ToTensor")):
        low, high = min(rates[name]), max(rates[name])
        print(f"{label:<28}{statistics.median(rates[name]):>12,.0f}{low:>12,.0f}{high:>12,.0f}")
    print(f"{'ratio within a round':<28}{statistics.median(ratios):>12.1f}{min(ratios):>12.1f}{max(ratios):>12.1f}")

    record = {"batch_size": BATCH_SIZE, **rates, "median_ratio": statistics.median(ratios)}
    append(settings, record)


if __name__ == "__main__":
    main()
