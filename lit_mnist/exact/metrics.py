"""Partial metric states of an epoch, of each process, which a checkpoint of Lightning 2.6 leaves out."""

from collections import deque
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import chain
from typing import Any

import torch
import torchmetrics
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

LOG_SETTINGS = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "metric_attribute", "enable_graph")
PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype)
CONTAINERS = (dict, list, tuple)
Part = Metric | MetricCollection | MetricTracker


def find_parts(module: LightningModule) -> dict[str, Part]:
    """Return a module's metrics, collections and trackers by name, with those in plain containers and of callbacks."""
    seen = set[nn.Module]()
    found = dict(module.named_modules(seen))
    callbacks = {f"callback {n}": part for n, part in enumerate(module.trainer.callbacks)}  # type: ignore[attr-defined]

    def search(value: Any, place: str) -> None:
        if isinstance(value, CONTAINERS):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                search(part, f"{place}.{key}")
        elif isinstance(value, Part):  # with those that it wraps
            found.update({f"{place}.{name}": part for name, part in value.named_modules(seen)})

    for place, holder in [*found.items(), *callbacks.items()]:
        if not isinstance(holder, Metric) and not type(holder).__module__.startswith(("torch.", "pytorch_lightning.")):
            for name, value in vars(holder).items():
                search(value if isinstance(value, CONTAINERS) else [value], f"{place}.{name}")
    return {name: part for name, part in found.items() if isinstance(part, Part)}


def plain_data(metric: Metric) -> dict[str, Any]:
    """Return copies of the plain data that a metric has beside its states, settings included."""
    found = {}
    for name in vars(metric).keys() - metric._defaults.keys() - vars(nn.Module()).keys():
        with suppress(TypeError):  # a function, a network
            found[name] = as_plain(getattr(metric, name))
    return found


def as_plain(value: Any) -> Any:
    """Copy data to what `weights_only=True` loads, on the CPU; TypeError for all that is no data."""
    if isinstance(value, dict):
        return {key: as_plain(part) for key, part in value.items()}
    if isinstance(value, (list, deque, tuple, set)):
        return (type(value) if type(value) in (tuple, set) else list)(map(as_plain, value))
    if not isinstance(value, Tensor) and type(value) not in PLAIN:
        raise TypeError
    return moved(value)


def moved(value: Any, device: torch.device | str = "cpu") -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().to(device, copy=True))


