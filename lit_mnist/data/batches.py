"""Batches from tensors in memory, in a seeded order, and their random affine transform."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_mnist.exact.console import UserError
from lit_mnist.exact.ddp import gather_all


def seeded_generator(*key: int) -> torch.Generator:
    """Make a generator that depends on all the numbers of `key` (each >= 0) and on nothing else."""
    # SeedSequence mixes neighbouring seeds and epochs; for it (1, 2) and (1, 2, 0) are the same without their count
    (seed,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


@dataclass(eq=False, repr=False)
class TensorBatches:
    """Batches (images, targets): each is one indexing operation on tensors that stay in memory.

    With `shares` an epoch takes a part of the images: half of it those with the largest losses when last seen, half
    drawn from the others. The losses are a training step's, by `keep_losses`, and saved with the loader's place.
    """

    images: Tensor  # uint8 (N, C, H, W); batches are made on the device where it lies
    targets: Tensor  # int64 (N,), or of another form, on the same device
    batch_size: int  # images, of all processes together
    seed: int | None = None  # epoch e has a permutation by (seed, e); None keeps the order of the tensors
    rank: int = 0  # of this process, which gets a part of every batch; the parts differ by one image at most
    processes: int = 1
    part_of: Tensor | None = None  # int32 (n,) on the CPU: which of the images these batches are of; None is all
    shares: Sequence[float] = ()  # of the n images, in the first epoch, the second, ...; the last is kept
    fixed: bool = False  # whether every epoch has the order of the first
    epoch: int = field(default=0, init=False)
    order: Tensor = field(init=False)  # int32 (n,): this epoch's images, once its first batch is made
    _batches_done: int = field(default=0, init=False)
    _resumed: bool = field(default=False, init=False)  # whether batches are to be skipped

    batch_sampler = None  # Lightning 2.6 asks for it wherever there is a sampler

    def __post_init__(self) -> None:
        self.total = len(self.images if self.part_of is None else self.part_of)
        # of each image: when last seen before this epoch, and within it; infinite where it was not
        unseen = torch.tensor([math.inf, -math.inf], dtype=torch.float16, device=self.images.device)
        self.losses = unseen.view(2, 1).repeat(1, len(self.images) if self.shares else 0)

    @property
    def sampler(self) -> "TensorBatches":
        """What Lightning calls `set_epoch` of before each training epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._batches_done, self._resumed, self.losses = epoch, 0, False, self._gathered()
            self.losses[0] = torch.where(self.losses[1] > -math.inf, self.losses[1], self.losses[0])
            self.losses[1] = -math.inf

    def size(self, epoch: int | None = None) -> int:
        """Return how many images an epoch has, by default this one."""
        share = self.shares[: (self.position[0] if epoch is None else epoch) + 1][-1:]
        return math.ceil(self.total * share[0]) if share else self.total

    def __len__(self) -> int:
        return -(-self.size() // self.batch_size)

    def epoch_lengths(self, epochs: range) -> list[int]:
        """Return the numbers of batches in some epochs."""
        return [-(-self.size(epoch) // self.batch_size) for epoch in epochs] if self.shares else []

    def part(self, batch: int) -> tuple[int, int, int]:
        """Return where this process's part of an epoch's n-th batch starts and ends in it, and the batch's size."""
        size = min(self.batch_size, self.size() - batch * self.batch_size)
        return size * self.rank // self.processes, size * (self.rank + 1) // self.processes, size

    @property
    def position(self) -> tuple[int, int]:
        """The epoch whose order this is, and the number within it of the batch that was handed out last, from -1."""
        return 0 if self.fixed else self.epoch, self._batches_done - 1

    def _order(self) -> Tensor:
        """Draw this epoch's images on the CPU, so that every device sees the same order: int32 (n,)."""
        images = torch.arange(self.total, dtype=torch.int32) if self.part_of is None else self.part_of
        if self.seed is None:
            return images
        generator = seeded_generator(self.seed, self.position[0])
        order = images[torch.randperm(self.total, generator=generator, dtype=torch.int32)]
        if (size := self.size()) == self.total:
            return order
        ranked = order[self.losses[0].cpu()[order].argsort(descending=True, stable=True)]  # ties are in a drawn order
        hard, others = ranked[: size // 2], ranked[size // 2 :]
        others = others[torch.randperm(len(others), generator=generator)[: size - len(hard)]]
        return torch.cat([hard, others])[torch.randperm(size, generator=generator)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: Lightning asks for the iterator before it sets the epoch, and for the first batch after.
        self._batches_done, self._resumed = self._batches_done if self._resumed else 0, False
        self.order = self._order().to(self.images.device, non_blocking=True)
        for number in range(self._batches_done, len(self)):
            self._batches_done += 1
            start, stop, _ = self.part(number)
            self._latest = self.order[number * self.batch_size + start : number * self.batch_size + stop]
            self._kept = not self.shares
            if self.seed is not None or stop > start:  # an empty part is left out in evaluation alone
                yield self.images.index_select(0, self._latest), self.targets.index_select(0, self._latest)
            if not self._kept:
                raise UserError("data.shares needs a training_step that calls train_dataloader.keep_losses")

    def keep_losses(self, losses: Tensor) -> None:
        """Remember the losses of the batch that was handed out last, float (B,), for the next epoch's choice."""
        self.losses[1, self._latest], self._kept = losses.detach().to(self.losses), True

    def _gathered(self) -> Tensor:
        """Return the losses that all processes have kept; all must call it."""
        return torch.stack(gather_all(self.losses.cpu())).amax(0).to(self.losses.device) if self.shares else self.losses

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many of its batches were handed out (0 after all), and losses, for checkpoints."""
        losses = {"losses": self._gathered().cpu()} if self.shares else {}
        return {"epoch": self.epoch, "batches_done": self._batches_done % len(self), **losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make that epoch's next iteration skip the batches that the saved run had taken from it."""
        self.epoch, self._resumed = state["epoch"], True
        self._batches_done = state["batches_done"] % len(self)
        if self.shares and "losses" in state:
            self.losses.copy_(state["losses"])  # which torch refuses if they are of another number of images


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
    if images.device.type == "cuda":
        matrices = matrices.pin_memory()  # or the copy would wait for the device
    grid = F.affine_grid(matrices.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(grid.dtype), grid, mode=mode, padding_mode="zeros", align_corners=False)
