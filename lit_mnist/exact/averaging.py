"""An exponential moving average of the weights, taken in every step."""

from __future__ import annotations

from itertools import chain
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage(WeightAveraging):
    """An exponential moving average of all weights and of batch norm's statistics, taken after each step. It is what
    is validated, tested and kept.

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
        if trainer.state.fn != "fit":  # WeightAveraging 2.6 would warn that it has nothing to average
            return
        # without them, WeightAveraging 2.6 would begin a new average
        if missing := {"current_model_state", "averaging_state"} - checkpoint.keys():
            raise KeyError(min(missing))
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
