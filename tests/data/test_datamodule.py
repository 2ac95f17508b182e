from pathlib import Path

import pytest
import torch

from lit_mnist.data.batches import TensorBatches
from lit_mnist.data.datamodule import MNISTDataModule, stratified_split


def ready(root: Path, stage: str, **settings: int) -> MNISTDataModule:
    datamodule = MNISTDataModule(str(root), **settings)  # type: ignore[arg-type]
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def targets_of(loader: TensorBatches | list[TensorBatches]) -> torch.Tensor:
    assert isinstance(loader, TensorBatches)
    return torch.cat([targets for _, targets in loader])


def test_split_is_stratified_and_complete() -> None:
    targets = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
    train, val = stratified_split(targets, 100, split_seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    assert torch.bincount(targets[val], minlength=4).tolist() == [50, 30, 20, 0]
    for size in (0, 1, 7, 999):
        assert len(stratified_split(targets, size, 0)[1]) == size


def test_split_is_a_function_of_its_seed_alone() -> None:
    targets = torch.arange(1000) % 10
    first = stratified_split(targets, 100, 0)[1]
    torch.manual_seed(123)
    assert torch.equal(stratified_split(targets, 100, 0)[1], first)
    assert not torch.equal(stratified_split(targets, 100, 1)[1], first)


def test_validate_scores_the_images_that_fit_held_out(tiny_root: Path) -> None:
    fit = ready(tiny_root, "fit", val_size=50, seed=1)
    validate = ready(tiny_root, "validate", val_size=50, seed=2)
    assert torch.equal(fit.sets["val"][0], validate.sets["val"][0])
    assert len(fit.sets["train"][0]) == 350
    assert len(targets_of(fit.train_dataloader())) == 350
    assert targets_of(fit.train_dataloader()).tolist() != targets_of(validate.train_dataloader()).tolist()


def test_nothing_held_out(tiny_root: Path) -> None:
    datamodule = ready(tiny_root, "fit", val_size=0)
    assert datamodule.val_dataloader() == []
    assert len(targets_of(datamodule.train_dataloader())) == 400


@pytest.mark.parametrize("batch_size", [1, 7, 64, 60_000])
def test_every_test_image_is_scored_once(tiny_root: Path, batch_size: int) -> None:
    datamodule = ready(tiny_root, "test", batch_size=batch_size)
    assert torch.equal(targets_of(datamodule.test_dataloader()), datamodule.sets["test"][1])
    assert len(datamodule.sets["test"][1]) == 100


def test_bad_settings_are_told_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size must be in 1\.\.60000, got 0; data\.val_size must be in"):
        MNISTDataModule(batch_size=0, val_size=60_000)


def test_a_split_larger_than_the_set(tiny_root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.val_size must be in 0\.\.399, got 400"):
        ready(tiny_root, "fit", val_size=400)


def test_real_mnist_split(real_root: Path) -> None:
    datamodule = ready(real_root, "fit")
    assert len(datamodule.sets["train"][1]) == 55_000
    # 5,000 in the proportions of the 60,000
    assert torch.bincount(datamodule.sets["val"][1]).tolist() == [494, 562, 496, 511, 487, 452, 493, 522, 487, 496]


def test_augmentation_is_a_function_of_seed_epoch_and_step(tiny_root: Path) -> None:
    def augmented(seed: int, epoch: int, step: int, rank: int = 0, processes: int = 1) -> torch.Tensor:
        data = ready(tiny_root, "fit", batch_size=16, val_size=0, seed=seed, shift=2)
        batches = data.train_dataloader()
        batches.rank, batches.processes = rank, processes
        batches.sampler.set_epoch(epoch)
        iterator = iter(batches)
        for _ in range(step):
            next(iterator)
        torch.rand(3)
        images, _ = next(iterator)
        return data.augment(images, torch.zeros(len(images)))[0] - images

    first = augmented(5, 3, 7)
    assert torch.equal(augmented(5, 3, 7), first)
    for other in (augmented(5, 3, 8), augmented(6, 3, 7), augmented(5, 4, 7)):
        assert not torch.equal(other, first)
    assert torch.equal(torch.cat([augmented(5, 3, 7, rank, 3) for rank in range(3)]), first)
    data = ready(tiny_root, "fit", val_size=0, shift=0)
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    assert data.augment(images, torch.zeros(2))[0] is images
