from copy import deepcopy
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler, LambdaCallback
from torch.testing import assert_close

from lit_mnist.data.batches import TensorBatches
from lit_mnist.module import LitMNIST


def some_batches(count: int = 64, batch_size: int = 16) -> TensorBatches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return TensorBatches(images, torch.randint(0, 10, (count,), generator=generator), batch_size, seed=1)


def trainer(**settings: Any) -> Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **settings}
    return Trainer(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings)


def small(**settings: Any) -> LitMNIST:
    torch.manual_seed(0)
    return LitMNIST(**{"layers": "4/2 8/2", "ema_decay": 0.0, **settings})


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected", "own"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1, 1, 1], []),
        ("linear", 0.5, [0.1, 0.325, 0.55, 0.775, 1, 0.75, 0.5, 0.25], []),
        ("cosine", 0.5, [0.1, 0.325, 0.55, 0.775, 1, 0.853553, 0.5, 0.146447], []),
        ("constant", 0.25, [0.1, 0.55, 1, 1, 1, 1, 1, 1], []),
        ("linear", 0.0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 2 / 6, 1 / 6, 1 / 6], [GradientAccumulationScheduler({1: 2})]),
    ],
)
def test_learning_rate_of_each_step(schedule: str, warmup: float, expected: list[float], own: list[Callback]) -> None:
    rates, module = list[float](), small(lr=2.0, schedule=schedule, warmup=warmup)
    record = LambdaCallback(on_train_batch_start=lambda t, *_: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    trainer(callbacks=[record, *own]).fit(module, some_batches())  # 2 epochs of 4 steps
    assert rates == pytest.approx([2 * factor for factor in expected], abs=1e-6)


def test_weight_decay_spares_biases_and_batch_norm() -> None:
    module = small(weight_decay=0.1)
    trainer(max_epochs=1).fit(module, some_batches())
    groups = module.trainer.optimizers[0].param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 3), (0.0, 5)]
    assert sorted(tuple(p.shape) for p in groups[0]["params"]) == [(4, 1, 3, 3), (8, 4, 3, 3), (10, 8)]


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_metrics_are_those_of_all_images_without_smoothing(stage: str) -> None:
    module, loader = small(label_smoothing=0.1), some_batches(count=50, batch_size=16)  # the last batch has 2
    part = getattr(module, f"{stage}_metrics")
    with patch.object(part, "update", Mock(wraps=part.update)) as update:
        getattr(trainer(max_epochs=1), {"train": "fit", "val": "validate"}.get(stage, stage))(module, loader)
    assert update.call_count == 4
    logits, targets = (torch.cat(parts) for parts in zip(*(call.args for call in update.mock_calls), strict=True))
    metrics = module.trainer.callback_metrics
    assert_close(metrics[f"{stage}/loss"], F.cross_entropy(logits.detach(), targets))
    assert_close(metrics[f"{stage}/accuracy"], (logits.argmax(1) == targets).float().mean())
    smoothed = F.cross_entropy(module(loader.images), loader.targets, label_smoothing=0.1)
    assert_close(module.training_step((loader.images, loader.targets), 0), smoothed)


@pytest.mark.parametrize(
    ("decay", "decays"),
    [
        (0.5, [0, 0, 0, 1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14]),  # an average over 2 steps begins behind them
        (0.1, [0, 0, 8 / 89, *[0.1] * 5]),
        (0.99, [0] * 8),  # 8 steps of an average over 100
    ],
)
def test_averaged_weights_are_the_ones_that_are_kept(decay: float, decays: list[float]) -> None:
    plain, averaged = small(lr=0.05), small(lr=0.05, ema_decay=decay)
    states = list[dict[str, torch.Tensor]]()
    record = LambdaCallback(on_train_batch_end=lambda *_: states.append(deepcopy(plain.network.state_dict())))
    trainer(callbacks=[record]).fit(plain, some_batches())  # 8 steps
    trainer().fit(averaged, some_batches())
    for name in ("head.weight", "features.2.running_var"):
        expected = torch.zeros(())
        for share, state in zip(decays, states, strict=True):
            expected = share * expected + (1 - share) * state[name]
        assert_close(averaged.network.state_dict()[name], expected)
    assert averaged.network.state_dict()["features.2.num_batches_tracked"] == 8
