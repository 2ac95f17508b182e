"""Peak memory and times of `fit`, 200 steps with 5,000 images held out, on MNIST's images over and over as IDX files.

Beyond that of the first number of images, a peak is divided by the bytes of the files.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

import numpy as np
import pandas
from gpu import Options, Record
from records import REPOSITORY, make_parser, measure

from lit_mnist.data import datasets
from lit_mnist.exact.runs import read_results

FLAGS = ["--data.name=idx", "--data.val_size=5000", "--trainer.max_steps=200", "--board.every_n_epochs=0"]


def write_files(folder: Path, root: Path, count: int) -> None:
    for part in ("train", "t10k"):
        for name, tensor in zip(("images-idx3", "labels-idx1"), datasets.load(root, part == "train"), strict=True):
            values, total = tensor.squeeze().byte().numpy(), count if part == "train" else len(tensor)
            with (folder / f"{part}-{name}-ubyte").open("wb") as file:
                file.write(np.array([0x800 + values.ndim, total, *values.shape[1:]], ">u4").tobytes())
                file.writelines(values[: total - start].data for start in range(0, total, len(values)))


def fit(options: Options) -> Iterator[Record]:
    found = []
    for count in options.images:
        with TemporaryDirectory() as folder:
            write_files(Path(folder), options.root, count)
            started, files = time(), [path.open("rb") for path in Path(folder).glob("*-ubyte")]
            size = sum(len(block) for file in files for block in iter(partial(file.read, 2**24), b""))
            reading, began = time() - started, time()
            command = [sys.executable, "-m", "lit_mnist", "fit", *FLAGS, "--data.root=.", *options.flags]
            process = subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
            used, seconds = os.wait4(process.pid, 0)[2], time() - began
            trained = read_results(Path(folder, "lightning_logs", "version_0"))["fit"]["train_seconds"]
            row = {"images": count, "bytes": size, "peak": 1024 * used.ru_maxrss}
            found.append({**row, "reading": reading, "all": seconds, "seconds": trained})
    table = pandas.DataFrame(found)
    table["over bytes"] = (table["peak"] - table["peak"][0]) / table["bytes"]
    print(table.to_string(float_format="{:,.2f}".format))
    yield {"fits": table.to_dict("records")}


if __name__ == "__main__":
    parser = make_parser(__doc__, "memory")
    parser.add_argument("--images", type=int, nargs="+", default=[60_000, 2_000_000], help="in each set")
    sys.exit(measure(parser, {"fit": fit}))
