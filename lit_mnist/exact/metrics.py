"""Partial metric states of an epoch, of each process, which a checkpoint of Lightning 2.6 leaves out."""

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

LOG_SETTINGS = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "metric_attribute")


def find_metrics(module: LightningModule) -> dict[str, Metric]:
    """Return all metrics of a module by name, also those in plain lists and dictionaries, and those of callbacks."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
    known = {id(metric) for metric in found.values()}
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    holders = {**dict(module.named_modules()), **{f"callback {n}": part for n, part in enumerate(callbacks)}}
    for place, holder in holders.items():
        if isinstance(holder, Metric) or type(holder).__module__.startswith(("torch", "pytorch_lightning.")):
            continue
        for name, value in vars(holder).items():
            listed = value if isinstance(value, (list, tuple)) else [value]
            for key, part in value.items() if isinstance(value, dict) else enumerate(listed):
                if isinstance(part, Metric) and id(part) not in known:  # with those that it wraps
                    found |= {f"{place}.{name}.{key}.{n}": m for n, m in part.named_modules() if isinstance(m, Metric)}
    return found


def metric_states(trainer: Trainer, module: LightningModule) -> dict[str, dict[str, Any]]:
    """Return the states of a module's metrics, without those that Lightning resets after the current validation."""
    logged = trainer.fit_loop.epoch_loop.val_loop._results.values() if trainer.validating else ()
    done = {id(entry.value) for entry in logged if not entry.is_tensor}
    return {name: {} if id(metric) in done else metric_state(metric) for name, metric in find_metrics(module).items()}


def metric_state(metric: Metric) -> dict[str, Any]:
    """Return a metric's states, its counters (private integers) and the tensors that it keeps beside its states."""
    beside = {
        name: value
        for name, value in vars(metric).items()
        if (type(value) is int if name.startswith("_") else isinstance(value, Tensor))
    }
    state: dict[str, Any] = moved({**metric.metric_state, **beside}, torch.device("cpu"))
    return state


def moved(value: Any, device: torch.device) -> Any:
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().to(device, copy=True))


def restore_metric(metric: Metric, states: list[dict[str, Any]], name: str) -> None:
    """Give a metric its state; where the number of processes has changed, the states of all are merged."""
    form = {key: getattr(value, "shape", None) for key, value in metric_state(metric).items()}
    for number, state in enumerate(states):
        if form != {key: getattr(value, "shape", None) for key, value in state.items()}:
            raise ValueError(f"{name} has other states than that metric")
        own = moved(state, metric.device)
        if number:
            metric.merge_state({key: own[key] for key in metric.metric_state})
        else:
            for key, value in own.items():
                setattr(metric, key, value)


def logged_state(trainer: Trainer) -> list[dict[str, Any]]:
    """Return what was given to `self.log` for the end of this epoch, and how it is to be logged.

    Lightning 2.6 has no public name for it: after a resume its mean would begin anew, or never be logged.
    """
    return [
        {
            **{name: getattr(entry.meta, name) for name in ("fx", "name", *LOG_SETTINGS)},
            "reduce_fx": entry.meta.reduce_fx.__name__,
            **{"sync_dist": entry.meta.sync.should, "rank_zero_only": entry.meta.sync.rank_zero_only},
            "state": metric_state(entry) if entry.is_tensor else {},
        }
        for entry in trainer.fit_loop.epoch_loop._results.values()
        if entry.meta.on_epoch and not entry.has_reset
    ]


def restore_logged(trainer: Trainer, module: LightningModule, parts: list[list[dict[str, Any]]]) -> None:
    """Continue the logged values of an unfinished epoch: those of this process, or of all that there were."""
    results, metrics = trainer.fit_loop.epoch_loop._results, find_metrics(module)
    for entries in zip(*parts, strict=True):
        settings = {key: value for key, value in entries[0].items() if key != "state"}
        name = settings["metric_attribute"]
        value: Any = metrics[name] if name else torch.zeros((), device=module.device)
        # as if the module had logged it, and then its state; all but the state must agree when it does
        results.log(value=value, sync_dist_fn=trainer.strategy.reduce, batch_size=1, **settings)
        logged = results[f"{settings['fx']}.{settings['name']}"]
        if not logged.is_tensor:
            continue
        restore_metric(logged, [entries[0]["state"]], f"logged/{settings['name']}")
        combine = {"max": torch.maximum, "min": torch.minimum}.get(settings["reduce_fx"], torch.add)
        for state in (moved(entry["state"], module.device) for entry in entries[1:]):
            logged.value = combine(logged.value, state["value"])
            if "cumulated_batch_size" in state:
                logged.cumulated_batch_size = logged.cumulated_batch_size + state["cumulated_batch_size"]
    # The first step after a resume looks to Lightning 2.6 like an epoch's first, where it begins all values anew.
    results.reset = lambda *_, **__: None  # type: ignore[method-assign]


def unfreeze_reset(trainer: Trainer) -> None:
    """End what `restore_logged` began: from the second step on, values are reset as usual."""
    vars(trainer.fit_loop.epoch_loop._results).pop("reset", None)


def pending(trainer: Trainer) -> dict[str, float]:
    """Return what Lightning 2.6 logs of a step only after the callbacks, and so after a checkpoint that they save."""
    loop, interval = trainer.fit_loop.epoch_loop, trainer.log_every_n_steps  # type: ignore[attr-defined]
    step = loop._batches_that_stepped
    if not trainer.training or not interval or (step + 1) % interval:
        return {}
    values = loop._results.metrics(on_step=True)["log"]
    scalars: dict[str, float] = {name: value.item() for name, value in values.items() if value.numel() == 1}
    return {"step": step, "epoch": trainer.current_epoch, **scalars} if scalars else {}  # `step` may be logged, too
