"""Peak memory, startup and seconds a step of `fit` on many images: MNIST's, over and over, as a user's own IDX files.

fit     200 steps with 5,000 images held out. A run's peak beyond that of the smallest set is divided by the bytes of
        its files, which are read once before; its startup, until the first step, by the seconds of that.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, time

import numpy as np
import pandas
from gpu import Options, Record
from records import REPOSITORY, make_parser, measure

from lit_mnist.data import datasets
from lit_mnist.exact.runs import read_results

FLAGS = ["--data.name=idx", "--data.val_size=5000", "--trainer.max_steps=200", "--board.every_n_epochs=0"]


def write_files(folder: Path, root: Path, count: int) -> None:
    for part, train in (("train", True), ("t10k", False)):
        for name, tensor in zip(("images-idx3", "labels-idx1"), datasets.load(root, train), strict=True):
            values = tensor.squeeze().byte().numpy()
            total = count if train else len(values)
            with (folder / f"{part}-{name}-ubyte").open("wb") as file:
                file.write(np.array([0x800 + values.ndim, total, *values.shape[1:]], ">u4").tobytes())
                for start in range(0, total, len(values)):
                    file.write(values[: total - start].data)


def fit(options: Options) -> Iterator[Record]:
    found = []
    for count in options.images:
        with TemporaryDirectory(dir=options.folder) as folder:
            write_files(Path(folder), options.root, count)
            for checkout in options.checkouts:
                started = perf_counter()
                size = sum(np.fromfile(path, np.uint8).nbytes for path in Path(folder).glob("*-ubyte"))
                reading, began = perf_counter() - started, time()
                command = [sys.executable, "-m", "lit_mnist", "fit", *FLAGS, "--data.root=.", *options.flags]
                environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
                process = subprocess.Popen(command, cwd=folder, env=environment)
                _, status, used = os.wait4(process.pid, 0)
                if status:
                    raise SystemExit(f"fit on {count:,} images ended with {status}")
                run = max(Path(folder, "lightning_logs").glob("version_*"), key=os.path.getctime)
                result = read_results(run)["fit"]
                found.append({"checkout": checkout.name, "images": count, "bytes": size, "peak": 1024 * used.ru_maxrss})
                found[-1] |= {"reading": reading, "seconds": result["train_seconds"], "all": time() - began}
    table = pandas.DataFrame(found)
    smallest = table.groupby("checkout")["peak"].transform("first")
    table["over bytes"] = (table["peak"] - smallest) / table["bytes"]
    print(table.to_string(float_format="{:,.2f}".format))
    yield {"fits": table.to_dict("records")}


if __name__ == "__main__":
    parser = make_parser(__doc__, "memory")
    parser.add_argument("--images", type=int, nargs="+", default=[60_000, 2_000_000], help="in each set")
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[REPOSITORY], help="versions to compare, in turns")
    parser.add_argument("--folder", type=Path, help="for the sets of images, which are large (the temporary one)")
    sys.exit(measure(parser, {"fit": fit}))
