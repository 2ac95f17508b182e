"""Makes DataLoaders of torch exact: each epoch's order and each batch are functions of the run's seed and a number."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import copy, deepcopy
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .console import UserError

OUTSIDE = (type, ModuleType, Tensor, np.ndarray, LightningModule, LightningDataModule, Trainer)  # of the data
PLACE = ("seed", "first", "number", "epoch", "done", "states")  # of an ExactLoader, in checkpoints


def generators(*roots: Any) -> Iterator[Any]:
    """Yield the generators of torch, numpy and Python in attributes of objects, always in the same order."""
    seen, waiting = set(), [*roots]
    for part in waiting:
        if id(part) in seen or isinstance(part, OUTSIDE):
            continue
        seen.add(id(part))
        if isinstance(part, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            yield part
        attributes = part if isinstance(part, list | tuple | dict) else getattr(part, "__dict__", ())
        if len(attributes) <= 100:  # long lists hold samples
            waiting += attributes.values() if isinstance(attributes, Mapping) else attributes


def seed_all(key: tuple[int, ...], *roots: Any) -> None:
    """Seed the process's generators, and those in attributes of objects, by some numbers (each >= 0)."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)  # not those of devices: the module draws from them
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    used = Counter[type]()
    for part in generators(*roots):
        own, used[type(part)] = seed + used[type(part)], used[type(part)] + 1
        if isinstance(part, np.random.Generator):  # often made in a worker's first batch, from `torch.initial_seed()`
            part.bit_generator.state = type(part.bit_generator)(own).state
        else:
            (part.manual_seed if isinstance(part, torch.Generator) else part.seed)((own + 1) % 2**32)


class Seeded(tuple[Any, ...]):
    """A key and a batch's indices, on their way to a worker: it is seeded, whatever it has made before."""

    def __reduce__(self) -> Any:
        return arrive, tuple(self)


def arrive(key: tuple[int, ...], indices: Any) -> Any:
    seed_all(key, get_worker_info().dataset)  # type: ignore[union-attr]
    return indices


class ExactLoader:
    """A map-style DataLoader whose epoch can be continued, without loading again what it has given."""

    def __init__(self, loader: DataLoader[Any], trainer: Trainer) -> None:
        self.loader, self.trainer, self.training = loader, trainer, trainer.training
        own = loader.generator.initial_seed() if loader.generator else 0
        self.seed = [trainer.strategy.broadcast(torch.initial_seed()), own] if self.training else [0, 0]
        self.order: Any = loader._index_sampler
        samplers = [loader.batch_sampler, getattr(loader.batch_sampler, "sampler", loader.sampler)]
        self.sampler: Any = next((part for part in samplers if hasattr(part, "state_dict")), None)
        self.states: list[Any] = [None, None]  # the sampler's: when the last pass began, and when it was saved
        known = all(type(part).__module__.startswith(("torch.", "torchdata.", "builtins")) for part in samplers)
        self.replays = not (known or self.sampler)  # a user's sampler may count its passes
        self.first = trainer.current_epoch  # number of the first pass over the data
        self.number, self.epoch, self.done, self.resumed = self.first - 1, -1, 0, False
        self.batches: list[Any] = []
        self.source = copy(loader)
        self.source.__class__ = DataLoader  # torchdata's would lose the RNG states of its workers
        vars(self.source)["sampler" if loader.batch_sampler is None else "batch_sampler"] = self.batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        if self.sampler and not self.resumed:
            self.states[1] = self.sampler.state_dict()
        return {name: vars(self)[name] for name in PLACE} | {"length": len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass continue that of the saved run, if its epoch is not over, or be the one after it."""
        vars(self).update(deepcopy(state_dict), resumed=True)
        self.trainer.fit_loop._last_train_dl_reload_epoch = self.first

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning 2.6 asks for it before it restores states and sets the epoch, and for a batch after.
        loop: Any = self.trainer.fit_loop
        epoch, rank = loop.epoch_progress.current.processed, self.trainer.global_rank
        within = self.resumed and self.epoch == epoch
        if not within:  # no checkpoint knows how many validations there were
            self.number, self.done = self.number + 1 if self.training else self.trainer.global_step, 0
        if self.resumed and self.sampler:
            self.sampler.load_state_dict(self.states[not within])
        loaders = (loop if self.training else loop.epoch_loop.val_loop)._combined_loader.flattened
        key = (*self.seed, self.training, loaders.index(self))
        with isolate_rng(include_cuda=False):
            for number in range(self.first if self.resumed and self.replays else self.number, self.number + 1):
                self.states[0] = self.sampler and deepcopy(self.sampler.state_dict())
                seed_all((*key, number, 0, 0), self.loader.generator, self.order)
                order = [*islice(self.order, len(self) + 1)][: len(self)]
            if within and self.length != len(self):
                raise UserError(f"{self.length} batches an epoch are now {len(self)}, which is possible between epochs")
            batches = [Seeded([(*key, self.number, n + 1, rank), order[n]]) for n in range(self.done, len(order))]
            self.batches[:] = batches if self.loader.num_workers else [indices for _, indices in batches]
            source = iter(self.source)
        if within and self.sampler:
            self.sampler.load_state_dict(self.states[1])
        self.epoch, self.resumed = epoch, False
        for key, _ in batches:
            with isolate_rng(include_cuda=False):  # what the module draws does not change the data, nor they it
                seed_all(key, self.loader.dataset, self.loader.collate_fn)
                batch = next(source)
            self.done += 1
            yield batch


def make_loaders_exact(trainer: Trainer) -> None:
    """Let a trainer replace the DataLoaders that it is given by exact ones, where these can be."""
    process = type(trainer.strategy).process_dataloader  # Lightning 2.6 calls it for each loader, with its last sampler

    def make_exact(loader: Any) -> Any:
        loader, data = process(trainer.strategy, loader), getattr(loader, "dataset", None)
        plain = getattr(type(loader), "__iter__", None) is DataLoader.__iter__ and not hasattr(loader, "state_dict")
        torchdatas = type(loader).__module__.startswith("torchdata.stateful") and not hasattr(data, "state_dict")
        known = (plain or torchdatas) and loader.in_order and not isinstance(data, IterableDataset)
        return ExactLoader(loader, trainer) if known and sized_len(loader) and trainer.state.fn == "fit" else loader

    trainer.strategy.process_dataloader = make_exact  # type: ignore[method-assign, assignment]
