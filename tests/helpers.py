"""What the tests share: a tiny MNIST, the comparison of checkpoints, and commands in processes of their own."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.__main__ import main
from lit_mnist.data import datamodule, datasets
from lit_mnist.module import LitMNIST

REPOSITORY = Path(__file__).parent.parent
RUN = Path("lightning_logs/version_0")
TINY = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"]
TINY += ["--model.layers", "4x5/2 8/2", "--model.lr", "0.05", "--data.batch_size", "50", "--data.val_size", "50"]
Command = Callable[..., int]
Capsys = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
CONTEXT = multiprocessing.get_context("forkserver")  # one process imports everything once, the others are its forks
CONTEXT.set_forkserver_preload(["lit_mnist.cli.cli", "tensorboard", "torch.utils.tensorboard"])


class Outcome(NamedTuple):
    status: int | None  # negative for a signal
    out: str
    err: str


def write_tiny_mnist(raw: Path, train: int = 400, test: int = 100, classes: int = 10) -> dict[str, str]:
    """Write four IDX files, each class a pattern plus noise, and give what `datasets.FILES` must be for them."""
    generator = np.random.Generator(np.random.PCG64(0))
    patterns = np.kron(generator.integers(0, 2, (classes, 7, 7)), np.ones((4, 4), np.int64)) * 180
    raw.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, size in (("train", train), ("t10k", test)):
        labels = generator.permutation(np.arange(size) % classes).astype(np.uint8)
        images = (patterns[labels] + generator.integers(0, 75, (size, 28, 28))).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()
            (raw / name).write_bytes(content)
            files[name] = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return files


def fails(capsys: Capsys, *args: str, run: Command | None = None, status: int = 2) -> str:
    """Run a command that must end with this status and one line on stderr, and return that line."""
    capsys.readouterr()
    assert (run(*args) if run else main(args)) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def assert_same(ours: Any, theirs: Any, path: str = "", ignored: str = "") -> None:
    """Compare two trees of a checkpoint bit for bit, types included, but for keys that match a pattern."""
    assert type(ours) is type(theirs), f"{path}: {ours!r}, not {theirs!r}"[-300:]
    if isinstance(ours, dict | list | tuple):
        ours, theirs = (
            {key: value for key, value in pairs if not re.fullmatch(ignored, str(key))}
            for pairs in (each.items() if isinstance(each, dict) else enumerate(each) for each in (ours, theirs))
        )
        assert ours.keys() == theirs.keys(), f"{path}: {sorted(map(str, ours.keys() ^ theirs.keys()))}"
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}/{key}", ignored)
    elif isinstance(ours, torch.Tensor):
        both = (ours.dtype, ours.shape), (theirs.dtype, theirs.shape)
        assert both[0] == both[1], f"{path}: {both}"
        one, other = (each.detach().to_dense().flatten().contiguous().view(torch.uint8) for each in (ours, theirs))
        assert torch.equal(one, other), f"{path}: {ours}, not {theirs}"
    else:
        assert ours == theirs, f"{path}: {ours}, not {theirs}"


class Hostile:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("run by the pickle",)


class Killed(BaseException):
    """Stands for kill -9 in process. Lightning's own way out is still taken; benchmarks/kill.py kills for real."""


def fail(error: BaseException, *_: Any, **__: Any) -> NoReturn:
    raise error


def at_call(number: int, act: Callable[[], object], owner: Any, name: str) -> Any:
    """Return a patch by which a function acts in its n-th call, counted from 1, before it does what it did."""
    original, calls = getattr(owner, name), count(1)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return original(*args, **kwargs)

    return patch.object(owner, name, hooked)


def watch(monkeypatch: Patch, watcher: Callable[[LitMNIST, Any], object]) -> None:
    """Call it before each training step with the module and the batch."""
    original = LitMNIST.training_step

    def watched(self: LitMNIST, batch: Any, batch_idx: int) -> torch.Tensor:
        watcher(self, batch)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitMNIST, "training_step", watched)


def last(run: Path = RUN) -> Path:
    (path,) = run.glob("checkpoints/last-epoch=[0-9][0-9]-*.ckpt")
    return path


