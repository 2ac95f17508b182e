"""LitMNIST: the loss, the metrics, the optimizer and its schedule around a network."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, Literal, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lit_mnist.augment import affine, affine_matrices
from lit_mnist.data.batches import TensorBatches, seeded_generator
from lit_mnist.network import NETWORKS
from lit_mnist.processes import every
from lit_mnist.state import StateError, check, mapping

Batch = tuple[Tensor, Tensor]

# Goes up when a checkpoint can no longer be read by the versions before.
CHECKPOINT_FORMAT = 1

# The training metrics take in so many steps at once: torchmetrics 1.9 spends a hundredth of each step otherwise.
METRIC_STEPS = 16


class MovingAverage(WeightAveraging):
    """An exponential moving average of all weights and of batch norm's statistics, taken behind each step.

    WeightAveraging 2.6 leaves the average on the CPU, where the model lies when it is made: with an accelerator, each
    step would wait for the copy. And it walks through all modules to find their tensors in each step, which takes a
    twentieth of one on a CPU.

    Args:
        decay: the share of the average that stays, 0 < decay < 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._update = get_ema_multi_avg_fn(decay)
        self._averages: list[Tensor] = []
        self._currents: list[Tensor] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model:  # without them, WeightAveraging 2.6 would begin a new average
            check(dict(pl_module.state_dict()), checkpoint.get("current_model_state"), "current_model_state")
            check({"n_averaged": torch.tensor(0)}, checkpoint.get("averaging_state"), "averaging_state")
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device, next(pl_module.parameters()).dtype)
        for tensors, module in ((self._averages, self._average_model.module), (self._currents, pl_module)):
            tensors[:] = [t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._latest_update_step == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)  # the first average is a copy
        elif trainer.global_step > self._latest_update_step:
            self._update(self._averages, self._currents, 0)
            self._latest_update_step = trainer.global_step


