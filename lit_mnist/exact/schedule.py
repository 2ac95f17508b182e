"""How long a fit is, for schedules that depend on it."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer


def total_steps(trainer: Trainer) -> int:
    """How many optimizer steps the whole fit takes.

    In a schedule's function of the step, where `trainer.estimated_stepping_batches` would compute it anew each time.

    Raises:
        ValueError: the fit has no end.
    """
    if trainer.num_training_batches == float("inf"):  # asked for in `configure_optimizers`
        return int(trainer.estimated_stepping_batches)
    steps_an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    limits = [steps_an_epoch * trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
    limits += [trainer.max_steps] if trainer.max_steps > 0 else []
    if not limits:
        raise ValueError("a schedule over the whole training needs trainer.max_epochs or trainer.max_steps")
    return int(min(limits))
