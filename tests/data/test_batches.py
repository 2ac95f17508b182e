import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from lit_mnist.data.batches import TensorBatches, affine, affine_matrices, seeded_generator
from lit_mnist.exact.console import UserError


def batches(seed: int | None = 3) -> TensorBatches:
    return TensorBatches(torch.zeros(10, 1, 28, 28), torch.arange(10), 4, seed)


def order(loader: TensorBatches) -> list[int]:
    return torch.cat([targets for _, targets in loader]).tolist()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    by_epoch, before = [], torch.get_rng_state()
    for epoch in range(3):
        loader = batches()
        loader.sampler.set_epoch(epoch)
        assert order(loader) == order(loader)
        by_epoch.append(order(loader))
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(o) for o in by_epoch}) == 3
    assert order(batches(seed=4)) != by_epoch[0] == order(batches())
    assert order(batches(seed=None)) == list(range(10))


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_parts_of_the_processes_are_the_batch(processes: int) -> None:
    images = torch.arange(25, dtype=torch.uint8).view(25, 1, 1, 1)
    whole = TensorBatches(images, images.flatten().long(), 11, seed=3)
    each = [TensorBatches(images, images.flatten().long(), 11, 3, rank, processes) for rank in range(processes)]
    for batches in (whole, *each):
        batches.sampler.set_epoch(2)
    assert sorted(order(whole)) == list(range(25))
    for number, (batch, *parts) in enumerate(zip(whole, *each, strict=True)):
        for ours, theirs in zip(zip(*parts, strict=True), batch, strict=True):
            assert torch.equal(torch.cat(ours), theirs)
        assert torch.equal(batch[0].flatten().long(), batch[1])  # images go with their targets
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        ends = [batches.part(number) for batches in each]
        assert [stop - start for start, stop, _ in ends] == sizes
        assert {size for _, _, size in ends} == {(11, 11, 3)[number]}


def test_an_epoch_takes_the_hardest_of_its_share_and_draws_the_others() -> None:
    def seen(sign: int) -> list[int]:
        found = list[int]()
        for _, targets in loader:
            loader.keep_losses(sign * targets / 10)
            found += targets.tolist()
        return found

    loader = TensorBatches(torch.zeros(100, 1), torch.arange(100), 8, 3, shares=(1, 0.5, 0.2))
    assert len({*seen(1)}) == 100
    loader.set_epoch(1)
    second = {*seen(-1)}  # which become easy
    hardest, easiest = second & {*range(75, 100)}, second & {*range(25)}
    assert (len(loader), len(second), len(hardest), len(easiest) in range(3, 15)) == (7, 50, 25, True)
    loader.set_epoch(2)
    assert {*(third := seen(-1))} > {*sorted({*range(100)} - second)[-10:]}
    assert (loader.epoch_lengths(range(4)), len(third)) == ([13, 7, 3, 3], 20)
    with pytest.raises(UserError, match="keep_losses"):
        order(loader)
    with pytest.raises(RuntimeError, match=r"\(10\) .*\(100\)"):
        TensorBatches(torch.zeros(10), torch.zeros(10), 4, 3, shares=(1,)).load_state_dict(loader.state_dict())


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


def test_agrees_with_torchvision() -> None:
    images = some_images(16)
    matrices = affine_matrices((16, 1, 28, 28), rotation=20, shift=3, scale=0.2, generator=seeded_generator(5))
    matrices[:, :, 2] = 0  # torchvision takes whole pixels of shift alone
    for image, matrix, turned in zip(images, matrices, affine(images, matrices), strict=True):
        angle, zoom, *_ = drawn(matrix)
        expected = tvf.affine(image, angle, [0, 0], zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
        assert_close(turned, expected, atol=0.05, rtol=0)
        assert not torch.equal(turned, image)
    shift = torch.tensor([[[1.0, 0.0, -3 / 14], [0.0, 1.0, 2 / 14]]])
    assert_close(affine(images[:1], shift)[0, 0, :-2, 3:], images[0, 0, 2:, :-3], atol=1e-3, rtol=0)


def test_a_pixel_stays_square_in_any_size() -> None:
    """A pattern in the middle of a larger image is moved as in its own size, pixel by pixel."""
    images = some_images(8).clone()
    images[:, :, :6], images[:, :, -6:], images[..., :6], images[..., -6:] = 0, 0, 0, 0
    arguments: dict[str, Any] = {"rotation": 40, "shift": 3, "scale": 0.1}
    square = affine(images, affine_matrices(images.shape, **arguments, generator=seeded_generator(5)))
    matrices = affine_matrices((8, 1, 48, 64), **arguments, generator=seeded_generator(5))
    wide = affine(torch.nn.functional.pad(images, (18, 18, 10, 10)), matrices)
    assert_close(wide[:, :, 10:-10, 18:-18], square, atol=0.01, rtol=0)


def test_draws_fill_their_ranges() -> None:
    every = affine_matrices((4000, 1, 28, 28), 10.0, 2.0, 0.1, seeded_generator(1))
    some = affine_matrices((4000, 1, 28, 28), 10.0, 2.0, 0.1, seeded_generator(1), share=0.25)
    same = (some == every).flatten(1).all(1)
    assert 0.22 < same.float().mean() < 0.28
    images = some_images(2)
    assert_close(affine(images, some[~same][:2]), images, atol=1e-3, rtol=0)
    values = torch.tensor([drawn(matrix) for matrix in every[:2000]])
    assert_close(values.amin(0), torch.tensor([-10, 0.9, -2, -2]), atol=0.1, rtol=0)
    assert_close(values.amax(0), torch.tensor([10, 1.1, 2, 2]), atol=0.1, rtol=0)
    assert_close(values.mean(0), torch.tensor([0, 1.0, 0, 0]), atol=0.4, rtol=0)
