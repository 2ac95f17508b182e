from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
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
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 0.5, [0.1, 0.325, 0.55, 0.775, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0.5, [0.1, 0.325, 0.55, 0.775, 1, 0.853553, 0.5, 0.146447]),
        ("constant", 0.25, [0.1, 0.55, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_learning_rate_of_each_step(schedule: str, warmup: float, expected: list[float]) -> None:
    class Recorder(LitMNIST):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    module = Recorder("4/2", lr=2.0, schedule=schedule, warmup=warmup, ema_decay=0.0)  # type: ignore[arg-type]
    trainer().fit(module, some_batches())  # 2 epochs of 4 steps
    assert rates == pytest.approx([2 * factor for factor in expected], abs=1e-6)


def test_weight_decay_spares_biases_and_batch_norm() -> None:
    module = small(weight_decay=0.1)
    trainer(max_epochs=1).fit(module, some_batches())
    decayed, spared = module.trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sorted(tuple(p.shape) for p in decayed["params"]) == [(4, 1, 3, 3), (8, 4, 3, 3), (10, 8)]
    assert len(spared["params"]) == 5


def test_metrics_are_those_of_all_images() -> None:
    module = small()
    loader = some_batches(count=50, batch_size=16)  # the last batch has 2: a mean of batch means would be another
    (results,) = trainer().test(module, loader, verbose=False)
    logits = module.eval()(loader.images).detach()
    assert results["test/loss"] == pytest.approx(F.cross_entropy(logits, loader.targets).item(), abs=1e-5)
    assert results["test/accuracy"] == pytest.approx((logits.argmax(1) == loader.targets).float().mean().item())


def test_training_metrics_are_those_of_every_step_without_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = small(label_smoothing=0.1)
    update = module.train_metrics.update

    def record(*pair: Any) -> None:
        seen.append(pair)
        update(*pair)

    monkeypatch.setattr(module.train_metrics, "update", record)
    trainer(max_epochs=1).fit(module, some_batches(count=50, batch_size=10))
    logits, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
    metrics, images = module.trainer.callback_metrics, some_batches().images
    smoothed = F.cross_entropy(module(images), some_batches().targets, label_smoothing=0.1)
    assert_close(module.training_step((images, some_batches().targets), 0), smoothed)
    assert_close(metrics["train/loss"], F.cross_entropy(logits.detach(), targets))
    assert_close(metrics["train/accuracy"], (logits.argmax(1) == targets).float().mean())


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
    weights: dict[str, list[torch.Tensor]] = {"head.weight": [], "features.2.running_var": []}

    def record(module: LitMNIST) -> None:
        for name, values in weights.items():
            values.append(module.network.state_dict()[name].clone())

    plain.on_train_batch_end = lambda *args: record(plain)  # type: ignore[method-assign]
    for module in (plain, averaged):
        trainer().fit(module, some_batches())  # 8 steps
    for name, values in weights.items():
        expected = torch.zeros(())
        for share, value in zip(decays, values, strict=True):
            expected = share * expected + (1 - share) * value
        assert_close(averaged.network.state_dict()[name], expected)
    assert averaged.network.state_dict()["features.2.num_batches_tracked"] == 8
