"""Exact resume: saves and restores the state that Lightning's checkpoints omit, before any file is modified."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, ProgressBar
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchmetrics.wrappers import MetricTracker

from .checkpoints import Run
from .conditions import conditions
from .console import UserError
from .ddp import ExactDDP, gather_all, part_of_batch
from .loggers import logger_states, open_loggers
from .metrics import find_metrics, logged_state, metric_states, pending, restore_logged, restore_metric, unfreeze_reset
from .reader import FORMAT, FORMAT_ENTRY
from .runs import replaced

# hooks of the module that come after a checkpoint is saved: a resume would leave them out
TOO_LATE = {"on_train_batch_end": "training_step", "on_validation_end": "on_validation_epoch_end"}
PLAIN = (int, float, str, bool, type(None))


class ExactResume(Callback):
    """Adds to checkpoints what Lightning 2.6 leaves out, and restores it: RNG states, partial metric states, logged
    values, the metrics that callbacks look at, and the loggers' states. The batches' order is the data's.

    Only then is the run's folder touched: the loggers' files are cut to where the checkpoint was saved, and config.yaml
    is written (SaveConfigCallback of Lightning 2.6 does so before).
    """

    def __init__(self, run: Run, config: str = "") -> None:
        self.run = run
        self.config = config
        self._configured: dict[str, Any] = {}
        self._patience: list[tuple[EarlyStopping, int]] = []
        # of a resumed run, until its first step
        self._rng: dict[str, Any] | None = None
        self._logged: list[Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # the folder, not who made it: the first process alone may remove it again
        self.run.folder = trainer.strategy.broadcast(self.run.folder)
        stopping = [part for part in trainer.callbacks if isinstance(part, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = [(part, part.patience) for part in stopping]
        # Lightning 2.6 does so only once a checkpoint is loaded, whose weights of 64 bits would have been cut to 32
        trainer.precision_plugin.convert_module(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._rng is not None:  # the last callback saves in on_train_start: what the others drew does not count
            set_rng_state(self._rng, pl_module.device)
        latest = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        own = {
            "random": rng_state(pl_module.device),
            "metrics": metric_states(trainer, pl_module),
            "logged": logged_state(trainer) if self._logged is None else self._logged,
        }
        checkpoint |= {
            FORMAT_ENTRY: FORMAT,
            "configured": self._configured,
            "conditions": conditions(pl_module.device),
            "stopped": trainer.should_stop,
            "latest": {name: torch.tensor(value.item(), dtype=value.dtype) for name, value in latest.items()},
            "processes": gather_all(own),
            "pending": pending(trainer),
        }
        if trainer.is_global_zero:
            checkpoint["curves"] = logger_states(trainer.loggers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._configured = configured_hparams(trainer, pl_module)  # before they are restored
        if trainer.global_rank > 0:  # each process has its own dropout
            torch.manual_seed((torch.initial_seed() + 0x9E3779B97F4A7C15 * trainer.global_rank) % 2**63)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_exactness(trainer, pl_module)
        # each process reads the checkpoint for itself, and machines may see different files
        states = gather_all((trainer.current_epoch, trainer.global_step))
        if len(set(states)) > 1:
            raise UserError(f"the processes have read different checkpoints, of these epochs and steps: {states}")
        for stopping, patience in self._patience:  # Lightning 2.6 restores that of the checkpoint
            stopping.patience = patience
        loaded = self.run.loaded
        if self.run.checkpoint:
            changed = self.restore_rest(trainer, pl_module) or not self.run.unchanged
            ended = trainer.global_step and trainer.optimizers and not any(group["lr"] for group in groups_of(trainer))
            if loaded["stopped"] is True and not changed:
                trainer.should_stop = True  # a callback had ended this run, and no setting says to train it longer
            elif ended and changed and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                raise UserError(f"the learning rate is 0 after step {trainer.global_step}: configure a longer schedule")
        problem: OSError | UserError | None = None
        try:
            self._open(trainer)
        except (OSError, UserError) as error:
            problem = error
        if reason := next(filter(None, gather_all(str(problem or ""))), ""):  # all end with it: none waits for another
            raise problem or UserError(f"another process could not write to the run: {reason}")
        self.run.started = True

    def _open(self, trainer: Trainer) -> None:
        """Begin to write to the run's folder and loggers."""
        if trainer.is_global_zero and self.run.folder:
            self.run.folder.mkdir(parents=True, exist_ok=True)
        open_loggers(trainer, self.run)
        if metrics := dict(self.run.loaded.get("pending", {})):
            step = int(metrics.pop("step"))
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)
        if trainer.is_global_zero and self.run.folder and self.config:
            with replaced(self.run.folder / "config.yaml") as partial:
                partial.write_text(self.config)

    def restore_rest(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Restore what Lightning does not; return whether settings of optimizers and schedules have changed."""
        loaded, rank, device = self.run.loaded, trainer.global_rank, pl_module.device
        loop: Any = trainer.fit_loop
        epoch, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
        if epoch.current.started == epoch.current.processed:  # the next epoch is whole, also after one that was cut
            epoch.current.completed, epoch.total.completed = epoch.current.processed, epoch.total.processed
            # with `max_steps` Lightning 2.6 would take an ended epoch, whose counters are full, for an unfinished one
            loop._restarting = loop.epoch_loop.restarting = False
            loop.reset_restart_stage()
            batches.reset_on_run()
        elif not batches.is_last_batch:
            continue_epoch(trainer, pl_module, loaded["loops"]["fit_loop"]["state_dict"]["combined_loader"])
        restore_optimizers(trainer, loaded)
        changed = apply_settings(trainer, loaded["configured"], self._configured)
        trainer.callback_metrics.update({name: value.to(device) for name, value in loaded["latest"].items()})
        # on another number of processes the first has all that was counted
        parts = loaded["processes"]
        own = [parts[rank]] if len(parts) == trainer.world_size else parts if rank == 0 else []
        for name, metric in find_metrics(pl_module).items():
            restore_metric(metric, list(filter(None, (part["metrics"][name] for part in own))), name)
        restore_logged(trainer, pl_module, [part["logged"] for part in own])
        self._logged = logged_state(trainer)
        trainer.fit_loop.epoch_loop._results.clear()  # not to be seen before the next step
        if rank < len(parts):
            self._rng = parts[rank]["random"]
            set_rng_state(parts[rank]["random"], device)
        return changed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng is not None and trainer.global_step:
            set_rng_state(self._rng, pl_module.device)  # what on_train_start of the module drew does not count
        self._rng = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning does not call within an epoch
        if trainer.global_step == 0:
            # Lightning 2.6 resumes a checkpoint of step 0 with this counter of the loggers' steps at 1
            trainer.fit_loop.epoch_loop._batches_that_stepped = 0
        unfreeze_reset(trainer)
        if self._logged is not None:
            restore_logged(trainer, pl_module, [self._logged])
            self._logged = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)  # of a run that is resumed after an epoch's last step
        unfreeze_reset(trainer)
        if trainer.fit_loop.restarting and trainer.max_steps == -1:
            # Lightning 2.6 keeps no metrics, and so leaves ReduceLROnPlateau out at the end of a resumed epoch; here
            # they are restored
            trainer.fit_loop.restarting = False


def check_exactness(trainer: Trainer, module: LightningModule) -> None:
    """Refuse what could not be resumed exactly, or is not the same on several processes, with a UserError."""
    for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
        if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
            what = f"train_dataloader gives a {type(loader).__name__}, which has no state_dict and load_state_dict"
            raise UserError(f"{what}: use torchdata's StatefulDataLoader, to resume within an epoch")
    if any(isinstance(part, MetricTracker) for part in module.modules()):
        raise UserError("a MetricTracker grows while it is used, and could not be restored; log its metric instead")
    for hook, instead in TOO_LATE.items():
        if is_overridden(hook, module):
            what = f"{type(module).__name__}.{hook} comes after a checkpoint is saved, and is left out by a resume"
            raise UserError(f"{what}; use {instead} or a callback")
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and (config.interval == "step" or trainer.max_steps != -1):
            what = "ReduceLROnPlateau is left out by a resume with interval step or trainer.max_steps"
            raise UserError(f"{what}; use interval epoch and trainer.max_epochs")
    # batch norm of each process alone cannot do without samples, nor torch's synchronised one in mixed precision
    alone = isinstance(trainer.strategy, ExactDDP) and not trainer.strategy.synchronized
    start, stop, size = part_of_batch(trainer, len(loader) - 1, 1) if hasattr(loader, "part") else (0, 1, 1)
    if 0 in (stop - start, size // trainer.world_size) and (alone or "mixed" in trainer.precision):
        where = f"where an epoch's last batch is smaller than the number of processes, {trainer.world_size}"
        raise UserError(f"trainer.sync_batchnorm must be true and trainer.precision not mixed {where}")


def continue_epoch(trainer: Trainer, module: LightningModule, states: list[Any]) -> None:
    """Do what Lightning 2.6 does not where it resumes within an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        theirs = not type(callback).__module__.startswith(("pytorch_lightning.", f"{__package__}."))
        if (theirs and not isinstance(callback, ProgressBar)) or isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer, module)
    module.on_train_epoch_start()
    # it gives loaders no states where `configure_optimizers` has read `trainer.estimated_stepping_batches` (issue
    # 20550); a DataLoader keeps the iterator that it was asked for before
    loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    for loader, state in zip(loaders, states, strict=True):
        if not isinstance(loader, DataLoader):
            loader.load_state_dict(state)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators that a module may draw from: torch's, numpy's and Python's."""
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, *rest = numpy
    state = {"torch": torch.get_rng_state(), "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def groups_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def configured_hparams(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what `configure_optimizers` gives: plain settings of groups and schedules, names of parameters."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "groups": [plain_values(group) for group in groups_of(trainer)],
        "schedules": [plain_values(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "parameters": [[names.get(id(part), "") for part in group["params"]] for group in groups_of(trainer)],
    }


def is_plain(value: Any) -> bool:
    """Return whether a value is a plain number, string, boolean, None or a list of them."""
    return all(map(is_plain, value)) if isinstance(value, list) else type(value) in PLAIN


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {key: value for key, value in listed.items() if key != "params" and is_plain(value)}


def restore_optimizers(trainer: Trainer, loaded: Mapping[str, Any]) -> None:
    """Restore what `Optimizer.load_state_dict` of torch 2.15 rounds: NAdam's mu_product, to the parameter's type."""
    for optimizer, saved in zip(trainer.optimizers, loaded["optimizer_states"], strict=True):
        parameters = [part for group in optimizer.param_groups for part in group["params"]]
        for number, state in saved["state"].items():
            own = optimizer.state[parameters[number]]
            for name, value in state.items():
                if isinstance(value, Tensor) and parameters[number].ndim and not value.ndim:
                    own[name] = value.to(own[name].device, copy=True)


def apply_settings(trainer: Trainer, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Let the present settings of optimizers and schedules win over the restored ones; return whether any differs.

    Only what differs from what the saved run was configured with is set: what a schedule or a callback changes in
    training stays as it was. A rate under a schedule is multiplied by as much as its highest; under LambdaLR, which is
    a function of the step, it is computed anew; so is a rate of 0 that a product would never leave.
    """
    if before["parameters"] != now["parameters"]:  # torch takes the states of others, as long as there are as many
        raise ValueError("the optimizers had other parameters, or the same ones in another order")
    differs, schedulers = False, [config.scheduler for config in trainer.lr_scheduler_configs]
    # a callback may have added groups
    for group, old, new in zip(groups_of(trainer), before["groups"], now["groups"], strict=False):
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        differs |= bool(changed)
        if "lr" in changed and schedulers and old.get("lr"):
            group["lr"] *= changed.pop("lr") / float(old["lr"])
        group |= {key: tuple(value) if isinstance(value, list) else value for key, value in changed.items()}
    for scheduler, old, new in zip(schedulers, before["schedules"], now["schedules"], strict=True):
        changed = {key: value for key, value in new.items() if old.get(key) != value and key != "_last_lr"}
        differs |= bool(changed)
        vars(scheduler).update(changed)
        if isinstance(scheduler, LambdaLR):
            parts = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, base, factor in parts:
                if not getattr(factor, "__dict__", None):  # an object with a state would count one call more
                    group["lr"] = base * factor(scheduler.last_epoch)
        elif changed and hasattr(scheduler, "_get_closed_form_lr") and not any(scheduler.get_last_lr()):
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._get_closed_form_lr(), strict=True):
                group["lr"] = rate
    return differs
