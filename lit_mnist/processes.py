"""A run on more than one process: how they are started and joined, what they tell each other, and a lost one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import sleep
from typing import Any, TypeVar

import torch.distributed
from lightning_fabric.strategies.launchers import subprocess_script
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# public since torch 2.15
set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout


class Processes:
    """How processes work together.

    Args:
        timeout: seconds that one waits for another until it is taken for lost. One that ends is noticed at once; this
            is for machines that vanish and links that are cut. Before the training starts it is half an hour.

    Raises:
        ValueError: it is no positive number.
    """

    def __init__(self, timeout: float = 120.0) -> None:
        if not 0 < timeout <= 86_400:
            raise ValueError(f"processes.timeout must be a number of seconds in (0, 86400], got {timeout}")
        self.timeout = timeout


class ExactDDP(DDPStrategy):
    """DDPStrategy whose sums come out the same in a resumed run, and which waits for a lost process a bounded time.

    Args:
        waiting: seconds that a process waits for another, once training or scoring begins.
        synchronized: whether batch norm is; else each forward takes the running statistics of the first process.
    """

    def __init__(self, waiting: float, synchronized: bool, **settings: Any) -> None:
        super().__init__(broadcast_buffers=not synchronized, **settings)
        self._waiting = timedelta(seconds=waiting)

    def _configure_launcher(self) -> None:
        subprocess_script._ChildProcessObserver = Observer  # type: ignore[misc]
        super()._configure_launcher()
        assert self.cluster_environment is not None
        self.started_outside = self.cluster_environment.creates_processes_externally  # it says so behind a launch, too

    def setup_distributed(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        # where the user starts the others
        elsewhere = self.num_nodes > 1 or (self.started_outside and self.num_processes > 1 and launched() == (1, 1))
        if elsewhere and self.global_rank == 0:
            where = f"{environment.main_address}:{environment.main_port}"
            others = f"the processes of {self.num_nodes} machines" if self.num_nodes > 1 else "the other processes"
            print(f"Waiting at {where} for {others}", file=sys.stderr, flush=True)
        super().setup_distributed()

    def configure_ddp(self) -> None:
        super().configure_ddp()
        # DDP of torch 2.15 lays the gradients in another order behind its first step, and three or more processes then
        # add each of them in another order: the steps of a resumed run would have other bits. Here it does so at
        # once, in the order of the parameters. (It never does with find_unused_parameters, but then searches for them
        # in each step, and warns that it found none.)
        assert isinstance(self.model, DistributedDataParallel)
        self.model.reducer._push_all_rebuilt_params()
        self.model.reducer._rebuild_buckets()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # not from the beginning: the others wait while the first fetches the data
        set_timeout(self._waiting)


class Observer(subprocess_script._ChildProcessObserver):
    """Ends the first process some seconds after one that it started has failed.

    That of Lightning 2.6 does so at once and without a word, before the first process itself could find out, say where
    the run can be resumed, and leave in good order.
    """

    def _terminate_all(self) -> None:
        sleep(self._sleep_period)
        status = {number: process.returncode for number, process in enumerate(self._child_processes, 1)}
        failed = ", ".join(f"process {number} with status {code}" for number, code in status.items() if code)
        print(f"lit_mnist: error: {failed} has ended; ending the others", file=sys.stderr)
        super()._terminate_all()


def launched() -> tuple[int, int]:
    """The processes on each machine and the machines that torchrun or SLURM has started; (1, 1) without them.

    Lightning 2.6 has to be told, and where it is not, every process trains on its own.
    """
    environment = os.environ
    try:
        if torch.distributed.is_torchelastic_launched():
            processes = int(environment["LOCAL_WORLD_SIZE"])
            return processes, int(environment["WORLD_SIZE"]) // processes
        if "SLURM_STEP_NUM_TASKS" in environment:  # by srun; within an allocation alone nothing is started
            machines = int(environment["SLURM_STEP_NUM_NODES"])
            return int(environment["SLURM_STEP_NUM_TASKS"]) // machines, machines
    except (KeyError, ValueError):
        pass  # Lightning complains
    return 1, 1


@contextmanager
def environment_kept() -> Iterator[None]:
    """Take back what Lightning 2.6 leaves in the environment when it launches: the next run of this process would take
    itself for one that was launched, and wait for others that nobody starts.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def every(own: T) -> list[T]:
    """What each process gives, in their order, on all of them. All must call it."""
    if not torch.distributed.is_initialized():
        return [own]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return parts


def joined(own: list[T]) -> list[T]:
    """What each process has of each batch: on the first one list in the order of the images, on the others nothing.

    All must call it.
    """
    if not torch.distributed.is_initialized():
        return own
    first = torch.distributed.get_rank() == 0
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(own, parts if first else None)
    return [part for batch in zip(*parts, strict=True) for part in batch] if first else []


def log_folder(trainer: Trainer) -> str | None:
    """The folder of the run as this process knows it: right on the first, and without asking the others.

    `Trainer.log_dir` is the first one's on all of them, and all must ask for it together.
    """
    if not trainer.loggers:
        return None
    logger: Logger = trainer.loggers[0]
    return str(logger.log_dir or logger.save_dir)


def lost(error: BaseException) -> str:
    """How the connection to another process broke, or nothing where the error is of another kind."""
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    ):
        if causes := re.findall(r"Last error:\s*(.+)", str(error)):  # NCCL's
            return causes[-1].strip()[:150]
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return re.sub(r"^\[\S+\] ", "", line).partition(". ")[0][:150]  # without a place in gloo's source, and advice
    return ""
