"""Metrics of every kind, held and logged in every way, go on after a kill with the values of the run without one."""

from collections import deque
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Killed, assert_same
from matrix import Trained, compare, fit
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.wrappers import Running


class Seen(Metric):
    """Keeps what it has seen in every way but as a state that it is made with."""

    largest: Any = None  # until the first update, as RootMeanSquaredErrorUsingSlidingWindow of torchmetrics 1.9
    total: Any  # a state that the first update adds, as of its MeanIoU

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.recent = factor, deque[Tensor](maxlen=2)

    def update(self, values: Tensor) -> None:
        if "total" not in self._defaults:
            self.add_state("total", torch.zeros(len(values)), "sum")
        self.total = self.total + values
        self.largest = values if self.largest is None else torch.maximum(self.largest, values)
        self.recent.append(values)

    def compute(self) -> Tensor:
        return torch.stack([self.total, self.largest, *self.recent]).sum() * self.factor


def grouped() -> MetricCollection:
    """Return metrics that agree, and are joined by torchmetrics, until a value is not a number."""
    return MetricCollection({"a": MeanMetric(nan_strategy=2.0), "b": MeanMetric(nan_strategy=4.0)})


class Logged(Trained):
    """Holds metrics in attributes, lists and dictionaries, and logs them in each way that Lightning has."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.seen, self.joined, self.logged, self.val_joined = Seen(factor), grouped(), grouped(), grouped()
        self.forwarded, self.given, self.val_running = MeanMetric(), MeanMetric(), Running(MeanMetric(), 3)
        self.held: Any = {"deep": [(grouped(), Running(SumMetric(), 2), MeanMetric())]}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, numbers = super().training_step(batch, batch_idx), torch.arange(2.0) + batch_idx
        joined, running, named = self.held["deep"][0]
        for metric in (self.joined, self.logged, joined):
            metric.update(numbers.masked_fill(numbers > 2, torch.nan))
        for metric in (self.seen, running, named):
            metric.update(numbers)
        self.notes[f"step {self.global_step}"] = deepcopy(self.trainer.callback_metrics)
        self.log("forwarded", self.forwarded(numbers), on_step=True, on_epoch=True)
        if batch_idx == 0:
            self.log("first", numbers.mean(), enable_graph=True)  # logged again and again until the epoch ends
        self.given(numbers)
        self.log("given", self.given, on_step=True, on_epoch=True)
        self.log("named", named, on_step=False, on_epoch=True, metric_attribute="anything")
        self.log_dict(self.logged, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.val_joined.update(torch.tensor([1.0, torch.nan if batch_idx else 1.0]))
        self.val_running.update(torch.arange(2.0) + batch_idx)
        self.log_dict({f"val/{name}": metric for name, metric in self.val_joined.items()})
        self.log("val/running", self.val_running)

    def on_train_epoch_end(self) -> None:
        parts = (self.seen, self.joined, *self.held["deep"][0])
        self.notes[f"epoch {self.current_epoch}"] = [part.compute() for part in parts]
        if self.current_epoch == 1:
            self.seen.reset()
            self.joined.reset()


def test_metrics_resume_however_they_are_held_and_logged(tmp_path: Path) -> None:
    compare(tmp_path / "runs", lambda: [Logged()])


def test_a_metrics_setting_is_the_present_one(tmp_path: Path) -> None:
    notes: list[dict[str, Any]] = [{}, {}]
    with pytest.raises(Killed):
        fit(tmp_path / "runs", lambda: [Logged()], notes[0], kill_at=3)
    fit(tmp_path / "runs", lambda: [Logged(factor=2)], notes[0])
    fit(tmp_path / "whole", lambda: [Logged(factor=2)], notes[1])
    assert_same(notes[0], notes[1])