def metric_states(trainer: Trainer, module: LightningModule, initial: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return by name the states of metrics, the groups of collections and the lengths of trackers."""
    comparable = partial(apply_to_collection, dtype=Tensor, function=Tensor.tolist)
    logged = trainer.fit_loop.epoch_loop.val_loop._results.values() if trainer.validating else ()
    done = {id(part) for entry in logged if not entry.is_tensor for part in entry.value.modules()}
    states = dict[str, dict[str, Any]]()
    for name, part in find_parts(module).items():
        if isinstance(part, MetricTracker):
            states[name] = {"n_steps": part.n_steps}
        elif isinstance(part, MetricCollection):  # torchmetrics 1.9 groups by the values of the first batch, for good
            states[name] = {"groups": list(map(list, part._groups.values())) if part._groups_checked else []}
        elif id(part) in done:  # Lightning resets it after the current validation
            states[name] = {}
        else:  # what updates have changed beside the states: counters, cached values, states that they added
            now, before = plain_data(part), initial.get(name, {})
            new = {k: v for k, v in now.items() if k not in before or comparable(v) != comparable(before[k])}
            if "_defaults" in new:
                new["_reductions"] = {key: getattr(one, "__name__", "") for key, one in part._reductions.items()}
            states[name] = new | moved(part.metric_state)
    return states


def restore_metrics(module: LightningModule, states: list[dict[str, Any]], any_process: dict[str, Any]) -> None:
    """Restore what this process had, or all had where their number changed; groups and lengths are any process's."""
    for name, part in find_parts(module).items():
        if isinstance(part, MetricTracker):
            for _ in range(part.n_steps, any_process[name]["n_steps"]):
                part.increment()
    for name, part in reversed(find_parts(module).items()):  # a collection, which joins states, after its metrics
        if isinstance(part, Metric):
            restore_metric(part, [state[name] for state in states if state[name]], name)
        elif isinstance(part, MetricCollection) and part._enable_compute_groups is True:
            groups = any_process.get(name, {}).get("groups", [])
            if set(chain(*groups)) == set(part.keys(keep_base=True)):
                part._groups, part._groups_checked = dict(enumerate(groups)), True
                part._compute_groups_create_state_ref()


def restore_metric(metric: Metric, states: list[dict[str, Any]], name: str) -> None:
    """Give a metric its state; where the number of processes has changed, the states of all are merged."""
    for number, state in enumerate(states):
        for key, default in metric._defaults.items():
            shape = default.shape if isinstance(default, Tensor) and default.numel() > 1 else None  # a number may grow
            kind = Tensor if isinstance(default, Tensor) else list
            if not isinstance(state.get(key), kind) or (shape and state[key].shape != shape):
                raise ValueError(f"{name} has other states than that metric")
        own = moved(state, metric.device)
        if number:
            metric.merge_state({key: own[key] for key in metric.metric_state})
            continue
        for key, function in own.pop("_reductions", {}).items():
            metric._reductions.setdefault(key, getattr(torchmetrics.utilities.data, function, None))
        for key, value in own.items():
            kept = copy(getattr(metric, key, None))
            if isinstance(kept, (deque, dict)):  # with its longest length or default value
                kept.clear()
                (kept.extend if isinstance(kept, deque) else kept.update)(value)
                value = kept
            setattr(metric, key, value)


def logged_state(trainer: Trainer) -> list[dict[str, Any]]:
    """Return what was given to `self.log` in this epoch, and how: Lightning 2.6 would begin its mean anew."""
    names = {id(part): name for name, part in find_parts(trainer.lightning_module).items()}
    states = []
    for entry in trainer.fit_loop.epoch_loop._results.values():
        if not entry.has_reset:
            settings = {name: getattr(entry.meta, name) for name in ("fx", "name", *LOG_SETTINGS)}
            settings |= {"sync_dist": entry.meta.sync.should, "rank_zero_only": entry.meta.sync.rank_zero_only}
            settings["reduce_fx"] = entry.meta.reduce_fx.__name__
            state = moved(entry.metric_state | {"_forward_cache": entry._forward_cache}) if entry.is_tensor else {}
            states.append({**settings, "metric": names.get(id(entry.value)), "state": state})
    return states


def restore_logged(trainer: Trainer, module: LightningModule, parts: list[list[dict[str, Any]]]) -> None:
    """Continue the logged values of an unfinished epoch: those of this process, or of all that there were."""
    results, metrics = trainer.fit_loop.epoch_loop._results, find_parts(module)
    for entries in zip(*parts, strict=True):
        settings = {key: value for key, value in entries[0].items() if key not in ("metric", "state")}
        name = entries[0].get("metric", settings["metric_attribute"])
        value: Any = metrics[name] if name else torch.zeros((), device=module.device)
        # as if the module had logged it, and then its state; all but the state must agree when it does
        results.log(value=value, sync_dist_fn=trainer.strategy.reduce, batch_size=1, **settings)
        logged = results[f"{settings['fx']}.{settings['name']}"]
        if logged.is_tensor:
            logged.full_state_update = False  # torchmetrics merges no others, and Lightning 2.6 would add maxima, too
            logged._reductions["value"] = {"max": torch.max, "min": torch.min}.get(settings["reduce_fx"], torch.sum)
            restore_metric(logged, [entry["state"] for entry in entries], f"logged/{settings['name']}")
