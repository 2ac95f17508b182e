"""Half-filled metrics of an epoch: what a checkpoint of Lightning 2.6 leaves out.

Both kinds are kept, whatever the module calls them: every `torchmetrics.Metric` of it, and every value that it has
given to `self.log` for the end of the epoch. On several processes each has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from .state import StateError, check, mapping

LOG_SETTINGS = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "metric_attribute")


def counted(module: LightningModule) -> dict[str, Metric]:
    """All metrics of a module by name, also those in plain lists and dictionaries, and those of callbacks."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
    holders: dict[str, Any] = dict(module.named_modules())
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    holders |= {f"callback {number}": callback for number, callback in enumerate(callbacks)}
    known = {id(metric) for metric in found.values()}
    for place, holder in holders.items():
        if isinstance(holder, Metric) or type(holder).__module__.startswith(("torch", "pytorch_lightning.")):
            continue
        for name, value in vars(holder).items():
            parts = (
                value.items()
                if isinstance(value, dict)
                else enumerate(value if isinstance(value, (list, tuple)) else [value])
            )
            for key, part in parts:
                if isinstance(part, Metric) and id(part) not in known:
                    found[f"{place}.{name}.{key}"] = part
    return found


def metric_states(trainer: Trainer, module: LightningModule) -> dict[str, dict[str, Any]]:
    """Of all metrics of a module; nothing of those that Lightning resets at the end of the validation at hand."""
    logged = trainer.fit_loop.epoch_loop.val_loop._results.values() if trainer.validating else ()
    done = {id(entry.value) for entry in logged if not entry.is_tensor}
    return {name: {} if id(metric) in done else metric_state(metric) for name, metric in counted(module).items()}


def metric_state(metric: Metric) -> dict[str, Any]:
    """Its states, its counters (private numbers, such as of updates), and tensors that it keeps beside its states."""
    state: dict[str, Any] = {name: on_cpu(value) for name, value in metric.metric_state.items()}
    for name, value in vars(metric).items():
        if (name.startswith("_") and type(value) is int) or (not name.startswith("_") and isinstance(value, Tensor)):
            state[name] = on_cpu(value)
    return state


def on_cpu(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [on_cpu(part) for part in value]
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def restore_metric(metric: Metric, states: list[Any], path: str) -> None:
    """Give a metric its state; the states of several processes, where they are another number now, become one.

    Raises:
        StateError: a state is not one of this metric.
    """
    fresh, names = metric_state(metric), metric.metric_state.keys()
    for number, state in enumerate(states):
        if mapping(state, path).keys() != fresh.keys():
            raise StateError(f"{path} has other states than that metric")
        for name, value in state.items():
            if name in names and isinstance(fresh[name], list):  # of any length, also joined to one tensor
                if not all(isinstance(part, Tensor) for part in (value if isinstance(value, list) else [value])):
                    raise StateError(f"{path}/{name} is no list of tensors")
            else:
                check(fresh[name], value, f"{path}/{name}")
        own = {name: on_device(value, metric.device) for name, value in state.items()}
        if number == 0:
            for name, value in own.items():
                setattr(metric, name, value)
        else:
            try:
                metric.merge_state({name: own[name] for name in names})
            except (RuntimeError, TypeError, ValueError) as error:
                raise StateError(f"{path} cannot be brought together from several processes") from error


def on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [on_device(part, device) for part in value]
    return value.detach().to(device) if isinstance(value, Tensor) else value


def logged_state(trainer: Trainer) -> list[dict[str, Any]]:
    """What was given to `self.log` for the end of this epoch, with how it is to be logged.

    Lightning 2.6 has no public name for it: without it, an epoch's mean begins anew after a resume, and is never logged
    where the resume lies after the last step.
    """
    return [
        {
            **{name: getattr(entry.meta, name) for name in LOG_SETTINGS},
            **{"fx": entry.meta.fx, "name": entry.meta.name, "reduce_fx": entry.meta.reduce_fx.__name__},
            **{"sync_dist": entry.meta.sync.should, "rank_zero_only": entry.meta.sync.rank_zero_only},
            "state": metric_state(entry) if entry.is_tensor else {},
        }
        for entry in trainer.fit_loop.epoch_loop._results.values()
        if entry.meta.on_epoch and not entry.has_reset
    ]


def pending(trainer: Trainer) -> dict[str, float]:
    """What Lightning 2.6 logs of a step only after the callbacks: a checkpoint that they save lies before it."""
    loop, interval = trainer.fit_loop.epoch_loop, trainer.log_every_n_steps  # type: ignore[attr-defined]
    step = loop._batches_that_stepped
    if not trainer.training or not interval or (step + 1) % interval:
        return {}
    values = loop._results.metrics(on_step=True)["log"]
    scalars: dict[str, float] = {name: value.item() for name, value in values.items() if value.numel() == 1}
    return {"step": step, "epoch": trainer.current_epoch, **scalars} if scalars else {}  # `step` may be logged, too


def restore_logged(trainer: Trainer, module: LightningModule, parts: list[Any]) -> None:
    """Let the logged values of an unfinished epoch go on.

    Args:
        parts: those of this process, or of all that there were.

    Raises:
        StateError: they are not what `logged_state` gives.
    """
    results = trainer.fit_loop.epoch_loop._results
    for number, entries in enumerate(zip(*parts, strict=True) if parts else ()):
        path, entry = f"logged/{number}", mapping(entries[0], "logged")
        form = {"fx": "", "name": "", **dict.fromkeys(LOG_SETTINGS, True), "metric_attribute": None, "reduce_fx": ""}
        form |= {"sync_dist": True, "rank_zero_only": True}
        check(form, {key: value for key, value in entry.items() if key != "state"}, path)
        if entry["reduce_fx"] not in ("mean", "sum", "min", "max"):
            raise StateError(f"{path}/reduce_fx is unknown")
        settings = {key: entry[key] for key in form}
        value: Any = torch.zeros((), device=module.device)
        if attribute := settings["metric_attribute"]:
            value = counted(module).get(str(attribute))
            if value is None:
                raise StateError(f"{path}/metric_attribute is no metric of the module")
        # as if the module had logged it, and then its state; all but the state must agree when it does
        results.log(value=value, sync_dist_fn=trainer.strategy.reduce, batch_size=1, **settings)
        logged = results[f"{settings['fx']}.{settings['name']}"]
        if logged.is_tensor:
            states = [mapping(mapping(entry, path).get("state"), path) for entry in entries]
            restore_metric(logged, states[:1], path)
            for state in states[1:]:
                combine = getattr(torch, {"max": "maximum", "min": "minimum"}.get(entry["reduce_fx"], "add"))
                logged.value = combine(logged.value, on_device(state["value"], module.device))
                if "cumulated_batch_size" in state:
                    logged.cumulated_batch_size = logged.cumulated_batch_size + state["cumulated_batch_size"]
    # The first step after a resume looks to Lightning 2.6 like an epoch's first, where it begins all values anew.
    results.reset = lambda *_, **__: None  # type: ignore[method-assign]


def unfreeze_reset(trainer: Trainer) -> None:
    """End what `restore_logged` began: from the second step on, values are reset as ever."""
    vars(trainer.fit_loop.epoch_loop._results).pop("reset", None)
