"""How fast batches of 128 normalised images come: from tensors in memory, and as textbooks make them.

    python benchmarks/input_path.py

Both give float (128, 1, 28, 28), shuffled, from MNIST's 60,000 training images, in one process without workers: ours by
`TensorBatches` and `normalise`, theirs by `DataLoader` over torchvision's `MNIST` with `ToTensor` and `Normalize`. They
take turns, because timings on shared machines drift. `--record` appends the figures to results/input_path.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from records import add_flag, append
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.network import MEAN, STD, normalise


def images_per_second(batches: Iterable[Any], raw: bool) -> float:
    images_seen, started = 0, perf_counter()
    for images, _ in batches:
        images_seen += len(normalise(images) if raw else images)
    return images_seen / (perf_counter() - started)


parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("--root", default="data", help="folder of the data (data)")
parser.add_argument("--rounds", type=int, default=7, help="how often both are measured, in turns (7)")
add_flag(parser, "input_path")
settings = parser.parse_args()
datasets.prepare(settings.root)
ours = TensorBatches(*datasets.load(settings.root, train=True), 128, seed=1)
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
theirs = DataLoader(MNIST(settings.root, transform=transform), 128, shuffle=True)
torch.testing.assert_close(normalise(ours.images[7]), theirs.dataset[7][0])  # the same image comes out the same
rates: dict[str, list[float]] = {"ours": [], "theirs": []}
for number in range(settings.rounds):
    ours.sampler.set_epoch(number)
    rates["ours"].append(images_per_second(ours, raw=True))
    rates["theirs"].append(images_per_second(islice(theirs, 47), raw=False))
ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
for name, values in (*rates.items(), ("ratio", ratios)):
    print(f"{name:<8} median {statistics.median(values):>12,.1f}, {min(values):,.1f} to {max(values):,.1f}")
append(settings, {"batch_size": 128, **rates, "median_ratio": statistics.median(ratios)})