def last_checkpoint(run: Path = RUN) -> dict[str, Any]:
    return dict(torch.load(last(run), weights_only=True))


def outcome(run: Path) -> dict[str, Any]:
    """Return every tensor of the last and best checkpoint, every logged value, and the files' names, but no timings."""
    loaded = last_checkpoint(run)
    best = [torch.load(path, weights_only=True)["state_dict"] for path in run.glob("checkpoints/best-*.ckpt")]
    del loaded["conditions"], loaded["curves"]
    del loaded["callbacks"]["Progress"]  # timings
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*.ckpt"))
    return {"state": loaded, "best": best, "curves": scalars(run), "files": files}


def assert_alike(ours: Path, theirs: Path) -> None:
    assert_same(outcome(ours), outcome(theirs))


def results(run: Path = RUN) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what `fit` logged for TensorBoard, but for timings: steps with values (a picture its size) by tag."""
    logged = events(run)
    tags = [tag for tag in logged.Tags()["scalars"] if tag != "epoch" and "per_second" not in tag]
    values = {tag: sorted((event.step, event.value) for event in logged.Scalars(tag)) for tag in tags}
    for tag in logged.Tags()["images"]:
        values[tag] = sorted((event.step, float(len(event.encoded_image_string))) for event in logged.Images(tag))
    return values


def in_processes(
    folder: Path, target: Callable[..., Any], *calls: tuple[Any, ...], variables: Any = None, longest: float = 120
) -> list[Outcome]:
    """Make several calls at once, each in a forked process with this current folder; a result is an exit status.

    What a process finds in its environment says that it is one of several, unless `variables` of each say else.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "OMP_NUM_THREADS": "1"}
    variables = variables or [{"LOCAL_RANK": str(n), "NODE_RANK": "0"} if calls[1:] else {} for n in range(len(calls))]
    started = [
        CONTEXT.Process(target=_enter, args=(folder, rank, common | own, target, call))
        for rank, (own, call) in enumerate(zip(variables, calls, strict=True))
    ]
    for process in started:
        process.start()
    outcomes = []
    for rank, process in enumerate(started):
        process.join(longest)  # a test must fail, not hang
        process.kill()
        process.join()
        texts = ((folder / f".{name}-{rank}").read_text() for name in ("out", "err"))
        outcomes.append(Outcome(process.exitcode, *texts))
    return outcomes


def _enter(folder: Path, rank: int, variables: dict[str, str], target: Callable[..., Any], call: Any) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f".{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    raise SystemExit(target(*call))


class Death(NamedTuple):
    """A process that ends in front of a training step (of all, counted from 1), or is held there."""

    rank: int  # -1 for the first to get there
    step: int
    signum: int = signal.SIGKILL


def run_on(
    processes: int, flags: Sequence[str], folder: Path, files: dict[str, str], death: Death | None = None, **own: Any
) -> list[Outcome]:
    """Run a command in the folder on several processes, without a launcher: seconds instead of tens of seconds."""
    flags = flags if own.get("variables") else [*flags, f"--trainer.devices={processes}"]
    return in_processes(folder, _command, *((rank, flags, files, death) for rank in range(processes)), **own)


def _command(rank: int, flags: list[str], files: Any, death: Death | None) -> int:
    datasets.FILES = files
    datamodule.EVALUATION_BATCH_SIZE = 11  # several batches a validation, and parts of different sizes
    if rank and os.environ.keys() & {"LOCAL_RANK", "SLURM_LOCALID"}:
        datasets.prepare = partial(fail, AssertionError("only the first process prepares the data"))
    if death and death.rank in (rank, -1):
        kill_before(death.step, LitMNIST, death.signum, once=death.rank < 0)
    return main(flags)


def kill_before(step: int, module: type[LightningModule], signum: int = signal.SIGKILL, once: bool = False) -> None:
    """End this process by a signal before a training step, counted from 1; 0 for never. `once`: of all, only one."""

    def die() -> None:
        with suppress(FileExistsError):
            Path(f".died-{step}").touch(exist_ok=not once)
            os.kill(os.getpid(), signum)

    at_call(step, die, module, "training_step").start()
