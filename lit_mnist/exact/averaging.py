"""An exponential moving average of the weights."""

from itertools import chain
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage(WeightAveraging):
    """Averages all weights and batch norm's statistics after each step; the average is validated, tested and kept.

    WeightAveraging 2.6 leaves it on the CPU, so that with an accelerator each step would wait for a copy, and searches
    all modules for their tensors in each step, a twentieth of its time on a CPU.
    `decay` is the share of the average that stays in a step, 0 < decay < 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._update = get_ema_multi_avg_fn(decay)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":  # else WeightAveraging 2.6 warns that it has nothing to average
            if missing := {"current_model_state", "averaging_state"} - checkpoint.keys():
                raise KeyError(min(missing))  # without these it would begin a new average
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights as they are until they are saved: a run that is trained longer continues with them."""

    on_fit_end = WeightAveraging.on_train_end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device, next(pl_module.parameters()).dtype)
        self._pair = [
            [tensor for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point()]
            for module in (self._average_model.module, pl_module)
        ]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._latest_update_step == 0:
            super().on_train_batch_end(trainer, pl_module, *args)  # the first average is a copy
        elif trainer.global_step > self._latest_update_step:
            self._update(*self._pair, 0)
            self._latest_update_step = trainer.global_step
