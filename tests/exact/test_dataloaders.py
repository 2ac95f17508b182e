"""DataLoaders of every kind under exact/: killed, resumed, and compared bit for bit."""

import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Killed, assert_same, in_processes, kill_before
from matrix import UNCOMPARED, Saved, Trained, compare, fit
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_mnist.exact.console import UserError
from lit_mnist.exact.ddp import ExactDDP


class Noisy:
    """Samples with noise from each generator that a transform may draw from; one is made with the first sample."""

    def __init__(self, size: int) -> None:
        self.size, self.python, self.numpy = size, random.Random(1), None  # type: int, random.Random, Any
        self.torch = {"nested": [torch.Generator().manual_seed(5)]}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.numpy = self.numpy or np.random.default_rng(torch.initial_seed())
        noise = np.random.rand() + random.random() + self.numpy.random() + self.python.random()  # noqa: NPY002
        return index + torch.rand(()) + torch.rand((), generator=self.torch["nested"][0]) + noise


class Counting(Sampler[Any]):
    """Counts its epochs, and changes its weights with them."""

    epoch, weights = 0, torch.ones(22)

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[Any]:
        self.epoch, self.weights = self.epoch + 1, self.weights * torch.rand(22)
        return iter((self.weights + self.epoch / 9).multinomial(22).tolist())


class Stateful(Saved, Counting):
    """Saves its weights and its number, which each training step changes, too."""


def make(workers: int, size: int = 22, kind: Any = DataLoader, **settings: Any) -> Any:
    # torch 2.15 sends no torch.Generator to a worker that is not forked (findings/torch_generator_to_spawned_worker.sh)
    own = {"persistent_workers": workers > 0, "batch_size": 4, "multiprocessing_context": "fork" if workers else None}
    return kind(Noisy(size), num_workers=workers, **{k: v() if callable(v) else v for k, v in (own | settings).items()})


def pair(workers: int, mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": make(workers, shuffle=True), "b": make(workers, 10, shuffle=True)}, mode)


LOADERS: dict[str, Callable[[int], Any]] = {
    "shuffled": partial(make, shuffle=True, generator=torch.Generator, persistent_workers=False),
    "torchdata": partial(make, kind=StatefulDataLoader, shuffle=True),
    "max_size_cycle": partial(pair, mode="max_size_cycle"),
    "ordered": make,
    "weighted": partial(make, sampler=partial(WeightedRandomSampler, [*range(1, 23)], 30)),
    "counting": partial(make, sampler=Counting),
    "stateful": partial(make, sampler=Stateful),
    "batches": partial(make, batch_size=1, batch_sampler=[[1], [*range(2, 20)], [20, 0]]),
    "single": partial(make, batch_size=None, shuffle=True),
    **{mode: partial(pair, mode=mode) for mode in ("min_size", "max_size")},
}


class Module(Trained):
    def __init__(self, loader: Callable[[int], Any], workers: int = 0) -> None:
        super().__init__()
        self.make, self.workers = loader, workers
        self.backbone = self.network = nn.Sequential(nn.Linear(1, 1))

    def train_dataloader(self) -> Any:
        self.loader = self.make(self.workers)
        return self.loader

    def val_dataloader(self) -> Any:
        return make(self.workers, 9, shuffle=True, persistent_workers=False)

    def loss(self, batch: Any) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        inputs = torch.cat([part.reshape(-1, 1) for part in parts if part is not None])
        return nn.functional.dropout(self.network(inputs / 20) - 1, 0.3).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if isinstance(sampler := getattr(self.loader, "sampler", None), Stateful):
            sampler.epoch += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches  # Lightning 2.6 then gives the loaders no states (issue 20550)
        return super().configure_optimizers()


CASES: list[Any] = [*((name, 0, {}) for name in LOADERS), *((name, 2, {}) for name in [*LOADERS][:3])]
SETTINGS = ("limit_train_batches", "accumulate_grad_batches", "reload_dataloaders_every_n_epochs")


@pytest.mark.parametrize(("name", "workers", "settings"), [*CASES, *(("counting", 0, {key: 2}) for key in SETTINGS)])
def test_killed(tmp_path: Path, name: str, workers: int, settings: dict[str, Any]) -> None:
    kills = (3, 2) if workers else (1, 3, 3)
    compare(tmp_path / "runs", lambda: [Module(LOADERS[name], workers)], kills, **settings)


def process(folder: str, name: str, kill_at: int) -> int:
    kill_before(kill_at, Module)
    ended = fit(Path(folder), lambda: [Module(LOADERS[name], 2)], {}, devices=2, strategy=ExactDDP(60, True))
    torch.save(ended["checkpoint"], folder + ".pt")
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["counting", "shuffled", "max_size_cycle"])
def test_killed_for_real(tmp_path: Path, name: str) -> None:
    for folder, kill_at in (("whole", 0), ("killed", 4), ("killed", 3), ("killed", 0)):
        status = in_processes(tmp_path, process, (folder, name, 0), (folder, name, kill_at))[-1].status
        assert status == (-signal.SIGKILL if kill_at else 0), (tmp_path / ".err-0").read_text()
    assert_same(torch.load(tmp_path / "killed.pt"), torch.load(tmp_path / "whole.pt"), ignored=UNCOMPARED)


STREAM: Any = type("Stream", (IterableDataset,), {"__iter__": lambda _: iter(range(9))})()
ITERATING: Any = type("Iterating", (DataLoader,), {"__iter__": lambda self: DataLoader.__iter__(self)})


@pytest.mark.parametrize("loader", [ITERATING([1.0]), DataLoader(STREAM), StatefulDataLoader(STREAM), [[1.0]]])
def test_what_is_refused(tmp_path: Path, loader: Any) -> None:
    with pytest.raises(UserError):
        fit(tmp_path, lambda: [Module(lambda _: loader)], {}, limit_val_batches=0)
    assert not list(tmp_path.iterdir())


def test_another_number_of_batches_is_refused_within_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, lambda: [Module(make)], {}, kill_at=3)
    with pytest.raises(UserError, match="6 batches"):
        fit(tmp_path, lambda: [Module(partial(make, batch_size=5))], {})
