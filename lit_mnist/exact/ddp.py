"""A run on more than one process: how they are started and joined, what they tell each other, and a lost one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from time import sleep
from typing import Any, TypeVar

import torch.distributed
from lightning_fabric.strategies.launchers import subprocess_script
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from .console import PROGRAM, number

T = TypeVar("T")
PATIENCE = 5  # seconds between the failure of a process and the end of the others

# public since torch 2.15
set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout


class ExactDDP(DDPStrategy):
    """DDPStrategy whose steps are those of one process, up to rounding: the loss is the mean over the whole batch,
    though parts of it differ in size, sums come out the same in a resumed run, and a lost process is waited for a
    bounded time.

    Args:
        waiting: seconds that a process waits for another, once training or scoring begins.
        synchronized: whether batch norm is; else each forward takes the running statistics of the first process.
    """

    def __init__(self, waiting: float, synchronized: bool, **settings: Any) -> None:
        super().__init__(broadcast_buffers=not synchronized, **settings)
        self.synchronized = synchronized
        self._waiting = timedelta(seconds=waiting)
        self._loop: Trainer | None = None
        self._started_outside = "LOCAL_RANK" in os.environ  # before a launch, which says so too
        subprocess_script._ChildProcessObserver = Observer  # type: ignore[misc]

    def setup_distributed(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        # where the user starts the others
        elsewhere = self.num_nodes > 1 or (self._started_outside and self.num_processes > 1 and launched() == (1, 1))
        if elsewhere and self.global_rank == 0:
            where = f"{environment.main_address}:{environment.main_port}"
            others = f"the processes of {self.num_nodes} machines" if self.num_nodes > 1 else "the other processes"
            print(f"Waiting at {where} for {others}", file=sys.stderr, flush=True)
        super().setup_distributed()

    def configure_ddp(self) -> None:
        super().configure_ddp()
        # DDP of torch 2.15 lays the gradients in another order after its first step, and three or more processes then
        # add each of them in another order: the steps of a resumed run would have other bits. Here it does so at
        # once, in the order of the parameters. (It never does with find_unused_parameters, but then searches for them
        # in each step, and warns that it found none.)
        assert isinstance(self.model, DistributedDataParallel)
        self.model.reducer._push_all_rebuilt_params()
        self.model.reducer._rebuild_buckets()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self._loop = trainer
        # not from the beginning: the others wait while the first fetches the data
        set_timeout(self._waiting)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Weigh the loss of this process's part, so that the mean over all processes is that of the batch."""
        trainer = self._loop
        assert trainer is not None
        start, stop, size = part_of_batch(trainer, trainer.fit_loop.batch_idx, 1)
        weight = (stop - start) * self.world_size / size
        with paused(self.lightning_module, stop == start):
            output = super().training_step(*args, **kwargs)
        if weight == 1:
            return output
        if isinstance(output, Mapping):
            return {**output, "loss": weighted(output["loss"], weight)}
        return output if output is None else weighted(output, weight)


def weighted(loss: Tensor, weight: float) -> Tensor:
    return loss * weight if weight else loss.nan_to_num() * 0  # the mean of nothing is not a number


@contextmanager
def paused(module: torch.nn.Module | None, empty: bool) -> Iterator[None]:
    """Keep an empty part of a batch from the metrics: those of torchmetrics 1.9 fail on it."""
    metrics = [part for part in module.modules() if isinstance(part, Metric)] if module and empty else []
    updates = [metric.update for metric in metrics]
    for metric in metrics:
        metric.update = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for metric, update in zip(metrics, updates, strict=True):
            metric.update = update  # type: ignore[method-assign]


def part_of_batch(trainer: Trainer, batch_idx: int, own: int) -> tuple[int, int, int]:
    """Where this process's samples start and end in a training step's batch, and the size of the batch.

    A loader may divide its batches itself and say so by `part(batch_idx)`. One of another kind, such as Lightning gives
    a DistributedSampler, has as many for each process: `own`.
    """
    loader: Any = trainer.train_dataloader
    if trainer.world_size > 1 and hasattr(loader, "part"):
        start, stop, size = loader.part(batch_idx)
        return start, stop, size
    return own * trainer.global_rank, own * (trainer.global_rank + 1), own * trainer.world_size


def smallest_part(trainer: Trainer) -> int:
    """How many samples of an epoch's last batch the process with the fewest has."""
    loader: Any = trainer.train_dataloader
    start, stop, size = part_of_batch(trainer, len(loader) - 1, 1) if hasattr(loader, "part") else (0, 1, 1)
    return min(stop - start, size // trainer.world_size)


class Observer(subprocess_script._ChildProcessObserver):
    """Ends the first process some seconds after one that it started has failed.

    That of Lightning 2.6 does so at once, before the first process itself could find out, say where the run can be
    resumed, and leave in good order.
    """

    def _terminate_all(self) -> None:
        sleep(PATIENCE)
        print(f"{PROGRAM}: error: a process of this run has failed; ending the others", file=sys.stderr)
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


def gather_all(value: T) -> list[T]:
    """Return the value of each process, in the order of the processes, on all of them. All must call it."""
    if not torch.distributed.is_initialized():
        return [value]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


def gather_in_order(batches: list[T]) -> list[T]:
    """Gather the parts of each batch on the first process, in the order of the samples; the others get an empty list.

    A process may have no part of the last batches. All must call it.
    """
    if not torch.distributed.is_initialized():
        return batches
    first = torch.distributed.get_rank() == 0
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(batches, parts if first else None)
    nothing = object()
    gathered = zip_longest(*parts, fillvalue=nothing) if first else ()
    return [part for batch in gathered for part in batch if part is not nothing]


every, joined = gather_all, gather_in_order  # the names before; gone once all rooms call the new ones


def is_first() -> bool:
    """Whether this is the first process: as its trainer says, and before there is one, the environment."""
    return getattr(rank_zero_only, "rank", 0) == 0 and not (
        "RANK" not in os.environ and number("LOCAL_RANK", "SLURM_PROCID") + number("NODE_RANK") > 0
    )


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
