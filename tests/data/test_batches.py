import pytest
import torch

from lit_mnist.data.batches import TensorBatches, seeded_generator


def batches(size: int = 10, batch_size: int = 4, seed: int | None = 3) -> TensorBatches:
    images = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    return TensorBatches(images, torch.arange(size), batch_size, seed)


def order(loader: TensorBatches) -> list[int]:
    return torch.cat([targets for _, targets in loader]).tolist()


def test_every_sample_once_and_images_go_with_their_targets() -> None:
    loader = batches()
    sizes = []
    for images, targets in loader:
        assert torch.equal(images[:, 0, 0, 0].long(), targets)
        sizes.append(len(targets))
    assert sizes == [4, 4, 2]
    assert len(loader) == 3
    assert sorted(order(loader)) == list(range(10))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    by_epoch = []
    for epoch in range(3):
        torch.rand(epoch)  # what others draw does not matter
        loader = batches()
        loader.sampler.set_epoch(epoch)
        assert order(loader) == order(loader)
        by_epoch.append(order(loader))
    assert len({tuple(o) for o in by_epoch}) == 3
    assert order(batches(seed=4)) != by_epoch[0]
    assert order(batches()) == by_epoch[0]


def test_the_global_generator_is_left_alone_and_without_a_seed_the_order_is_that_of_the_tensors() -> None:
    before = torch.get_rng_state()
    order(batches())
    assert torch.equal(torch.get_rng_state(), before)
    loader = batches(seed=None)
    loader.sampler.set_epoch(5)
    assert order(loader) == list(range(10))


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resumes_after_any_batch(done: int) -> None:
    whole = order(batches())
    first = batches()
    iterator = iter(first)
    for _ in range(done):
        next(iterator)
    second = batches()
    second.load_state_dict(first.state_dict())
    rest = whole[4 * done :]
    assert order(second) == (rest or whole)  # a finished epoch leaves nothing to skip in the next
    assert order(second) == whole  # and the skip is for one epoch


def test_a_state_is_for_its_epoch() -> None:
    first = batches()
    first.sampler.set_epoch(2)
    next(iter(first))
    second = batches()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"epoch": 2, "batches_done": 1}
    second.sampler.set_epoch(3)
    assert len(order(second)) == 10


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
        assert torch.equal(torch.cat([part[0] for part in parts]), batch[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), batch[1])
        sizes = [len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        ends = [batches.part(number) for batches in each]
        assert [stop - start for start, stop, _ in ends] == sizes
        assert {size for _, _, size in ends} == {(11, 11, 3)[number]}
