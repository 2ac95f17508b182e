"""Exact resume: saves and restores the state that Lightning's checkpoints omit. No file is modified until everything
has been restored.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ProgressBar
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchmetrics.wrappers import MetricTracker

from .conditions import conditions
from .ddp import ExactDDP, smallest_part
from .ddp import every as gather_all
from .errors import UserError
from .loggers import curves, open_loggers
from .metrics import find_metrics, logged_state, metric_states, pending, restore_logged, restore_metric, unfreeze_reset
from .reader import FORMAT, FORMAT_ENTRY
from .run import Run
from .runs import replaced

# hooks of the module that come after a checkpoint is saved: a resume would leave them out
TOO_LATE = {"on_train_batch_end": "training_step", "on_validation_end": "on_validation_epoch_end"}
PLAIN = (int, float, str)
PROGRESS = {"last_epoch", "_last_lr", "base_lrs"}  # of a schedule: without them it would silently begin again


class ExactResume(Callback):
    """Puts into checkpoints what Lightning 2.6 leaves out, and restores it: random states, partial metric states and
    logged values, the metrics that callbacks look at, how much of the curves was written, and the settings.

    The order of the batches and their augmentation are the data's: a function of its seed, or in its loader's state.

    It must be the first callback. The folder of a run is touched only once everything is restored: until then a failure
    costs nothing. Then the curve is brought to where the checkpoint was, and config.yaml is written, which
    SaveConfigCallback of Lightning 2.6 would replace before anything is restored.

    Args:
        settings: plain settings with dotted keys, for whoever reads the checkpoint.
        config: the text of config.yaml; empty for none.
    """

    def __init__(self, run: Run, settings: Mapping[str, Any], config: str = "") -> None:
        self.run = run
        self.settings = dict(settings)
        self.config = config
        self._written = run.checkpoint.stat().st_mtime_ns if run.checkpoint else 0
        self._configured: dict[str, Any] = {}
        # of a resumed run, until its first step
        self._random: dict[str, Any] | None = None
        self._logged: list[Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # the folder, not who made it: the first process alone may remove it again
        self.run.folder = trainer.strategy.broadcast(self.run.folder)
        # Lightning 2.6 does so only once a checkpoint is loaded, whose weights of 64 bits would have been cut to 32
        trainer.precision_plugin.convert_module(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._random is not None:  # the last callback saves in on_train_start: what the others drew does not count
            set_random_state(self._random, pl_module.device)
        latest = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        own = {
            "random": random_state(pl_module.device),
            "metrics": metric_states(trainer, pl_module),
            "logged": logged_state(trainer) if self._logged is None else self._logged,
        }
        checkpoint |= {
            FORMAT_ENTRY: FORMAT,
            "settings": self.settings,
            "configured": self._configured,
            "conditions": conditions(pl_module.device),
            "stopped": trainer.should_stop,
            "latest": {name: torch.tensor(value.item(), dtype=value.dtype) for name, value in latest.items()},
            "processes": gather_all(own),
            "pending": pending(trainer),
        }
        if trainer.is_global_zero:
            checkpoint["curves"] = curves(trainer.loggers)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        fresh = trainer.fit_loop.state_dict()
        # without the loaders' states, which there are none of yet
        check_form(fresh, checkpoint["loops"]["fit_loop"] | {"state_dict": fresh["state_dict"]}, "loops/fit_loop")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            ours = type(callback).__module__.startswith(f"{__package__}.")
            if ours and callback.state_dict() and not checkpoint["callbacks"].get(callback.state_key):
                raise ValueError(f"callbacks/{callback.state_key} is missing")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._configured = configured_hparams(trainer, pl_module)  # before they are restored
        if trainer.global_rank > 0:  # each process has its own dropout
            torch.manual_seed((torch.initial_seed() + 0x9E3779B97F4A7C15 * trainer.global_rank) % 2**63)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_exactness(trainer, pl_module)
        # each process reads the checkpoint for itself, and machines may see different files
        states = gather_all((trainer.current_epoch, trainer.global_step))
        if len(set(states)) > 1:
            raise UserError(
                "the processes have read different checkpoints, of these epochs and steps:"
                f" {', '.join(map(str, states))}; give all machines the same file"
            )
        loaded = self.run.loaded
        if self.run.checkpoint:
            changed = self.restore_rest(trainer, pl_module)
            if loaded["stopped"] is True and not changed and self.run.unchanged:
                trainer.should_stop = True  # a callback had ended this run, and no setting says to train it longer
        problem: OSError | UserError | None = None
        try:
            if trainer.is_global_zero and self.run.folder:
                self.run.folder.mkdir(parents=True, exist_ok=True)
            open_loggers(trainer, loaded, self._written, self.run.origin, self.run.continues)
            if metrics := dict(loaded.get("pending", {})):
                step = int(metrics.pop("step"))
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step)
            if trainer.is_global_zero and self.run.folder and self.config:
                with replaced(self.run.folder / "config.yaml") as partial:
                    partial.write_text(self.config)
        except (OSError, UserError) as error:
            problem = error
        if reason := next(filter(None, gather_all(str(problem or ""))), ""):  # all end with it: none waits for another
            raise problem or UserError(f"another process could not write to the run: {reason}")
        self.run.started = True

    def restore_rest(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Restore what Lightning does not; the random state and logged values only as far as to see that they can be.

        Returns:
            Whether settings of optimizers and schedules differ from those of the checkpoint.
        """
        loaded, rank = self.run.loaded, trainer.global_rank
        if trainer.global_step != loaded["global_step"]:
            raise ValueError(f"loops/fit_loop is at step {trainer.global_step}, not {loaded['global_step']}")
        loop = loaded["loops"]["fit_loop"]
        if loaded["global_step"] and not loop["epoch_loop.batch_progress"]["is_last_batch"]:
            start_epoch_again(trainer, pl_module)
            reload(trainer, loop["state_dict"]["combined_loader"])
        changed = apply_settings(trainer, loaded, self._configured)
        latest = {name: value.to(pl_module.device) for name, value in loaded["latest"].items()}
        trainer.callback_metrics.update(latest)
        parts = loaded["processes"]
        same = len(parts) == trainer.world_size
        own = [parts[rank]] if same else parts if rank == 0 else []  # the first has all that was counted
        for name, metric in find_metrics(pl_module).items():
            states = [part["metrics"].get(name) for part in own]
            restore_metric(metric, list(filter(None, states)), f"metrics/{name}")
        restore_logged(trainer, pl_module, [part["logged"] for part in own])
        self._logged = logged_state(trainer)
        trainer.fit_loop.epoch_loop._results.clear()  # not to be seen before the next step
        if rank < len(parts):
            self._random = parts[rank]["random"]
            set_random_state(parts[rank]["random"], pl_module.device)
        return changed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None and trainer.global_step:
            set_random_state(self._random, pl_module.device)  # what on_train_start of the module drew does not count
        self._random = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._continue_epoch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._continue_epoch(trainer, pl_module)  # of a run that is resumed after an epoch's last step
        unfreeze_reset(trainer)
        if trainer.fit_loop.restarting and trainer.max_steps == -1:
            # Lightning 2.6 keeps no metrics, and so leaves ReduceLROnPlateau out at the end of a resumed epoch; here
            # they are restored
            trainer.fit_loop.restarting = False

    def _continue_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue an epoch's random state and logged values, the first time that it is called after a resume."""
        self.on_train_epoch_start(trainer, pl_module)
        if trainer.global_step == 0:
            # Lightning 2.6 resumes a checkpoint of step 0 with this counter of the loggers' steps at 1
            trainer.fit_loop.epoch_loop._batches_that_stepped = 0
        unfreeze_reset(trainer)
        if self._logged is not None:
            restore_logged(trainer, pl_module, [self._logged])
            self._logged = None


