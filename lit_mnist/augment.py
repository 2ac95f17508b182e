"""Random affine transform and elastic distortion of a whole batch at once, a function of its generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def affine_matrices(batch_size: int, rotation: float, shift: float, scale: float, generator: torch.Generator) -> Tensor:
    """Draw one inverse affine map an image, float (B, 2, 3), on the generator's device.

    They map the coordinates of an output pixel to the input's, in units where the image spans -1..1: what
    `torch.nn.functional.affine_grid` takes. All values are uniform.

    Args:
        rotation: degrees, drawn from -rotation..rotation.
        shift: pixels, drawn from -shift..shift for each axis.
        scale: drawn from 1 - scale..1 + scale.
    """
    angle, zoom, dx, dy = torch.rand(4, batch_size, generator=generator, device=generator.device).mul_(2).sub_(1)
    angle = angle * math.radians(rotation)
    zoom = 1 + scale * zoom
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    dx, dy = dx * (shift / 14), dy * (shift / 14)
    # output = zoom * rotate(input) + shift, so input = rotate_back(output - shift) / zoom
    return torch.stack([cosine, sine, -cosine * dx - sine * dy, -sine, cosine, sine * dx - cosine * dy], dim=1).view(
        -1, 2, 3
    )


def bends(batch_size: int, strength: float, generator: torch.Generator) -> Tensor:
    """Draw how the points of a 5x5 grid over each image move, float (B, 2, 5, 5) in the units of `affine_matrices`.

    A coarse, and so a smooth, form of elastic distortion (https://doi.org/10.1109/ICDAR.2003.1227801).

    Args:
        strength: pixels, drawn uniformly from -strength..strength for each point and axis.
    """
    drawn = torch.rand(batch_size, 2, 5, 5, generator=generator, device=generator.device)
    return drawn.mul_(2).sub_(1).mul_(strength / 14)


def warp(images: Tensor, matrices: Tensor, grid_bends: Tensor | None = None) -> Tensor:
    """Apply one map an image, bilinear, black beyond the edges.

    Args:
        images: uint8 or float (B, 1, 28, 28).
        matrices: float (B, 2, 3) as from `affine_matrices`, on any device.
        grid_bends: float (B, 2, 5, 5) as from `bends`, on any device; added to where the maps take their pixels from.

    Returns:
        float (B, 1, 28, 28) on the scale of `images`.
    """
    grid = F.affine_grid(onto(matrices, images.device), list(images.shape), align_corners=False)
    if grid_bends is not None:
        smooth = F.interpolate(
            onto(grid_bends, images.device), list(images.shape[2:]), mode="bicubic", align_corners=True
        )
        grid = grid + smooth.permute(0, 2, 3, 1)
    return F.grid_sample(images.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def onto(drawn: Tensor, device: torch.device) -> Tensor:
    """Bring what was drawn to the images; neither side waits for the other."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)
