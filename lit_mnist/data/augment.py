"""Random affine transform of a whole batch at once, a function of its generator."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def affine_matrices(
    batch_size: int, rotation: float, shift: float, scale: float, generator: torch.Generator, share: float = 1.0
) -> Tensor:
    """Draw one inverse affine map an image for `affine_grid`, uniformly: float (B, 2, 3), on the generator's device.

    They map the coordinates of an output pixel to the input's, in units where the image spans -1..1.

    Args:
        rotation: degrees, drawn from -rotation..rotation.
        shift: pixels, drawn from -shift..shift for each axis.
        scale: drawn from 1 - scale..1 + scale.
        share: probability of each image to be moved at all; the others get the identity.
    """
    angle, zoom, dx, dy = torch.rand(4, batch_size, generator=generator, device=generator.device).mul_(2).sub_(1)
    angle, zoom = angle * math.radians(rotation), 1 + scale * zoom
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    dx, dy = dx * (shift / 14), dy * (shift / 14)
    # output = zoom * rotate(input) + shift, so input = rotate_back(output - shift) / zoom
    moved = torch.stack([cosine, sine, -cosine * dx - sine * dy, -sine, cosine, sine * dx - cosine * dy], dim=1)
    drawn = torch.rand(batch_size, 1, generator=generator, device=generator.device) < share
    return torch.where(drawn, moved, moved.new_tensor([1, 0, 0, 0, 1, 0])).view(-1, 2, 3)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Apply maps of `affine_matrices`, on any device, to uint8 or float (B, 1, 28, 28), black beyond the edges.

    Returns float (B, 1, 28, 28) on the scale of `images`.
    """
    if not len(images):
        return images.to(matrices.dtype)  # affine_grid refuses it
    if images.device.type == "cuda":
        matrices = matrices.pin_memory()  # or the copy would wait for the device
    grid = F.affine_grid(matrices.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
