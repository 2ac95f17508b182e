from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, Capsys, Command, fails, last_checkpoint, watch

from lit_mnist.data.datamodule import MNISTDataModule, stratified_split
from lit_mnist.exact.console import UserError
from lit_mnist.module import LitMNIST
from lit_mnist.network import Batch


def ready(root: Path, stage: str, **settings: Any) -> MNISTDataModule:
    datamodule = MNISTDataModule(str(root), **settings)
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def targets_of(loader: Any) -> torch.Tensor:
    return torch.cat([targets for _, targets in loader])


def test_split_is_stratified_and_a_function_of_its_seed() -> None:
    targets = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
    train, val = stratified_split(targets, 100, split_seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    assert torch.bincount(targets[val], minlength=4).tolist() == [50, 30, 20, 0]
    assert [len(stratified_split(targets, size, 0)[1]) for size in (0, 1, 7, 999)] == [0, 1, 7, 999]
    assert not torch.equal(stratified_split(targets, 100, 1)[1], val)
    for values in (torch.rand(1000), torch.rand(1000, 2), torch.zeros(1000, 4, 4, dtype=torch.int64)):
        assert len(set(stratified_split(values, 100, 0)[1].tolist())) == 100


def test_validate_scores_the_images_that_fit_held_out(tiny_root: Path) -> None:
    fit = ready(tiny_root, "fit", val_size=50, seed=1)
    validate = ready(tiny_root, "validate", val_size=50, seed=2)
    loaders: Any = [each.val_dataloader() for each in (fit, validate)]
    held_out, again = (torch.cat([images for images, _ in loader]) for loader in loaders)
    assert torch.equal(held_out, again[:50])
    assert fit.train_dataloader().images is loaders[0].images  # one copy of all
    assert len(targets_of(fit.train_dataloader())) == 350
    assert targets_of(fit.train_dataloader()).tolist() != targets_of(validate.train_dataloader()).tolist()

    everything = ready(tiny_root, "fit", val_size=0)
    assert everything.val_dataloader() == []
    assert len(targets_of(everything.train_dataloader())) == 400
    tests = ready(tiny_root, "test", batch_size=7)
    assert torch.equal(targets_of(tests.test_dataloader()), tests.sets["test"][1])
    assert len(tests.sets["test"][1]) == 100


def test_settings_out_of_range_are_refused_at_once(tiny_root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.seed.*-1; data\.scale.*nan; data\.name.*x; data\.shares.*\[1, 0\]$"):
        MNISTDataModule(name="x", seed=-1, scale=float("nan"), shares=[1, 0])
    for name, low, high in (("val_size", 0, 399), ("batch_size", 1, 350)):
        for value in (low - 1, high + 1):
            with pytest.raises(UserError, match=rf"data\.{name} must be in {low}\.\.{high}, got {value}$"):
                ready(tiny_root, "fit", **{"val_size": 50, name: value})


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


@pytest.mark.parametrize("size", [28, 14])
def test_masks_move_with_their_images(tiny_root: Path, size: int) -> None:
    data = ready(tiny_root, "fit", batch_size=16, val_size=0, shift=6)
    next(iter(data.train_dataloader()))
    images, shape = torch.zeros(16, 1, 28, 28, dtype=torch.uint8), (16, 1, size, size)
    images[:, :, 8:20, 10:16] = 200
    labels = 3 * (torch.nn.functional.interpolate(images, size)[:, 0] > 0).long()
    moved, masks = data.augment(images, labels)
    expected = torch.nn.functional.interpolate(moved, size, mode="area") > 100
    assert (masks.dtype, masks.unique().tolist()) == (torch.int64, [0, 3])
    assert float(((masks == 3) == expected[:, 0]).float().mean()) > 0.97 > float((labels == masks).float().mean())
    heights = data.augment(images, labels.float().view(shape))[1]  # values have something in between
    assert (heights.shape, len(heights.unique()) > 2) == (shape, True)


COLOURS = (3, 20, 12)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_other_images_and_values_by_one_attribute(
    kind: str, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """Images of another size and in colours, and values in place of classes: trained, resumed, scored, and shown."""
    images = torch.randint(0, 256, (200, *COLOURS), dtype=torch.uint8)
    targets = torch.rand(200) if kind == "values" else torch.arange(200) % 4
    monkeypatch.setattr(MNISTDataModule, "_load", lambda *_, **__: (images, targets))
    assert f"images {COLOURS}" in fails(capsys, "fit", *TINY, run=command)
    assert not Path("lightning_logs").exists()
    monkeypatch.setattr(MNISTDataModule, "image_shape", COLOURS)
    if kind == "values":
        assert "targets torch.float32" in fails(capsys, "fit", *TINY, run=command)

        def step(self: LitMNIST, batch: Batch, batch_idx: int) -> torch.Tensor:
            loss = torch.nn.functional.mse_loss(self(batch[0])[:, 0], batch[1])
            self.log("train/loss" if self.trainer.training else "val/loss", loss, on_step=False, on_epoch=True)
            return loss

        for name in ("train", "validation", "test"):
            monkeypatch.setattr(LitMNIST, f"{name}{'ing' * (name == 'train')}_step", step)
            monkeypatch.setattr(LitMNIST, f"on_{name}_epoch_end", lambda _: None)
    monkeypatch.setattr(MNISTDataModule, "classes", 1 if kind == "values" else 4)
    flags = ["--data.rotation", "20", "--trainer.max_epochs", "1", "--best.monitor", "val/loss", "--best.mode", "min"]
    assert command("fit", *TINY, *flags) == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    assert last_checkpoint()["hyper_parameters"]["image_shape"] == COLOURS
    assert last_checkpoint()["state_dict"]["network.features.0.weight"].shape[1] == 3
    for name in ("predict", "demo", "export --output a.pt2"):
        assert "not images (1, 28, 28)" in fails(capsys, *name.split(), "--ckpt_path", "last")


@pytest.mark.parametrize("limit", [[], ["--trainer.max_steps", "6"]])
def test_overfit_batches_are_the_same_in_each_epoch(
    command: Command, monkeypatch: pytest.MonkeyPatch, limit: list[str]
) -> None:
    seen = list[torch.Tensor]()
    watch(monkeypatch, lambda _, batch: seen.append(batch[0]))
    assert command("fit", *TINY, "--data.val_size", "0", "--trainer.overfit_batches", "0.3") == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", *limit) == 0
    assert len(seen) == 6
    assert torch.equal(torch.stack(seen[:2] * 3), torch.stack(seen))
