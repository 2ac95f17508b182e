"""How long a fit is, for schedules that depend on it."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer


def total_steps(trainer: Trainer) -> int:
    """Return how many optimizer steps the whole fit takes; `trainer.estimated_stepping_batches` computes it anew in
    each step.

    Raises:
        ValueError: the fit has no end.
    """
    if trainer.num_training_batches == float("inf"):  # within `configure_optimizers`
        return int(trainer.estimated_stepping_batches)
    steps_an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    limits = [limit for limit in (steps_an_epoch * (trainer.max_epochs or 0), trainer.max_steps) if limit > 0]
    if not limits:
        raise ValueError("a schedule over the whole training needs trainer.max_epochs or trainer.max_steps")
    return int(min(limits))
