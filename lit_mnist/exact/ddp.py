"""A run on more than one process: how they start and connect, what they exchange, and what happens when one is lost."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from itertools import zip_longest
from time import sleep
from typing import Any, TypeVar
from unittest.mock import patch

import torch.distributed
from lightning_fabric.strategies.launchers import subprocess_script
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torchmetrics import Metric

from .console import UserError, number

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
        self._any_backward = False
        subprocess_script._ChildProcessObserver = Observer  # type: ignore[misc]

    def configure_ddp(self) -> None:
        module: Any = self.lightning_module
        if not module.automatic_optimization:
            self._ddp_kwargs.setdefault("find_unused_parameters", True)  # one network's loss may not use the others
        self.model, self._parameters = module, list(module.parameters())
        self._trained = self._needing_gradients()
        super().configure_ddp()
        # DDP of torch 2.15 reorders the gradients after its first step, and three or more processes then add them in
        # another order: the steps of a resumed run would have other bits. Here it reorders at once, by parameters.
        reducer: Any = self.model.reducer
        reducer._push_all_rebuilt_params()
        reducer._rebuild_buckets()

    def _needing_gradients(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        set_timeout(self._waiting)  # only now: before, the others wait while the first fetches the data

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Weigh the loss of this process's part, so that the mean over all processes is that of the batch."""
        assert self.lightning_module
        trainer = self.lightning_module.trainer
        self._part, steps = part_of_batch(trainer, trainer.fit_loop.batch_idx, 1), trainer.global_step
        if self._needing_gradients() != self._trained:
            self.configure_ddp()  # DDP of torch 2.15 averages the gradients of what is trained when it is made
        # Lightning 2.6 leaves it False in manual optimization, and DDP would not broadcast the running statistics
        self.model.require_forward_param_sync = True  # type: ignore[union-attr]
        with ExitStack() as paused:
            for part in self.lightning_module.modules() if self._part[0] == self._part[1] else ():
                if isinstance(part, Metric):  # those of torchmetrics 1.9 fail on no samples
                    paused.enter_context(patch.object(part, "update", lambda *_, **__: None))
            output = super().training_step(*args, **kwargs)
        if any(now and not before for now, before in zip(self._needing_gradients(), self._trained, strict=True)):
            raise UserError("training_step sets requires_grad, too late for several processes: use a hook before it")
        if trainer.global_step > steps and not self._any_backward:  # manual: an automatic step is counted later
            raise UserError("a step without manual_backward(loss): loss.backward() leaves the other processes out")
        if isinstance(output, Mapping):
            return {name: self._weigh(value) if name == "loss" else value for name, value in output.items()}
        return self._weigh(output)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Weigh the loss here in manual optimization, where `training_step` returns it too late."""
        assert self.lightning_module
        self._any_backward = True
        weigh = not self.lightning_module.automatic_optimization
        return super().backward(self._weigh(closure_loss) if weigh else closure_loss, *args, **kwargs)

    def _weigh(self, loss: Any) -> Any:
        start, stop, size = self._part
        if loss is None or start == stop:  # the mean of no samples is not a number
            return None if loss is None else loss.nan_to_num() * 0
        return loss * ((stop - start) * self.world_size / size)


def part_of_batch(trainer: Trainer, batch_idx: int, own: int) -> tuple[int, int, int]:
    """Return where this process's samples start and end in a training step's batch, and the size of the batch.

    A loader that divides its batches itself says how by `part(batch_idx)`; any other has `own` for each process.
    """
    loader: Any = trainer.train_dataloader
    if trainer.world_size > 1 and hasattr(loader, "part"):
        return tuple(loader.part(batch_idx))
    return own * trainer.global_rank, own * (trainer.global_rank + 1), own * trainer.world_size


class Observer(subprocess_script._ChildProcessObserver):
    """Ends the first process 5 seconds after another; Lightning 2.6 does so before it can say how to resume."""

    def _terminate_all(self) -> None:
        sleep(5)
        super()._terminate_all()


def launched() -> tuple[int, int]:
    """Return the processes on each machine and the machines that torchrun or SLURM has started; (1, 1) without them."""
    # unless Lightning 2.6 is given these numbers, every process trains alone
    if torch.distributed.is_torchelastic_launched():
        return number("LOCAL_WORLD_SIZE"), number("WORLD_SIZE") // number("LOCAL_WORLD_SIZE")
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
    """Return the parts of each batch, in the order of the samples, on the first process; all must call it."""
    gathered: list[Any] = gather_all(batches)  # where the last batches are small, some processes have fewer parts
    return [part for batch in zip_longest(*gathered) for part in batch if part is not None] if is_first() else []


def is_first() -> bool:
    """Return whether this is the first process: by its trainer, and before there is one, by the environment."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
    return not (getattr(rank_zero_only, "rank", 0) or any(map(number, names)))


def lost(error: BaseException) -> str:
    """Return how the connection to another process broke; empty if the error is of another kind."""
    text = str(error).strip()
    library = isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    if not (library or isinstance(error, torch.distributed.DistError)):
        return ""
    cause = text.rpartition("Last error:")[2].strip() or type(error).__name__  # NCCL's
    return re.sub(r"^\[\S+\] ", "", cause).splitlines()[0].partition(". ")[0][:150]  # gloo's has a place, and advice