def check_exactness(trainer: Trainer, module: LightningModule) -> None:
    """Refuse what could not be resumed exactly, or is not the same on several processes.

    Raises:
        UserError: one line about it.
    """
    loaders = trainer.train_dataloader
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
            raise UserError(
                f"train_dataloader gives a {type(loader).__name__}, which has no state_dict and load_state_dict: a run"
                " could not be resumed within an epoch; torchdata's StatefulDataLoader has them"
            )
    if any(isinstance(part, MetricTracker) for part in module.modules()):
        raise UserError("a MetricTracker grows while it is used, and could not be restored; log its metric instead")
    for hook, instead in TOO_LATE.items():
        if is_overridden(hook, module):
            raise UserError(
                f"{type(module).__name__}.{hook} comes after a checkpoint is saved, and a resumed run would leave it"
                f" out; do it in {instead} or in a callback"
            )
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and (config.interval == "step" or trainer.max_steps != -1):
            raise UserError(
                "ReduceLROnPlateau would be left out by a resumed run with interval step or trainer.max_steps; use"
                " interval epoch and trainer.max_epochs"
            )
    # batch norm of each process alone cannot do without samples, nor torch's synchronised one in mixed precision
    alone = isinstance(trainer.strategy, ExactDDP) and not trainer.strategy.synchronized
    if smallest_part(trainer) == 0 and (alone or "mixed" in trainer.precision):
        raise UserError(
            "trainer.sync_batchnorm must be true and trainer.precision not mixed where an epoch's last batch is"
            f" smaller than the number of processes, {trainer.world_size}; change the batch size"
        )


