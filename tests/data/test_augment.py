import math

import torch
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from lit_mnist.data.augment import affine, affine_matrices
from lit_mnist.data.batches import seeded_generator


def some_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 7, 7, generator=generator)
    images = torch.nn.functional.interpolate(coarse, 28, mode="bilinear") * 255
    images[:, :, :2], images[:, :, -2:], images[..., :2], images[..., -2:] = 0, 0, 0, 0
    return images


def drawn(matrix: torch.Tensor) -> tuple[float, float, float, float]:
    """Angle in degrees, zoom, and the shift in pixels that an inverse map undoes."""
    linear, offset = matrix[:, :2], matrix[:, 2]
    zoom = 1 / math.sqrt(torch.det(linear).item())
    angle = math.degrees(math.atan2(linear[0, 1].item(), linear[0, 0].item()))
    dx, dy = (-torch.linalg.inv(linear) @ offset * 14).tolist()
    return angle, zoom, dx, dy


def test_agrees_with_torchvision_on_single_images() -> None:
    images = some_images(16)
    matrices = affine_matrices(16, rotation=20, shift=3, scale=0.2, generator=seeded_generator(5))
    transformed = affine(images, matrices)
    for image, matrix, ours in zip(images, matrices, transformed, strict=True):
        angle, zoom, dx, dy = drawn(matrix)
        # torchvision takes whole pixels of shift alone: shifts have a test of their own
        turned = tvf.affine(image, angle, [0, 0], zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
        without_shift = matrix.clone()
        without_shift[:, 2] = 0
        assert_close(affine(image[None], without_shift[None])[0], turned, atol=0.05, rtol=0)
        assert abs(angle) <= 20
        assert 0.8 <= zoom <= 1.2
        assert max(abs(dx), abs(dy)) <= 3 + 1e-4
        assert not torch.equal(ours, turned)


def test_whole_shifts_agree_with_torchvision() -> None:
    image = some_images(1)
    matrix = torch.tensor([[[1.0, 0.0, -3 / 14], [0.0, 1.0, 2 / 14]]])
    expected = tvf.affine(image, 0.0, [3, -2], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
    assert_close(affine(image, matrix), expected, atol=1e-3, rtol=0)
    assert_close(affine(image, matrix)[0, 0, :-2, 3:], image[0, 0, 2:, :-3], atol=1e-3, rtol=0)


def test_a_share_is_moved() -> None:
    every = affine_matrices(4000, 10.0, 2.0, 0.1, seeded_generator(1))
    some = affine_matrices(4000, 10.0, 2.0, 0.1, seeded_generator(1), share=0.25)
    same = (some == every).flatten(1).all(1)
    assert 0.22 < same.float().mean() < 0.28
    images = some_images(2)
    assert_close(affine(images, some[~same][:2]), images, atol=1e-3, rtol=0)


def test_draws_fill_their_ranges() -> None:
    values = torch.tensor([drawn(m) for m in affine_matrices(2000, 10.0, 2.0, 0.1, seeded_generator(1))])
    assert_close(values.amin(0), torch.tensor([-10, 0.9, -2, -2]), atol=0.1, rtol=0)
    assert_close(values.amax(0), torch.tensor([10, 1.1, 2, 2]), atol=0.1, rtol=0)
    assert_close(values.mean(0), torch.tensor([0, 1.0, 0, 0]), atol=0.4, rtol=0)
