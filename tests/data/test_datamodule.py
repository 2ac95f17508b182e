from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import TINY, Command

from lit_mnist.data.batches import TensorBatches
from lit_mnist.data.datamodule import MNISTDataModule, stratified_split
from lit_mnist.exact.console import UserError
from lit_mnist.module import LitMNIST
from lit_mnist.network import Batch


def ready(root: Path, stage: str, **settings: int) -> MNISTDataModule:
    datamodule = MNISTDataModule(str(root), **settings)  # type: ignore[arg-type]
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def targets_of(loader: TensorBatches | list[TensorBatches]) -> torch.Tensor:
    assert isinstance(loader, TensorBatches)
    return torch.cat([targets for _, targets in loader])


def test_split_is_stratified_and_a_function_of_its_seed() -> None:
    targets = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
    train, val = stratified_split(targets, 100, split_seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    assert torch.bincount(targets[val], minlength=4).tolist() == [50, 30, 20, 0]
    assert [len(stratified_split(targets, size, 0)[1]) for size in (0, 1, 7, 999)] == [0, 1, 7, 999]
    torch.manual_seed(123)
    assert torch.equal(stratified_split(targets, 100, 0)[1], val)
    assert not torch.equal(stratified_split(targets, 100, 1)[1], val)


def test_validate_scores_the_images_that_fit_held_out(tiny_root: Path) -> None:
    fit = ready(tiny_root, "fit", val_size=50, seed=1)
    validate = ready(tiny_root, "validate", val_size=50, seed=2)
    assert torch.equal(fit.sets["val"][0], validate.sets["val"][0])
    assert len(fit.sets["train"][0]) == 350
    assert len(targets_of(fit.train_dataloader())) == 350
    assert targets_of(fit.train_dataloader()).tolist() != targets_of(validate.train_dataloader()).tolist()

    everything = ready(tiny_root, "fit", val_size=0)
    assert everything.val_dataloader() == []
    assert len(targets_of(everything.train_dataloader())) == 400
    tests = ready(tiny_root, "test", batch_size=7)
    assert torch.equal(targets_of(tests.test_dataloader()), tests.sets["test"][1])
    assert len(tests.sets["test"][1]) == 100


def test_settings_out_of_range_are_refused_at_once(tiny_root: Path) -> None:
    problems = r"data\.batch_size.*\b0; data\.val_size.*60000; data\.scale.*nan; data\.name.*x$"
    with pytest.raises(UserError, match=problems):
        MNISTDataModule(name="x", batch_size=0, val_size=60_000, scale=float("nan"))
    with pytest.raises(UserError, match=r"data\.val_size must be in 0\.\.399, got 400"):
        ready(tiny_root, "fit", val_size=400)


def test_augmentation_is_a_function_of_seed_epoch_and_step(tiny_root: Path) -> None:
    def augmented(seed: int, epoch: int, step: int, rank: int = 0, processes: int = 1) -> torch.Tensor:
        data = ready(tiny_root, "fit", batch_size=16, val_size=0, seed=seed, shift=2)
        batches = data.train_dataloader()
        batches.rank, batches.processes = rank, processes
        batches.sampler.set_epoch(epoch)
        images, _ = next(islice(batches, step, None))
        torch.rand(3)
        return data.augment(images, torch.zeros(len(images)))[0] - images

    first = augmented(5, 3, 7)
    assert torch.equal(augmented(5, 3, 7), first)
    for other in (augmented(5, 3, 8), augmented(6, 3, 7), augmented(5, 4, 7)):
        assert not torch.equal(other, first)
    assert torch.equal(torch.cat([augmented(5, 3, 7, rank, 3) for rank in range(3)]), first)
    data = ready(tiny_root, "fit", val_size=0, shift=0)
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    assert data.augment(images, torch.zeros(2))[0] is images


@pytest.mark.parametrize("limit", [[], ["--trainer.max_steps", "6"]])
def test_overfit_batches_are_the_same_in_each_epoch(
    command: Command, monkeypatch: pytest.MonkeyPatch, limit: list[str]
) -> None:
    original, seen = LitMNIST.training_step, list[torch.Tensor]()

    def training_step(self: LitMNIST, batch: Batch, batch_idx: int) -> torch.Tensor:
        seen.append(batch[0])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitMNIST, "training_step", training_step)
    assert command("fit", *TINY, "--data.val_size", "0", "--trainer.overfit_batches", "0.3") == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", *limit) == 0
    assert len(seen) == 6
    assert torch.equal(torch.stack(seen[:2] * 3), torch.stack(seen))
