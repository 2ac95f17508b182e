"""Batches from tensors in memory, in a seeded order, and their random affine transform."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def seeded_generator(*key: int) -> torch.Generator:
    """Make a generator that depends on all the numbers of `key` (each >= 0) and on nothing else."""
    # SeedSequence mixes neighbouring seeds and epochs; for it (1, 2) and (1, 2, 0) are the same without their count
    (seed,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


@dataclass(eq=False, repr=False)
class TensorBatches:
    """Batches (images, targets): each is one indexing operation on tensors that stay in memory."""

    images: Tensor  # uint8 (N, C, H, W); batches are made on the device where it lies
    targets: Tensor  # int64 (N,), or of another form, on the same device
    batch_size: int  # images, of all processes together
    seed: int | None = None  # epoch e has a permutation by (seed, e); None keeps the order of the tensors
    rank: int = 0  # of this process, which gets a part of every batch; the parts differ by one image at most
    processes: int = 1
    fixed: bool = False  # whether every epoch has the order of the first
    epoch: int = field(default=0, init=False)
    _batches_done: int = field(default=0, init=False)
    _resume_in: int | None = field(default=None, init=False)  # the epoch in which batches are to be skipped

    batch_sampler = None  # Lightning 2.6 asks for it wherever there is a sampler

    @property
    def sampler(self) -> "TensorBatches":
        """What Lightning calls `set_epoch` of before each training epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def part(self, batch: int) -> tuple[int, int, int]:
        """Return where this process's part of an epoch's n-th batch starts and ends in it, and the batch's size."""
        size = min(self.batch_size, len(self.images) - batch * self.batch_size)
        return size * self.rank // self.processes, size * (self.rank + 1) // self.processes, size

    @property
    def position(self) -> tuple[int, int]:
        """The epoch whose order this is, and the number within it of the batch that was handed out last, from -1."""
        return 0 if self.fixed else self.epoch, self._batches_done - 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: Lightning asks for the iterator before it sets the epoch, and for the first batch after.
        if self._resume_in != self.epoch:
            self._batches_done = 0
        self._resume_in = None
        order = None
        if self.seed is not None:  # drawn on the CPU, so that every device sees the same order
            order = torch.randperm(len(self.images), generator=seeded_generator(self.seed, self.position[0]))
            order = order.to(self.images.device, non_blocking=True)
        for number in range(self._batches_done, len(self)):
            self._batches_done += 1
            start, stop, _ = self.part(number)
            batch = slice(number * self.batch_size + start, number * self.batch_size + stop)
            if order is not None:
                yield self.images.index_select(0, order[batch]), self.targets.index_select(0, order[batch])
            elif stop > start:  # an empty part is left out in evaluation alone
                yield self.images[batch], self.targets[batch]

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were handed out: Lightning keeps it in checkpoints."""
        epoch = self.epoch if self._resume_in is None else self._resume_in  # saved again before the first batch
        return {"epoch": epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make that epoch's next iteration skip the batches that the saved run had taken from it."""
        self._batches_done = state["batches_done"] % len(self)  # none after a finished epoch
        self._resume_in = state["epoch"]


def affine_matrices(
    shape: Sequence[int], rotation: float, shift: float, scale: float, generator: torch.Generator, share: float = 1.0
) -> Tensor:
    """Draw one inverse affine map an image for `affine_grid`, uniformly: float (B, 2, 3), on the generator's device.

    `shape` is the batch's (B, C, H, W), `rotation` in degrees, `shift` in pixels along each axis; the scale is within
    1 ± `scale`; each image is moved with the probability `share`, and else gets the identity.
    """
    batch_size, _, height, width = shape
    angle, zoom, dx, dy = torch.rand(4, batch_size, generator=generator, device=generator.device).mul_(2).sub_(1)
    angle, zoom = angle * math.radians(rotation), 1 + scale * zoom
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    dx, dy = dx * (shift / (width / 2)), dy * (shift / (height / 2))
    flat, steep = sine * (height / width), sine * (width / height)  # the units of the axes differ, a pixel is square
    # output = zoom * rotate(input) + shift, so input = rotate_back(output - shift) / zoom
    moved = torch.stack([cosine, flat, -cosine * dx - flat * dy, -steep, cosine, steep * dx - cosine * dy], dim=1)
    drawn = torch.rand(batch_size, 1, generator=generator, device=generator.device) < share
    return torch.where(drawn, moved, moved.new_tensor([1, 0, 0, 0, 1, 0])).view(-1, 2, 3)


def affine(images: Tensor, matrices: Tensor, mode: str = "bilinear") -> Tensor:
    """Apply maps of `affine_matrices` to uint8 or float (B, C, H, W), 0 beyond the edges: float on the same scale."""
    if not len(images):
        return images.to(matrices.dtype)  # affine_grid refuses it
    if images.device.type == "cuda":
        matrices = matrices.pin_memory()  # or the copy would wait for the device
    grid = F.affine_grid(matrices.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(grid.dtype), grid, mode=mode, padding_mode="zeros", align_corners=False)
