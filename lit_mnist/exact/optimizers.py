"""Optimizers, schedules and frozen parts of a resumed run: what torch does not restore, and what the user changed."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any
from unittest.mock import patch

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .console import UserError


def configured_hparams(trainer: Trainer, module: LightningModule) -> tuple[dict[str, Any], Any]:
    """Return what a run begins with: plain values, and copies of each optimizer's groups and each schedule's state."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    plain = {
        "groups": plain_values(groups),
        "schedules": [{"class": type(one).__name__} | plain_values(one.state_dict()) for one in schedulers],
        "parameters": [[names.get(id(part), "") for part in group["params"]] for group in groups],
        "frozen": frozen_parts(trainer, module),
    }
    by_optimizer = [[{**group, "params": None} for group in one.param_groups] for one in trainer.optimizers]
    return plain, deepcopy((by_optimizer, [one.state_dict() for one in schedulers]))


def plain_values(value: Any) -> Any:
    """Return the plain part of nested settings: tuples as lists, tensors of one element as numbers, others as None."""
    if isinstance(value, Mapping):
        return {key: plain_values(part) for key, part in value.items() if key != "params"}
    if isinstance(value, (list, tuple)):
        return [plain_values(part) for part in value]
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return value if type(value) in (int, float, str, bool) else None


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Return the settings that differ; one that an older version did not save does not."""
    return {key for key in new.keys() & old.keys() if old[key] != new[key]}


def frozen_parts(trainer: Trainer, module: LightningModule) -> dict[str, list[str]]:
    """Return the parameters without a gradient, and the modules that are in evaluation mode or keep no statistics."""
    parts = dict(module.named_modules())
    training = {name: part.training for name, part in parts.items()}
    if trainer.validating:  # those that Lightning 2.6 puts back after it
        training = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return {
        "requires_grad": [name for name, part in module.named_parameters() if not part.requires_grad],
        "track_running_stats": [name for name, part in parts.items() if not getattr(part, "track_running_stats", True)],
        "training": [name for name, mode in training.items() if not mode],
    }


def restore_frozen(module: LightningModule, loaded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Freeze what was frozen, but for what the user freezes otherwise now; BaseFinetuning 2.6 freezes as at first."""
    for flag, names in loaded.get("frozen", {}).items():  # of an older version none
        parts: dict[str, Any] = dict(module.named_parameters() if flag == "requires_grad" else module.named_modules())
        for name in parts.keys() - (set(loaded["configured"]["frozen"][flag]) ^ set(now["frozen"][flag])):
            if hasattr(parts[name], flag):
                setattr(parts[name], flag, name not in names)


def restore_optimizers(trainer: Trainer, loaded: Mapping[str, Any]) -> None:
    """Restore what callbacks changed, and what torch 2.15 rounds to the parameters' type, as NAdam's mu_product."""
    for optimizer, saved in zip(trainer.optimizers, loaded["optimizer_states"], strict=True):
        for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group |= deepcopy({key: value for key, value in values.items() if key != "params"})
        parameters = [part for group in optimizer.param_groups for part in group["params"]]
        for number, state in saved["state"].items():
            own = optimizer.state[parameters[number]]
            for name, value in state.items():
                if isinstance(value, Tensor) and parameters[number].ndim and not value.ndim:
                    own[name] = value.to(own[name].device, copy=True)


def apply_settings(trainer: Trainer, before: Mapping[str, Any], now: Mapping[str, Any], fresh: Any) -> bool:
    """Let the present settings of optimizers and schedules win over the restored ones; return whether any differs.

    Only what is configured otherwise is set: what a schedule or a callback has changed stays. A schedule of which
    anything differs is computed anew, as is LambdaLR, unless its function is an object that counts its calls.
    """
    if before["parameters"] != now["parameters"]:  # torch takes the states of others, as long as there are as many
        raise ValueError("the optimizers had other parameters, or the same ones in another order")
    configs, (groups, states) = trainer.lr_scheduler_configs, fresh
    scheduled = [config.scheduler.optimizer for config in configs]
    on_plateau = [config.scheduler.optimizer for config in configs if config.reduce_on_plateau]
    pairs = zip(trainer.optimizers, groups, strict=True)  # a callback may have added groups
    flat = [(one, *pair) for one, own in pairs for pair in zip(one.param_groups, own, strict=False)]
    other_rates = list[Any]()  # the optimizers of which a schedule has to be computed
    for (optimizer, group, own), old, new in zip(flat, before["groups"], now["groups"], strict=True):
        changed = changed_keys(old, new)
        if "lr" in changed and optimizer in on_plateau and old["lr"]:  # with the reductions so far
            own["lr"] = group["lr"] * (new["lr"] / old["lr"])
        group |= {key: own[key] for key in changed}
        other_rates += [optimizer] if changed & scheduled_keys(optimizer, own) else []
    for config, old, new, state in zip(configs, before["schedules"], now["schedules"], states, strict=True):
        scheduler: Any = config.scheduler
        optimizer, kind, changed = scheduler.optimizer, type(scheduler).__name__, changed_keys(old, new)
        if config.reduce_on_plateau:
            vars(scheduler).update({key: state[key] for key in changed - {"class", "_last_lr"}})
        elif changed or optimizer in other_rates:
            if scheduled.count(optimizer) > 1:
                raise UserError(f"{kind} has other settings than before, and its optimizer has two schedules")
            compute_schedule(scheduler, groups[trainer.optimizers.index(optimizer)], state)
        elif isinstance(scheduler, LambdaLR) and not any(getattr(one, "__dict__", 0) for one in scheduler.lr_lambdas):
            scheduler._update_lr(scheduler.last_epoch)
        most = getattr(scheduler, "total_steps", 0) * config.frequency
        if most and config.interval == "step" and trainer.estimated_stepping_batches > most:
            raise UserError(f"{kind} ends after {most} steps, before this run does: configure a longer schedule")
    return any(map(changed_keys, [*before["groups"], *before["schedules"]], [*now["groups"], *now["schedules"]]))


def scheduled_keys(optimizer: Any, group: Mapping[str, Any]) -> set[str]:
    """Return the settings of a group that a schedule changes or has added."""
    cycled = {"lr", "momentum", "betas"} if "max_momentum" in group else {"lr"}
    return set(group) - {"params", *optimizer.defaults.keys() - cycled}


def compute_schedule(scheduler: Any, fresh: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Set a schedule and its groups to what they would be at this step, had the present settings been the first."""
    counter, optimizer = scheduler, scheduler.optimizer
    while not hasattr(counter, "last_epoch"):  # ChainedScheduler does not count
        counter = counter._schedulers[0]
    steps, configured = counter.last_epoch, optimizer.param_groups[: len(fresh)]
    with patch.object(optimizer, "param_groups", configured), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has made no step yet
        for group, own in zip(configured, fresh, strict=True):
            group |= {key: own[key] for key in scheduled_keys(optimizer, own)}
        scheduler.load_state_dict(state)
        for _ in range(steps - counter.last_epoch):  # torch 2.15 computes most rates from the one before
            scheduler.step()
