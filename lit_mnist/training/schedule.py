"""How long a fit is, for schedules that depend on it."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer


def total_steps(trainer: Trainer) -> int:
    """How many optimizer steps the whole fit takes.

    Not `trainer.estimated_stepping_batches`: in Lightning 2.6 reading that sets up the train loader before a
    checkpoint's loader state is there, and a resumed epoch starts over (Lightning's issue 20550).

    Raises:
        ValueError: the fit has no end.
    """
    steps_an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    limits = [steps_an_epoch * trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
    limits += [trainer.max_steps] if trainer.max_steps > 0 else []
    if not limits:
        raise ValueError("a schedule over the whole training needs trainer.max_epochs or trainer.max_steps")
    return int(min(limits))
