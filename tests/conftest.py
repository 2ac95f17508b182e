import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: each of the test processes has one core

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, Command, Patch, write_tiny_mnist
from torch import nn

from lit_mnist.__main__ import main
from lit_mnist.data import datasets
from lit_mnist.exact.console import UserError
from lit_mnist.network import DIGITS, DigitNet


@pytest.fixture
def tiny_root(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A data root with 400 training and 100 test images, which `mnist` takes for the real ones."""
    monkeypatch.setattr(datasets, "FILES", write_tiny_mnist(tmp_path / "tiny" / "MNIST" / "raw"))
    return tmp_path / "tiny"


@pytest.fixture
def command(tiny_root: Path, tmp_path: Path, monkeypatch: Patch) -> Command:
    """Run a command with the tiny data set, from an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return lambda name, *flags: main([name, "--data.root", str(tiny_root), *flags])


@pytest.fixture
def network(tmp_path: Path, monkeypatch: Patch) -> nn.Module:
    """An untrained network of 502 parameters, and in the current folder the checkpoint that Lightning would write."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = DigitNet("4x5/2 8/2", 0.0, "silu", 10, DIGITS).eval().to(memory_format=torch.channels_last)
    folder = Path("lightning_logs/version_0/checkpoints")
    folder.mkdir(parents=True)
    settings = {"network": "digitnet", "layers": "4x5/2 8/2", "activation": "silu", "dropout": 0.0, "classes": 10}
    checkpoint = {
        "state_dict": {f"network.{name}": weights for name, weights in network.state_dict().items()},
        "hyper_parameters": settings,
        "datamodule_hyper_parameters": {"name": "mnist"},
        **{"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6"},
    }
    torch.save(checkpoint, folder / "best-epoch=00-accuracy=0.1000.ckpt")
    return network


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    """Leave a process group that torch keeps from a test's run: another's may be of another kind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a folder in which `fit` has trained once, for `trained` to copy."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--model.layers", "4x5/2 8/2", "--data.batch_size", "20", "--data.val_size", "40"]
    flags += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--board.every_n_epochs", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets, "FILES", write_tiny_mnist(folder / "tiny" / "MNIST" / "raw"))
        assert main(["fit", "--data.root", "tiny", *flags]) == 0
    return folder / "lightning_logs"


@pytest.fixture
def trained(finished: Path, command: Command) -> Path:
    """A finished run of two epochs of 18 steps: `lightning_logs/version_0` in the folder of `command`."""
    return shutil.copytree(finished, Path.cwd() / "lightning_logs") / "version_0"


@pytest.fixture(scope="session")
def real_root() -> Path:
    """A data root with the real MNIST: LIT_MNIST_ROOT, or `data` in the repository, fetched where it is missing."""
    root = Path(os.environ.get("LIT_MNIST_ROOT") or REPOSITORY / "data")
    try:
        datasets.prepare(root)
    except UserError as error:
        (pytest.fail if os.environ.get("LIT_MNIST_REQUIRE_DATA") == "1" else pytest.skip)(str(error))
    return root


@pytest.fixture(params=["Chrome chromium chromedriver", "Firefox firefox-esr geckodriver"])
def browser(request: Any) -> Iterator[Any]:
    """Each browser without a window, Firefox in dark mode."""
    name, *programs = request.param.split()
    program, driver = map(shutil.which, programs)
    if not program or not driver:
        pytest.skip(f"no {request.param} here")
    from selenium import webdriver  # takes a while, and few tests need it

    options, service = getattr(webdriver, f"{name}Options")(), getattr(webdriver, f"{name}Service")(driver)
    options.binary_location, options.enable_bidi = program, True
    options.add_argument("--headless")
    if name == "Chrome":
        options.add_argument("--no-sandbox")
    else:
        options.set_preference("layout.css.prefers-color-scheme.content-override", 0)  # dark
    with getattr(webdriver, name)(options, service) as browser:
        yield browser


@pytest.fixture(autouse=True)
def no_network(monkeypatch: Patch) -> None:
    """Stop a test that asks another machine. `real_root` has asked before: session fixtures are made first."""
    resolve = socket.getaddrinfo

    def resolve_local(host: Any, *args: Any, **keywords: Any) -> Any:
        if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname()):
            pytest.fail(f"a test must not reach the network: {host}")
        return resolve(host, *args, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_local)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
