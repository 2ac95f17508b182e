"""Cost against size: seconds an epoch and memory, from 10,000 images to 8 million.

    python benchmarks/size.py                        # all sizes: the 8 million take half an hour
    python benchmarks/size.py 10000 60000            # some
    python benchmarks/size.py 8000000 --mapped --steps 1000     # on a file instead of in memory, a part of an epoch

Each size trains for an epoch by `fit` with the default recipe, without held-out images, in a process of its own. More
than 60,000 images are MNIST's repeated, each repetition moved by the augmentation with another seed. The memory is the
system's account of the process: at its peak, and before the training for what Python and the packages take. With
`--mapped` the images lie in a file, of which the system keeps in memory what it has room for.

Prints a table; with `--record` every value is appended with its conditions to results/size.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from records import add_flag, append
from torch import Tensor

from lit_mnist.__main__ import main as lit_mnist
from lit_mnist.data import datasets
from lit_mnist.data.augment import affine, affine_matrices
from lit_mnist.data.batches import seeded_generator

SIZES = (10_000, 20_000, 40_000, 60_000, 8_000_000)
STEP = 10_000  # images are made so many at a time


def memory(field: str) -> float:
    """MB of this process, by the system's account: VmHWM at the peak, VmRSS now, RssAnon without files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def fill(images: Tensor, targets: Tensor, root: str) -> None:
    """MNIST's training set, as often as it takes, each repetition but the first moved at random."""
    originals, labels = datasets.load(root, train=True)
    for start in range(0, len(images), STEP):
        stop = min(start + STEP, len(images))
        part = torch.arange(start, stop) % len(originals)
        moved = originals[part]
        if start >= len(originals):
            moved = affine(moved, affine_matrices(len(moved), 8, 1.5, 0.08, seeded_generator(start)))
        images[start:stop] = moved.round().to(torch.uint8) if moved.is_floating_point() else moved
        targets[start:stop] = labels[part]


def one(size: int, root: str, steps: int, mapped: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as folder:
        shape = size, 1, 28, 28
        started = perf_counter()
        if mapped:
            path = str(Path(folder, "images"))
            images = torch.from_file(path, shared=True, size=size * 784, dtype=torch.uint8).view(shape)
        else:
            images = torch.empty(shape, dtype=torch.uint8)
        before = memory("VmRSS")
        targets = torch.empty(size, dtype=torch.int64)
        fill(images, targets, root)
        make_seconds = perf_counter() - started
        datasets.load = lambda root, train, name="mnist": (images, targets)
        flags = ["fit", "--data.root", root, "--data.val_size", "0", "--trainer.max_epochs", "1"]
        flags += ["--trainer.default_root_dir", folder, "--trainer.accelerator", "cpu"]
        flags += ["--trainer.limit_train_batches", str(steps)] if steps else []
        if status := lit_mnist(flags):
            raise SystemExit(status)
        results = json.loads(Path(folder, "lightning_logs", "version_0", "results.json").read_text())["fit"]
        return {
            "images": size,
            "mapped": mapped,
            "steps": results["steps"],
            "train_seconds": results["train_seconds"],
            "images_per_second": results["samples_per_second"],
            "make_seconds": round(make_seconds, 1),
            "data_mb": round((images.nbytes + targets.nbytes) / 2**20),
            "before_mb": round(before),
            "peak_mb": round(memory("VmHWM")),
            "own_mb": round(memory("RssAnon")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="numbers of images")
    parser.add_argument("--steps", type=int, default=0, help="a part of an epoch; 0 takes all of it (0)")
    parser.add_argument("--mapped", action="store_true", help="images in a file instead of in memory")
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    add_flag(parser, "size")
    options = parser.parse_args()
    root = str(Path(options.root).resolve())
    if options.here:
        print(json.dumps(one(options.sizes[0], root, options.steps, options.mapped)))
        return
    datasets.prepare(root)
    print("| images | data, MB | peak memory, MB | of it before the data, MB | steps | seconds | images a second |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        command = [sys.executable, __file__, str(size), "--here", "--root", root, "--steps", str(options.steps)]
        done = subprocess.run([*command, *["--mapped"] * options.mapped], stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        columns = f"{row['images']:,}", f"{row['data_mb']:,}", f"{row['peak_mb']:,}", f"{row['before_mb']:,}"
        numbers = f"{row['steps']:,}", f"{row['train_seconds']:,.1f}", f"{row['images_per_second']:,.0f}"
        print("| " + " | ".join((*columns, *numbers)) + " |", flush=True)
        append(options, row)


if __name__ == "__main__":
    main()
