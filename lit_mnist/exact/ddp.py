"""A run on more than one process: how they start and connect, what they exchange, and what happens when one is lost."""

import os
import re
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
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from .console import number

T = TypeVar("T")

# public since torch 2.15
set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout


class ExactDDP(DDPStrategy):
    """DDPStrategy whose steps are those of one process, up to rounding, and bit for bit the same in a resumed run.

    Args:
        waiting: seconds that a process waits for another, once training or scoring begins.
        synchronized: whether batch norm is; if not, each forward takes the running statistics of the first process.
    """

    def __init__(self, waiting: float, synchronized: bool, **settings: Any) -> None:
        super().__init__(broadcast_buffers=not synchronized, **settings)
        self.synchronized = synchronized
        self._waiting = timedelta(seconds=waiting)
        subprocess_script._ChildProcessObserver = Observer  # type: ignore[misc]

    def configure_ddp(self) -> None:
        super().configure_ddp()
        # DDP of torch 2.15 reorders the gradients after its first step, and three or more processes then add them in
        # another order: the steps of a resumed run would have other bits. Here it reorders at once, by parameters.
        assert isinstance(self.model, DistributedDataParallel)
        self.model.reducer._push_all_rebuilt_params()
        self.model.reducer._rebuild_buckets()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        set_timeout(self._waiting)  # only now: before, the others wait while the first fetches the data

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Weigh the loss of this process's part, so that the mean over all processes is that of the batch."""
        assert self.lightning_module
        trainer = self.lightning_module.trainer
        start, stop, size = part_of_batch(trainer, trainer.fit_loop.batch_idx, 1)
        weight = (stop - start) * self.world_size / size
        with paused(self.lightning_module, stop == start):
            output = super().training_step(*args, **kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is not None:
            loss = loss * weight if weight else loss.nan_to_num() * 0  # the mean of no samples is not a number
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss


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
    """Return where this process's samples start and end in a training step's batch, and the size of the batch.

    A loader may divide its batches itself and say how by `part(batch_idx)`. Any other, such as one to which Lightning
    gives a DistributedSampler, has `own` samples for each process.
    """
    loader: Any = trainer.train_dataloader
    if trainer.world_size > 1 and hasattr(loader, "part"):
        start, stop, size = loader.part(batch_idx)
        return start, stop, size
    return own * trainer.global_rank, own * (trainer.global_rank + 1), own * trainer.world_size


class Observer(subprocess_script._ChildProcessObserver):
    """Ends the first process 5 seconds after another; Lightning 2.6 does so before it can say how to resume."""

    def _terminate_all(self) -> None:
        sleep(5)
        super()._terminate_all()


def launched() -> tuple[int, int]:
    """Return the processes on each machine and the machines that torchrun or SLURM has started; (1, 1) without them.

    Unless Lightning 2.6 is given these numbers, every process trains alone.
    """
    if torch.distributed.is_torchelastic_launched():
        processes = number("LOCAL_WORLD_SIZE") or 1
        return processes, max(1, number("WORLD_SIZE") // processes)
    # srun sets these; within an allocation alone nothing is started
    machines = number("SLURM_STEP_NUM_NODES") or 1
    return max(1, number("SLURM_STEP_NUM_TASKS") // machines), machines


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
    gathered: list[Any] = gather_all(batches)
    nothing = object()
    if not is_first():
        return []
    return [part for batch in zip_longest(*gathered, fillvalue=nothing) for part in batch if part is not nothing]


def is_first() -> bool:
    """Return whether this is the first process: by its trainer, and before there is one, by the environment."""
    return getattr(rank_zero_only, "rank", 0) == 0 and not (
        "RANK" not in os.environ and number("LOCAL_RANK", "SLURM_PROCID") + number("NODE_RANK") > 0
    )


def lost(error: BaseException) -> str:
    """Return how the connection to another process broke; empty if the error is of another kind."""
    text = str(error).strip()
    library = isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    if not (library or isinstance(error, torch.distributed.DistError)):
        return ""
    cause = text.rpartition("Last error:")[2].strip() or type(error).__name__  # NCCL's
    return re.sub(r"^\[\S+\] ", "", cause).splitlines()[0].partition(". ")[0][:150]  # gloo's has a place, and advice
