"""Batches from tensors in memory, in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all the numbers of `key` (each >= 0) and on nothing else.

    numpy's SeedSequence mixes them, so that (1, 2) and (2, 1), or neighbouring seeds and epochs, share nothing. Their
    count goes in as well, because for SeedSequence (1, 2) and (1, 2, 0) are the same.
    """
    (seed,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


class EpochOrder:
    """The order of the samples: in epoch e a permutation that is a function of (seed, e), or as they lie.

    Lightning finds it as the loader's `sampler` and calls `set_epoch` before each training epoch.
    """

    def __init__(self, size: int, seed: int | None) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def indices(self) -> Tensor:
        """int64 (size,); drawn on the CPU, so that every device sees the same order."""
        if self.seed is None:
            return torch.arange(self.size)
        return torch.randperm(self.size, generator=seeded_generator(self.seed, self.epoch))


class TensorBatches:
    """Iterate over (images, targets): each batch is one indexing operation on tensors that stay in memory.

    The last batch of an epoch is smaller where `batch_size` does not divide the set: no sample is left out.

    On several processes each takes a part of every batch, the first ones its first images. The parts differ by one
    image at most. Of a batch smaller than the number of processes some are empty: without a seed, in evaluation, these
    are left out, and in training they take part in the step.

    Args:
        images: uint8 (N, 1, 28, 28); batches are made on the device where it lies.
        targets: int64 (N,), on the same device.
        batch_size: images a batch, of all processes together.
        seed: shuffles with a fresh order each epoch; None keeps the order of the tensors.
        rank: which of the processes this is.
        processes: how many there are.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        assert len(images) == len(targets)
        assert images.device == targets.device
        assert 0 <= rank < processes
        self.images = images
        self.targets = targets
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes
        self.sampler = EpochOrder(len(images), seed)
        self.batch_sampler = None  # Lightning 2.6 asks for it wherever there is a sampler
        self._indices: Tensor | None = None  # of this epoch
        self._batches_done = 0
        self._resume_in: int | None = None  # the epoch in which batches are to be skipped

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def part(self, batch: int) -> tuple[int, int, int]:
        """Where this process's part of an epoch's n-th batch starts and ends in it, and the size of the batch."""
        size = min(self.batch_size, len(self.images) - batch * self.batch_size)
        return size * self.rank // self.processes, size * (self.rank + 1) // self.processes, size

    @property
    def position(self) -> tuple[int, int]:
        """The epoch, and the number within it of the batch that was handed out last."""
        return self.sampler.epoch, self._batches_done - 1

    def whole(self) -> tuple[Tensor, Tensor]:
        """The batch that was handed out last, of all processes together."""
        start = (self._batches_done - 1) * self.batch_size
        return self._select(slice(start, start + self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: Lightning asks for the iterator before it sets the epoch, and for the first batch after.
        if self._resume_in != self.sampler.epoch:
            self._batches_done = 0
        self._resume_in = None
        shuffled = self.sampler.seed is not None
        self._indices = self.sampler.indices().to(self.images.device, non_blocking=True) if shuffled else None
        for number in range(self._batches_done, len(self)):
            self._batches_done += 1
            start, stop, _ = self.part(number)
            if shuffled or stop > start:
                yield self._select(slice(number * self.batch_size + start, number * self.batch_size + stop))

    def _select(self, batch: slice) -> tuple[Tensor, Tensor]:
        if self._indices is None:
            return self.images[batch], self.targets[batch]
        return self.images.index_select(0, self._indices[batch]), self.targets.index_select(0, self._indices[batch])

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out: Lightning keeps it in checkpoints."""
        epoch = self.sampler.epoch if self._resume_in is None else self._resume_in  # saved again before the first batch
        return {"epoch": epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make that epoch's next iteration skip the batches that the saved run had taken from it.

        After a finished epoch, which `limit_train_batches` may end early, Lightning begins the next one, and
        nothing is skipped there.
        """
        self._batches_done = state["batches_done"] % len(self)
        self._resume_in = state["epoch"]