def check_form(fresh: Any, loaded: Any, path: str) -> None:
    """Check that nested counters have the form of fresh ones: Lightning 2.6 silently begins again without them.

    Raises:
        ValueError: a counter is missing, or is none.
    """
    if isinstance(fresh, dict) and isinstance(loaded, dict) and fresh.keys() == loaded.keys():
        for key, value in fresh.items():
            check_form(value, loaded[key], f"{path}/{key}")
    elif isinstance(fresh, dict) or type(fresh) is not type(loaded) or loaded < 0:
        raise ValueError(f"{path} does not have the form of a loop's progress")


def start_epoch_again(trainer: Trainer, module: LightningModule) -> None:
    """Call what sets up an epoch: Lightning 2.6 does not where it resumes within one. Metrics are restored after it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        theirs = not type(callback).__module__.startswith(("pytorch_lightning.", f"{__package__}."))
        if (theirs and not isinstance(callback, ProgressBar)) or isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer, module)
    module.on_train_epoch_start()


def reload(trainer: Trainer, states: list[Any]) -> None:
    """Give loaders their states once more: Lightning 2.6 does not where `configure_optimizers` has read
    `trainer.estimated_stepping_batches` (issue 20550). A DataLoader keeps the iterator that it was asked for before.
    """
    loaders = trainer.train_dataloader
    for loader, state in zip(loaders if isinstance(loaders, (list, tuple)) else [loaders], states, strict=True):
        if not isinstance(loader, DataLoader):
            loader.load_state_dict(state)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators that a module may draw from: torch's, numpy's and Python's."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {"torch": torch.get_rng_state(), "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def configured_hparams(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what `configure_optimizers` gives, before it is restored: the plain settings of each group and schedule,
    and the names of the parameters of each group.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {
        "groups": [plain_values(group) for group in groups],
        "schedules": [plain_values(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "parameters": [[names.get(id(parameter), "") for parameter in group["params"]] for group in groups],
    }


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        return all(map(is_plain, value)) if isinstance(value, list) else value is None or isinstance(value, PLAIN)

    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {key: value for key, value in listed.items() if key != "params" and is_plain(value)}


def restore_states(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Any]) -> None:
    """Restore what `load_state_dict` of torch 2.15 rounds, and refuse what it lets through.

    Raises:
        ValueError: a state has another form than its parameter, and a fused step, which does not look at it, would read
            and write elsewhere in memory.
    """
    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    for (parameter, group), number in zip(parameters, count()):
        for name, saved in loaded["state"].get(number, {}).items():
            state = optimizer.state[parameter]
            if isinstance(saved, Tensor) and parameter.ndim and not saved.ndim:
                state[name] = saved.to(
                    state[name].device, copy=True
                )  # cast to the type of the parameter, as NAdam's mu
            elif isinstance(saved, Tensor) and group.get("fused") and name != "step":
                if saved.shape != parameter.shape or saved.untyped_storage().nbytes() < saved.nbytes:
                    raise ValueError(f"optimizer_states/state/{number}/{name} does not have the form of its parameter")


def apply_settings(trainer: Trainer, loaded: Mapping[str, Any], now: dict[str, Any]) -> bool:
    """Let the present settings of optimizers and schedules win over the restored ones; return whether any differs.

    Lightning restores both as they were saved, settings included. Only what differs from what the saved run was
    configured with is set: what a schedule or a callback changes in training stays as it was. A rate under a schedule
    is multiplied by as much as its highest; under LambdaLR, which is a function of the step, it is computed anew.

    Raises:
        ValueError: the checkpoint has other optimizers, parameters or schedules, of which a part would begin again.
    """
    before, schedulers = loaded["configured"], [config.scheduler for config in trainer.lr_scheduler_configs]
    if before["parameters"] != now["parameters"]:  # torch takes the states of others, as long as there are as many
        raise ValueError("the optimizers had other parameters, or the same ones in another order")
    for optimizer, state in zip(trainer.optimizers, loaded["optimizer_states"], strict=True):
        restore_states(optimizer, state)
    for scheduler, state in zip(schedulers, loaded["lr_schedulers"], strict=True):
        if missing := PROGRESS & vars(scheduler).keys() - state.keys():
            raise ValueError(f"lr_schedulers/{min(missing)} is missing")
    differs = False
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, old, new in zip(groups, before["groups"], now["groups"], strict=False):  # a callback may have added some
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        differs |= bool(changed)
        if "lr" in changed and schedulers and old.get("lr"):
            group["lr"] *= changed.pop("lr") / float(old["lr"])
        for key, value in changed.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for scheduler, old, new in zip(schedulers, before["schedules"], now["schedules"], strict=True):
        changed = {key: value for key, value in new.items() if old.get(key) != value and key != "_last_lr"}
        differs |= bool(changed)
        vars(scheduler).update(changed)
        if isinstance(scheduler, LambdaLR):
            parts = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, base, factor in parts:
                if not getattr(factor, "__dict__", None):  # an object with a state would count one call more
                    group["lr"] = base * factor(scheduler.last_epoch)
    return differs