class LitMNIST(LightningModule):
    """A digit classifier and how it is trained.

    The defaults are the recipe that `fit` uses when nothing is said; every argument is a plain number, string or
    boolean, so a checkpoint tells all of them and loads with `weights_only=True`.

    Args:
        layers: the network's layers, see the classes in `network`: the convolutions of `digitnet`, the widths of `mlp`.
        dropout: probability of dropout after each layer but the last.
        activation: `relu` or `silu`.
        optimizer: `sgd` (with `momentum`, Nesterov's form by `nesterov`) or `adamw` (betas 0.9 and 0.99).
        lr: the highest learning rate of the schedule.
        momentum: of SGD; AdamW ignores it.
        nesterov: whether SGD looks ahead (https://proceedings.mlr.press/v28/sutskever13.html).
        weight_decay: of the weights of convolutions and the last layer; never of biases and batch norm.
        schedule: how the rate goes down after the warm-up: `constant` (not at all), `linear` or `cosine` (to zero).
        warmup: the share of all steps, 0 to 1, in which the rate rises linearly from a tenth of `lr`.
        label_smoothing: the share of the target spread evenly over the classes in the loss that is trained on
            (https://arxiv.org/abs/1512.00567). The metrics `*/loss` are cross-entropy without it, so they compare.
        ema_decay: validate, test and keep an exponential moving average of the weights with this decay a step;
            0 turns it off.
        rotation: training images are turned by up to so many degrees, drawn uniformly.
        shift: and shifted by up to so many pixels along each axis,
        scale: and scaled by a factor within 1 - scale .. 1 + scale.
        seed: of the augmentation. Step s of epoch e draws from (seed, e, s) alone. The command line sets it to
            `seed_everything`.
        network: `digitnet`, or another name from `network.NETWORKS`.
        classes: how many classes the data has. The command line takes it from the data.

    Raises:
        ValueError: one line for all the arguments that are out of range.
    """

    def __init__(
        self,
        layers: str = "16x5v/2 16v 20/2 24 24v",
        dropout: float = 0.0,
        activation: Literal["relu", "silu"] = "relu",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.4,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: float = 0.2,
        label_smoothing: float = 0.0,
        ema_decay: float = 0.99,
        rotation: float = 0.0,
        shift: float = 1.0,
        scale: float = 0.0,
        seed: int = 1,
        network: str = "digitnet",
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        problems = [
            f"model.{name} must be {allowed}, got {value}"
            for name, value, allowed, ok in (
                ("optimizer", optimizer, "sgd or adamw", optimizer in ("sgd", "adamw")),
                ("schedule", schedule, "constant, linear or cosine", schedule in ("constant", "linear", "cosine")),
                ("lr", lr, "in (0, 1e30]", 0 < lr <= 1e30),
                ("momentum", momentum, "in [0, 1)", 0 <= momentum < 1),
                ("nesterov", nesterov, "false without momentum", not nesterov or momentum > 0 or optimizer != "sgd"),
                ("weight_decay", weight_decay, "in [0, 1e6]", 0 <= weight_decay <= 1e6),
                ("warmup", warmup, "in [0, 1]", 0 <= warmup <= 1),
                ("label_smoothing", label_smoothing, "in [0, 1)", 0 <= label_smoothing < 1),
                ("ema_decay", ema_decay, "in [0, 1)", 0 <= ema_decay < 1),
                ("rotation", rotation, "in 0..180 degrees", 0 <= rotation <= 180),
                ("shift", shift, "in 0..28 pixels", 0 <= shift <= 28),
                ("scale", scale, "in [0, 1)", 0 <= scale < 1),
                ("seed", seed, "an integer from 0", seed >= 0),
                ("network", network, " or ".join(NETWORKS), network in NETWORKS),
                ("classes", classes, "in 2..256", 2 <= classes <= 256),
            )
            if not ok
        ]
        if problems:
            raise ValueError("; ".join(problems))
        # channels_last is 1.5 times as fast on a CPU
        self.network = NETWORKS[network](layers, dropout, activation, classes).to(memory_format=torch.channels_last)
        self.metrics = nn.ModuleDict()
        for stage in ("train", "val", "test"):
            # "disable": looking for NaN would wait for the device in every step. With it, torchmetrics 1.9 ignores
            # the weights of a mean, so this one is given the loss of each image.
            self.metrics[f"{stage}/loss"] = MeanMetric(nan_strategy="disable")
            # validate_args would look at every target, with the same wait
            self.metrics[f"{stage}/accuracy"] = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []  # not yet in the training metrics
        self.example_input_array = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)  # for Lightning's model table

    def forward(self, images: Tensor) -> Tensor:
        """Map raw images, uint8 (B, 1, 28, 28), to logits, float (B, C) for C classes."""
        logits: Tensor = self.network(images)
        return logits

    def augment(self, images: Tensor, batch_idx: int) -> Tensor:
        """Move, turn and scale raw images (B, 1, 28, 28) at random, the same way whenever this step is taken."""
        hp: Any = self.hparams
        if hp.rotation == hp.shift == hp.scale == 0:
            return images
        generator = seeded_generator(hp.seed, self.current_epoch, batch_idx)
        start, stop, size = self.part_of_batch(batch_idx, len(images))
        # on each process those of the whole batch, so that an image's is the same on any number of them
        return affine(images, affine_matrices(size, hp.rotation, hp.shift, hp.scale, generator)[start:stop])

    def part_of_batch(self, batch_idx: int, images: int) -> tuple[int, int, int]:
        """Where this process's images start and end in a training step's batch, and the size of the batch."""
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return 0, images, images
        loader = trainer.train_dataloader
        if isinstance(loader, TensorBatches) and loader.processes == trainer.world_size:
            return loader.part(batch_idx)
        # a loader of another kind, such as Lightning gives a DistributedSampler, has as many for each
        return images * trainer.global_rank, images * (trainer.global_rank + 1), images * trainer.world_size

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, targets = batch
        log_probabilities = F.log_softmax(self(self.augment(images, batch_idx)), dim=1)
        losses = F.nll_loss(log_probabilities, targets, reduction="none")
        cross_entropy = self._mean(losses, batch_idx)
        self._steps.append((losses.detach(), log_probabilities.detach(), targets))
        if (batch_idx + 1) % METRIC_STEPS == 0:
            self._update_train()
        smoothing = float(self.hparams["label_smoothing"])
        loss = cross_entropy
        if smoothing:
            loss = (1 - smoothing) * cross_entropy - smoothing * self._mean(log_probabilities, batch_idx)
        return {"loss": loss, "cross_entropy": cross_entropy.detach()}

    def _mean(self, values: Tensor, batch_idx: int) -> Tensor:
        """The mean over a training step's batch; of several processes' results the mean is that."""
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return values.mean()
        # the parts may differ in size, and one may be empty
        _, _, size = self.part_of_batch(batch_idx, len(values))
        return values.sum() * (trainer.world_size * len(values) / (size * max(1, values.numel())))

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self._evaluate("val", batch)}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities of the classes, float (B, C)."""
        return self(batch[0]).softmax(dim=1)

    def on_train_epoch_end(self) -> None:
        self._update_train()
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _evaluate(self, stage: str, batch: Batch) -> Tensor:
        images, targets = batch
        logits: Tensor = self(images)
        self._update(stage, F.cross_entropy(logits, targets, reduction="none"), logits, targets)
        return logits

    def _update_train(self) -> None:
        if self._steps:
            # those of a checkpoint lie on the CPU
            parts = ([part.to(self.device) for part in parts] for parts in zip(*self._steps, strict=True))
            self._update("train", *map(torch.cat, parts))
            self._steps = []

    def _update(self, stage: str, losses: Tensor, scores: Tensor, targets: Tensor) -> None:
        if len(targets):  # one of many processes may have none, and torchmetrics 1.9 fails on them
            self.metric(f"{stage}/loss").update(losses)
            self.metric(f"{stage}/accuracy").update(scores, targets)

    def _log_epoch(self, stage: str) -> None:
        # Not by `self.log` with the metric in each step: Lightning 2.6 then knows the metric only after a step, and a
        # run resumed behind the last batch of an epoch would lose that epoch's training metrics.
        for name in (f"{stage}/loss", f"{stage}/accuracy"):
            self.log(name, self.metric(name).compute(), prog_bar=stage == "val")
            self.metric(name).reset()

    def metric(self, name: str) -> Metric:
        """The metric behind `train/loss`, `val/accuracy` and so on."""
        return cast(Metric, self.metrics[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # the half-filled metrics of an epoch are no part of Lightning's checkpoints
        checkpoint["lit_mnist_format"] = CHECKPOINT_FORMAT
        metrics = {
            name: {key: torch.as_tensor(value).cpu().clone() for key, value in self.metric(name).metric_state.items()}
            for name in ("train/loss", "train/accuracy")
        }
        # as they are, for a sum taken in other portions has other last bits
        own = {"metrics": metrics, "metric_steps": [tuple(part.cpu() for part in step) for step in self._steps]}
        first, *others = every(own)
        checkpoint.update(first)
        if others:
            checkpoint["metrics_of_others"] = others

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        parts = [checkpoint, *checkpoint.get("metrics_of_others", [])]
        classes = int(self.hparams["classes"])
        step = (torch.zeros(0), torch.zeros(0, classes), torch.zeros(0, dtype=torch.int64))
        for part in parts:
            for name in ("train/loss", "train/accuracy"):
                check(
                    dict(self.metric(name).metric_state), mapping(part["metrics"], "metrics")[name], f"metrics/{name}"
                )
            for given in part["metric_steps"]:
                for own, tensor in zip(step, given, strict=True):
                    check(own, tensor[:0], "metric_steps")
                if len({len(tensor) for tensor in given}) > 1:
                    raise StateError("metric_steps has tensors of different lengths")
        rank, processes = (self._trainer.global_rank, self._trainer.world_size) if self._trainer else (0, 1)
        if len(parts) == processes:
            parts = [parts[rank]]
        elif rank > 0:
            parts = []  # on another number of processes the first has all that was counted
        for name in ("train/loss", "train/accuracy"):
            metric, states = self.metric(name), [part["metrics"][name] for part in parts]
            for key in states[0] if states else ():
                setattr(metric, key, sum(state[key] for state in states))
            metric._update_count = 1  # else torchmetrics warns that it was never updated
        self._steps = [step for part in parts for step in part["metric_steps"]]

    def on_fit_start(self) -> None:
        if self.trainer.global_rank > 0:  # dropout of its own on each process
            generator = seeded_generator(int(self.hparams["seed"]), self.trainer.global_rank)
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))

    def on_train_start(self) -> None:
        # Lightning restores optimizer and schedule as they were saved, settings included; what is asked for now wins
        hp: Any = self.hparams
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [hp.lr] * len(optimizer.param_groups)
        for group, weight_decay in zip(optimizer.param_groups, (hp.weight_decay, 0.0), strict=True):
            group["initial_lr"], group["weight_decay"] = hp.lr, weight_decay
            group["lr"] = hp.lr * self.lr_factor(scheduler.last_epoch)
            if hp.optimizer == "sgd":
                group["momentum"], group["nesterov"] = hp.momentum, hp.nesterov

    def configure_callbacks(self) -> list[Callback]:
        # outside fit it would warn that it has nothing to average
        decay = self.hparams["ema_decay"] if self.trainer.state.fn == "fit" else 0
        return [MovingAverage(decay)] if decay else []

    def configure_optimizers(self) -> Any:
        hp: Any = self.hparams
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": hp.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if hp.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=hp.lr, momentum=hp.momentum, nesterov=hp.nesterov)
        else:
            optimizer = torch.optim.AdamW(groups, lr=hp.lr, betas=(0.9, 0.99))
        return [optimizer], [{"scheduler": LambdaLR(optimizer, self.lr_factor), "interval": "step"}]

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of `lr`."""
        hp: Any = self.hparams
        if step == 0 or not self.needs_total_steps:
            # step 0 is asked for before the trainer knows how many steps there are
            return 0.1 if hp.warmup > 0 else 1.0
        total = self.total_steps()
        warmup_steps = hp.warmup * total
        if step < warmup_steps:
            return 0.1 + 0.9 * step / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1.0, total - warmup_steps))
        if hp.schedule == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if hp.schedule == "cosine" else 1.0

    @property
    def needs_total_steps(self) -> bool:
        """Whether the learning rate depends on the length of the whole fit."""
        return bool(self.hparams["schedule"] != "constant" or self.hparams["warmup"] > 0)

    def total_steps(self) -> int:
        """How many optimizer steps the whole fit takes.

        Not `trainer.estimated_stepping_batches`: in Lightning 2.6 reading that sets up the train loader before a
        checkpoint's loader state is there, and a resumed epoch starts over (Lightning's issue 20550).
        """
        trainer = self.trainer
        steps_an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits = [steps_an_epoch * trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
        limits += [trainer.max_steps] if trainer.max_steps > 0 else []
        assert limits, "a schedule needs a trainer with max_epochs or max_steps"
        return int(min(limits))
