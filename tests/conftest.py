"""What the tests share: a tiny MNIST that a network learns in seconds, the real one, and no network."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest
import torch
from torch import nn

from lit_mnist import DigitNet
from lit_mnist.__main__ import main
from lit_mnist.data import datasets, download
from lit_mnist.exact.errors import UserError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

REPOSITORY = Path(__file__).parent.parent


def write_tiny_mnist(raw: Path, train: int = 400, test: int = 100) -> dict[str, datasets.IDXFile]:
    """Write four IDX files into RAW, each class a pattern of its own plus noise, the classes in equal numbers.

    Returns:
        What `datasets.FILES` has to be for them to verify. The same sizes give the same files on every machine.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    patterns = np.kron(generator.integers(0, 2, (10, 7, 7)), np.ones((4, 4), np.int64)) * 180
    raw.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        labels = generator.permutation(np.arange(count) % 10).astype(np.uint8)
        images = (patterns[labels] + generator.integers(0, 75, (count, 28, 28))).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            content = header + array.tobytes()
            (raw / name).write_bytes(content)
            files[name] = datasets.IDXFile(len(content), hashlib.sha256(content).hexdigest())
    return files


@pytest.fixture
def tiny_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with 400 training and 100 test images, which `mnist` takes for the real ones."""
    root = tmp_path / "tiny"
    monkeypatch.setattr(datasets, "FILES", write_tiny_mnist(root / "MNIST" / "raw"))
    return root


@pytest.fixture
def command(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command with the tiny data set, from a folder of its own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return lambda name, *flags: main([name, "--data.root", str(tiny_root), *flags])


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """An untrained network of 502 parameters, and in the current folder the checkpoint that Lightning would write."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = DigitNet("4x5/2 8/2", activation="silu").eval().to(memory_format=torch.channels_last)
    folder = Path("lightning_logs/version_0/checkpoints")
    folder.mkdir(parents=True)
    checkpoint = {
        "state_dict": {f"network.{name}": weights for name, weights in network.state_dict().items()},
        "hyper_parameters": {"layers": "4x5/2 8/2", "activation": "silu", "classes": 10},
        "datamodule_hyper_parameters": {"name": "mnist"},
        **{"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6"},
    }
    torch.save(checkpoint, folder / "best-epoch=00-accuracy=0.1000.ckpt")
    return network


@pytest.fixture(scope="session")
def real_root() -> Path:
    """A data root with the real MNIST: LIT_MNIST_ROOT, or `data` in the repository, fetched where it is missing."""
    root = Path(os.environ.get("LIT_MNIST_ROOT") or REPOSITORY / "data")
    try:
        datasets.prepare(root)
    except UserError as error:
        if os.environ.get("LIT_MNIST_REQUIRE_DATA") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    return root


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    """Chromium without a window, which keeps a log of its requests."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver here (Debian's packages chromium and chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    for flag in [*quiet, "--window-size=1600,1200"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a test that asks a source of data. `real_root` has done so before: session fixtures are made first.

    A test with sources of its own replaces `mirrors` and `_pip_download` once more.
    """

    def stop(*_: object) -> NoReturn:
        pytest.fail("a test must not reach the network")

    monkeypatch.setattr(download, "mirrors", stop)
    monkeypatch.setattr(download, "_pip_download", stop)
