"""MNISTDataModule: the splits, and one loader factory."""

import math
import zlib
from functools import cached_property
from typing import Any, cast

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches, affine, affine_matrices, seeded_generator
from lit_mnist.exact.console import UserError
from lit_mnist.network import DIGITS, Batch

EVALUATION_BATCH_SIZE = 500  # larger ones only wait longer for memory on a CPU; the scores do not depend on it
MOST = {"split_seed": math.inf, "seed": math.inf, "rotation": 180, "shift": 28, "scale": 0.999, "augmented": 1}


def stratified_split(targets: Tensor, val_size: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Split by targets, int64 (N,), each class by its share to within one image: both parts' sorted int32 indices."""
    if targets.ndim > 1 or targets.is_floating_point() or int(targets.min()) < 0:  # no classes
        targets = torch.zeros(len(targets), dtype=torch.int64)
    shares = val_size * torch.bincount(targets).double() / len(targets)
    sizes = shares.long()
    # the largest remainders get what rounding left over
    sizes[(sizes - shares).argsort(stable=True)[: val_size - int(sizes.sum())]] += 1
    generator = seeded_generator(split_seed)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for digit, size in enumerate(sizes.tolist()):
        members = (targets == digit).nonzero().flatten()
        held_out[members[torch.randperm(len(members), generator=generator)[:size]]] = True
    return (~held_out).nonzero().flatten().int(), held_out.nonzero().flatten().int()


class MNISTDataModule(LightningDataModule):
    """MNIST or a set of its form, downloaded once, verified, split, and kept in memory as uint8 tensors.

    Args:
        root: folder of the data; MNIST's files lie in `root/MNIST/raw`, as torchvision has them.
        name: data set: `mnist`, `fashion_mnist`, `kmnist`, `qmnist`, `emnist_digits`, `emnist_letters`,
            `emnist_balanced`; or `idx`: four files of your own right in `root`, named as MNIST's are.
        batch_size: images in a training step, of all processes together; at most those to train on.
        val_size: images held out of the training set for validation, in the classes' proportions; 0 holds out none.
        split_seed: seed of their choice, independent of the run's seed: runs with different seeds hold out the same.
        seed: seed of the order and augmentation of the training images. The command line sets it to `seed_everything`.
        download: whether missing or wrong files may be fetched.
        rotation: degrees by which training images are rotated at most, drawn uniformly.
        shift: pixels by which training images are shifted along each axis at most, drawn uniformly.
        scale: share by which training images are scaled up or down at most, drawn uniformly.
        augmented: share of the training images, drawn anew in each epoch, that are rotated, shifted and scaled.
        shares: shares of the training images in the first epoch, the second, ...; later epochs have the last. Half of
            a share is drawn, half are the images whose loss was largest when last seen. None: all, in each epoch.
    """

    image_shape = DIGITS  # channels, height and width, which the network must take

    def __init__(
        self,
        root: str = "data",
        name: str = "mnist",
        batch_size: int = 128,
        val_size: int = 5000,
        split_seed: int = 0,
        seed: int = 1,
        download: bool = True,
        rotation: float = 0.0,
        shift: float = 1.0,
        scale: float = 0.0,
        augmented: float = 1.0,
        shares: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["root", "download"])  # they depend on the machine
        self.root, self.download = root, download
        self.sets: dict[str, Batch] = {}
        self.parts: dict[str, Tensor] = {}  # which images of the training set are trained on, and which held out
        self.train_batches: TensorBatches | None = None
        checks = [(key, f"in 0..{most}", 0 <= self.hparams[key] <= most) for key, most in MOST.items()]
        checks.append(("name", f"one of {', '.join(datasets.SETS)}", name in datasets.SETS))
        checks.append(("shares", "numbers over 0 and up to 1", all(0 < share <= 1 for share in shares or [])))
        if wrong := [f"data.{key} must be {allowed}, got {self.hparams[key]}" for key, allowed, ok in checks if not ok]:
            raise UserError("; ".join(wrong))

    @cached_property
    def classes(self) -> int:
        """How many classes the data has (1 of values), and so the network; UserError if labels cannot be read."""
        return datasets.classes(self.root, self.hparams["name"])

    @cached_property
    def test_set(self) -> str:
        """What a test score is of: the data's name, and of a user's own files a checksum too."""
        name = str(self.hparams["name"])
        if name != "idx":
            return name
        images, targets = datasets.load(self.root, False, name)
        return f"{name} {zlib.crc32(targets.numpy().data, zlib.crc32(images.numpy().data)):08x}"

    def prepare_data(self) -> None:
        datasets.prepare(self.root, self.download, self.hparams["name"])

    def setup(self, stage: str) -> None:
        if stage == "test" and "test" not in self.sets:
            self.sets["test"] = self._load(train=False)
        elif stage in ("fit", "validate") and not self.parts:
            hp: Any = self.hparams
            self.sets["train"] = images, targets = self._load(train=True)
            if not 0 <= hp.val_size < len(images):
                raise UserError(f"data.val_size must be in 0..{len(images) - 1}, got {hp.val_size}")
            least, most = self.trainer.world_size if self.trainer else 1, len(images) - hp.val_size
            if not least <= hp.batch_size <= most:  # at least one image for each process
                raise UserError(f"data.batch_size must be in {least}..{most}, got {hp.batch_size}")
            # validate must score the same images that fit held out, so both stages split alike
            self.parts = dict(zip(("train", "val"), stratified_split(targets, hp.val_size, hp.split_seed), strict=True))
        self.train_batches = None  # whose losses are of another fit

    def _load(self, train: bool) -> Batch:
        """Load the images, uint8 (N, *image_shape), and their targets, (N,) or of another form."""
        return datasets.load(self.root, train, self.hparams["name"])

    def train_dataloader(self) -> TensorBatches:
        hp, trainer = cast(Any, self.hparams), cast(Any, self.trainer)
        if self.train_batches is None:
            fixed = bool(trainer and trainer.overfit_batches)  # Lightning 2.6 fixes the batches of a DataLoader alone
            shares = () if fixed else hp.shares or ()
            self.train_batches = self._batches("train", hp.batch_size, seed=hp.seed, shares=shares, fixed=fixed)
        if trainer and self.train_batches.shares:
            self.train_batches.set_epoch(trainer.current_epoch)
            trainer.reload_dataloaders_every_n_epochs = 1  # or Lightning asks for the first epoch's number of batches
            least, limit = min(self.train_batches.epoch_lengths(range(len(hp.shares)))), trainer.limit_train_batches
            interval = trainer.val_check_interval if trainer.check_val_every_n_epoch else 0
            if (isinstance(limit, float) and limit * least < 1) or (isinstance(interval, int) and interval > least):
                raise UserError(f"data.shares: {least} batches are below val_check_interval or limit_train_batches")
        return self.train_batches

    def val_dataloader(self) -> TensorBatches | list[TensorBatches]:
        return self._batches("val", EVALUATION_BATCH_SIZE) if self.hparams["val_size"] else []  # no validation

    def test_dataloader(self) -> TensorBatches:
        return self._batches("test", EVALUATION_BATCH_SIZE)

    def _batches(self, name: str, batch_size: int, **options: Any) -> TensorBatches:
        whole = "test" if name == "test" else "train"
        images, targets = self.sets[whole]
        model: Any = self.trainer.lightning_module.hparams if self.trainer else {}
        classes, shape = model.get("classes", self.classes), tuple(model.get("image_shape", self.image_shape))
        if classes < self.classes or shape != images.shape[1:] or (targets.is_floating_point() and classes != 1):
            found = f"{self.classes} classes, images {tuple(images.shape[1:])} and targets {targets.dtype}"
            made_for = f"{classes} classes (1 of values) and images {shape}"
            raise UserError(f"data.name {self.hparams['name']} has {found}, and the model was made for {made_for}")
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            device = images.device  # too large: Lightning moves it there batch by batch
        self.sets[whole] = images.to(device), targets.to(device)  # once, whatever the parts
        if self.trainer:
            options |= {"rank": self.trainer.global_rank, "processes": self.trainer.world_size}
        return TensorBatches(*self.sets[whole], batch_size, part_of=self.parts.get(name), **options)

    def plot(self, batch: Batch) -> Tensor:
        """Return the pictures of a batch that the board shows, (B, 1 or 3, H, W) on the scale 0..255; override it."""
        return batch[0] if isinstance(batch, (tuple, list)) else torch.empty(0)  # your own batches may be others

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.augment(*batch) if self.trainer and self.trainer.training else batch

    def augment(self, images: Tensor, targets: Tensor) -> Batch:
        """Move, turn and scale raw images (B, C, H, W), and masks (B, ..., H, W) with them, by a draw of the step."""
        hp: Any = self.hparams
        if hp.rotation == hp.shift == hp.scale == 0 or hp.augmented == 0 or not len(images):
            return images, targets
        assert self.train_batches
        epoch, step = self.train_batches.position
        start, stop, size = self.train_batches.part(step)
        generator = seeded_generator(hp.seed, epoch, step)
        # of the whole batch, of which each process takes its part: the same on any number of them
        shape, ranges = (size, *images.shape[1:]), (hp.rotation, hp.shift, hp.scale)
        matrices = affine_matrices(shape, *ranges, generator, hp.augmented)[start:stop]
        if targets.ndim > 2:
            masks = targets.view(len(targets), -1, *targets.shape[-2:])
            mode = "bilinear" if targets.is_floating_point() else "nearest"  # classes have nothing in between
            targets = affine(masks, matrices, mode).to(targets.dtype).view_as(targets)
        return affine(images, matrices), targets
