"""An exponential moving average of the weights."""

from itertools import chain
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage(WeightAveraging):
    """Averages all weights and batch norm's statistics after each step; the average is validated, tested and kept.

    WeightAveraging 2.6 leaves it on the CPU, so that with an accelerator each step would wait for a copy.
    `decay` is the share of the average that stays in a step, 0 < decay < 1. Averaging begins after 1 / (1 - decay)
    steps, with a smaller decay, a mean over the last tenth of the steps since then (https://arxiv.org/abs/1212.1824).
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":  # else WeightAveraging 2.6 warns that it has nothing to average
            if missing := {"current_model_state", "averaging_state"} - checkpoint.keys():
                raise KeyError(min(missing))  # without these it would begin a new average
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device, next(pl_module.parameters()).dtype)
        tensors = [[*chain(part.parameters(), part.buffers())] for part in (self._average_model.module, pl_module)]
        pairs = list(zip(*tensors, strict=True))
        self._averages = list(zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
        self._copies = [pair for pair in pairs if not pair[0].is_floating_point()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self._latest_update_step:
            step = max(1.0, trainer.global_step - 1 / (1 - self._decay))
            get_ema_multi_avg_fn(min(self._decay, (step - 1) / (step + 8)))(*self._averages, 0)
            for average, current in self._copies:  # counts and flags
                average.copy_(current)
            self._latest_update_step = trainer.global_step
