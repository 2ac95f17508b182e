import math
from itertools import islice

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from lit_mnist.data.batches import TensorBatches, affine, affine_matrices, seeded_generator


def batches(size: int = 10, batch_size: int = 4, seed: int | None = 3) -> TensorBatches:
    images = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    return TensorBatches(images, torch.arange(size), batch_size, seed)


def order(loader: TensorBatches) -> list[int]:
    return torch.cat([targets for _, targets in loader]).tolist()


def test_every_sample_once_and_images_go_with_their_targets() -> None:
    loader = batches()
    assert all(torch.equal(images[:, 0, 0, 0].long(), targets) for images, targets in loader)
    assert [len(targets) for _, targets in loader] == [4, 4, 2]
    assert len(loader) == 3
    assert sorted(order(loader)) == list(range(10))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    by_epoch, before = [], torch.get_rng_state()
    for epoch in range(3):
        loader = batches()
        loader.sampler.set_epoch(epoch)
        assert order(loader) == order(loader)
        by_epoch.append(order(loader))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)  # what others draw does not matter
    assert len({tuple(o) for o in by_epoch}) == 3
    assert order(batches(seed=4)) != by_epoch[0] == order(batches())
    unshuffled = batches(seed=None)
    unshuffled.sampler.set_epoch(5)
    assert order(unshuffled) == list(range(10))


def test_resumes_after_any_batch() -> None:
    whole = order(batches())
    for done in range(4):
        first, second = batches(), batches()
        assert len(list(islice(first, done))) == done
        second.load_state_dict(first.state_dict())
        assert order(second) == (whole[4 * done :] or whole)  # a finished epoch leaves nothing to skip in the next
        assert order(second) == whole  # and the skip is for one epoch
    loader = batches()
    loader.load_state_dict({"epoch": 2, "batches_done": 1})
    assert loader.state_dict() == {"epoch": 2, "batches_done": 1}
    loader.sampler.set_epoch(3)
    assert len(order(loader)) == 10
    loader.fixed = True
    for done in (0, 1):  # a fixed order is that of the first epoch
        loader.load_state_dict({"epoch": 4, "batches_done": done})
        loader.sampler.set_epoch(4)
        assert order(loader) == whole[4 * done :]
        assert loader.position[0] == 0


def test_seeds_are_mixed() -> None:
    keys = [(1, 2), (2, 1), (1, 2, 0), (1, 3), (0,), (1,)]
    draws = {tuple(torch.randint(0, 2**31, (2,), generator=seeded_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_parts_of_the_processes_are_the_batch(processes: int) -> None:
    images = torch.arange(25, dtype=torch.uint8).view(25, 1, 1, 1)
    whole = TensorBatches(images, images.flatten().long(), 11, seed=3)
    each = [TensorBatches(images, images.flatten().long(), 11, 3, rank, processes) for rank in range(processes)]
    for batches in (whole, *each):
        batches.sampler.set_epoch(2)
    for number, (batch, *parts) in enumerate(zip(whole, *each, strict=True)):
        for ours, theirs in zip(zip(*parts, strict=True), batch, strict=True):
            assert torch.equal(torch.cat(ours), theirs)
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        ends = [batches.part(number) for batches in each]
        assert [stop - start for start, stop, _ in ends] == sizes
        assert {size for _, _, size in ends} == {(11, 11, 3)[number]}


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
    matrices = affine_matrices(16, rotation=20, shift=3, scale=0.2, generator=seeded_generator(5))
    matrices[:, :, 2] = 0  # torchvision takes whole pixels of shift alone
    for image, matrix, turned in zip(images, matrices, affine(images, matrices), strict=True):
        angle, zoom, *_ = drawn(matrix)
        expected = tvf.affine(image, angle, [0, 0], zoom, [0.0, 0.0], InterpolationMode.BILINEAR)
        assert_close(turned, expected, atol=0.05, rtol=0)
        assert not torch.equal(turned, image)
    shift = torch.tensor([[[1.0, 0.0, -3 / 14], [0.0, 1.0, 2 / 14]]])
    assert_close(affine(images[:1], shift)[0, 0, :-2, 3:], images[0, 0, 2:, :-3], atol=1e-3, rtol=0)


def test_draws_fill_their_ranges() -> None:
    every = affine_matrices(4000, 10.0, 2.0, 0.1, seeded_generator(1))
    some = affine_matrices(4000, 10.0, 2.0, 0.1, seeded_generator(1), share=0.25)
    same = (some == every).flatten(1).all(1)
    assert 0.22 < same.float().mean() < 0.28
    images = some_images(2)
    assert_close(affine(images, some[~same][:2]), images, atol=1e-3, rtol=0)
    values = torch.tensor([drawn(matrix) for matrix in every[:2000]])
    assert_close(values.amin(0), torch.tensor([-10, 0.9, -2, -2]), atol=0.1, rtol=0)
    assert_close(values.amax(0), torch.tensor([10, 1.1, 2, 2]), atol=0.1, rtol=0)
    assert_close(values.mean(0), torch.tensor([0, 1.0, 0, 0]), atol=0.4, rtol=0)
