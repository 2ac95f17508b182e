"""Commands on several processes at once, which tests start without a launcher: seconds instead of tens of seconds."""

import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from helpers import LONGEST, Outcome, fail, in_processes, kill_before

from lit_mnist.__main__ import main
from lit_mnist.data import datamodule, datasets
from lit_mnist.module import LitMNIST


class Death(NamedTuple):
    """A process that ends in front of a training step (of all, counted from 1), or is held there."""

    rank: int
    step: int
    signum: int = signal.SIGKILL


def run(
    processes: int,
    arguments: Sequence[str],
    folder: Path,
    files: dict[str, str],
    death: Death | None = None,
    environment: Sequence[dict[str, str]] | None = None,
    longest: float = LONGEST,
) -> list[Outcome]:
    """Run `main(arguments)` in the folder on each of the processes, and return how each ended."""
    flags = [*arguments, *([f"--trainer.devices={processes}"] if environment is None else [])]
    calls = [(rank, flags, files, death) for rank in range(processes)]
    return in_processes(folder, _command, *calls, variables=environment, longest=longest)


def _command(rank: int, flags: list[str], files: Any, death: Death | None) -> int:
    datasets.FILES = files
    datamodule.EVALUATION_BATCH_SIZE = 11  # several batches a validation, and parts of different sizes
    if rank and os.environ.keys() & {"LOCAL_RANK", "SLURM_LOCALID"}:
        datasets.prepare = partial(fail, AssertionError("only the first process prepares the data"))
    if death and death.rank == rank:
        kill_before(death.step, LitMNIST, death.signum)
    return main(flags)
