"""What the user changes of optimizers and schedules when a run is resumed; matrix.py has those that stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import STEPS, Case, Trained, fit
from torch.optim import SGD
from torch.optim import lr_scheduler as s

from lit_mnist.exact.console import UserError


def train(folder: Path, epochs: int, schedule: Any, lr: Any = 0.05) -> dict[str, Any]:
    """Return the groups' rates by step; a schedule is None, or gives one of an optimizer and a number of steps."""
    interval, notes = "epoch" if schedule is plateau else "step", dict[str, Any]()
    case = Case(optimizer=lambda params: SGD(params, lr, 0.9), schedule=schedule, interval=interval)
    fit(folder, lambda: [Trained(case)], notes, max_epochs=epochs)
    return notes


def plateau(optimizer: Any, steps: int) -> Any:
    patience = 0 if steps == 2 * STEPS else 5
    return s.ReduceLROnPlateau(optimizer, factor=0.5, threshold=9.0, threshold_mode="abs", patience=patience)


@pytest.mark.parametrize(
    ("before", "after", "lr", "rate"),
    [
        (None, None, torch.tensor(0.2), 0.2),
        (plateau, plateau, 0.2, 0.1),  # reduced once
        (lambda o, n: s.StepLR(o, 4), lambda o, n: s.StepLR(o, 5), 0.2, 0.02),
        (lambda o, n: s.StepLR(o, 4), lambda o, n: s.OneCycleLR(o, 0.1, n), 0.2, 0.02831),  # another class
    ],
)
def test_what_the_user_changes(tmp_path: Path, before: Any, after: Any, lr: Any, rate: float) -> None:
    train(tmp_path, 2, before, lr * 0 + 0.05)
    rates = train(tmp_path, 3, after, lr)
    assert rates[f"groups/{2 * STEPS}"][0][0] == pytest.approx(rate, rel=1e-3)


def test_a_schedule_that_cannot_be_computed(tmp_path: Path) -> None:
    train(tmp_path, 1, lambda o, n: s.OneCycleLR(o, 0.1, STEPS))
    with pytest.raises(UserError, match="LR"):
        train(tmp_path, 2, lambda o, n: s.OneCycleLR(o, 0.1, STEPS))
