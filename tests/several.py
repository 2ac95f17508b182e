"""Commands on several processes at once, which tests start without a launcher: seconds instead of tens of seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_mnist.__main__ import main
from lit_mnist.data import datasets

# one process imports everything once, and the others are forked from it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lit_mnist.cli.cli", "tensorboard", "torch.utils.tensorboard"])
LONGEST = 120  # seconds: a test must fail, not hang


class Outcome(NamedTuple):
    status: int | None  # negative for a signal
    out: str
    err: str


class Death(NamedTuple):
    """A process that ends in front of a training step (of all, counted from 1), or is held there."""

    rank: int
    step: int
    signum: int = signal.SIGKILL


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run(
    processes: int,
    arguments: Sequence[str],
    folder: Path,
    files: dict[str, str],
    death: Death | None = None,
    environment: Sequence[dict[str, str]] | None = None,
    patience: float = LONGEST,
) -> list[Outcome]:
    """Run `main(arguments)` in the folder on each of the processes, and return how each ended."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    flags = [*arguments, *(["--trainer.devices", str(processes)] if environment is None else [])]
    started, outcomes = [], []
    for rank in range(processes):
        own = {"LOCAL_RANK": str(rank), "NODE_RANK": "0"} if environment is None else environment[rank]
        own_death = death if death and death.rank == rank else None
        process = CONTEXT.Process(target=_one, args=(rank, flags, str(folder), files, {**common, **own}, own_death))
        process.start()
        started.append(process)
    for rank, process in enumerate(started):
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
        texts = [(folder / f".{name}-{rank}").read_text() for name in ("out", "err")]
        outcomes.append(Outcome(process.exitcode, *texts))
    return outcomes


def _forbidden(*_: Any) -> None:
    raise AssertionError("only the first process prepares the data")


def _one(rank: int, flags: list[str], folder: str, files: Any, variables: dict[str, str], death: Death | None) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f".{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch

    from lit_mnist.data import datamodule
    from lit_mnist.module import LitMNIST

    torch.set_num_threads(1)
    datasets.FILES = files
    datamodule.EVALUATION_BATCH_SIZE = 11  # several batches a validation, and parts of different sizes
    if rank and any(name in variables for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        datasets.prepare = _forbidden  # type: ignore[assignment]  # the first alone fetches data
    if death:
        original = LitMNIST.training_step
        left = [death.step]

        def training_step(self: LitMNIST, batch: Any, batch_idx: int) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), death.signum)
            return original(self, batch, batch_idx)

        LitMNIST.training_step = training_step  # type: ignore[method-assign]
    raise SystemExit(main(flags))
