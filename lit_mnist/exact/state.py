"""Whether a checkpoint can be restored: its form against that of the run that is to take it over.

A fresh run's own state says what type, shape and size each entry must have, for whatever optimizer, schedule, callback
and network it has. So nothing here lists what Lightning keeps; what is read before there is a run has a table.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from .console import shortened
from .errors import UserError

# What is read of a checkpoint before there is a trainer, and of those that `fit` resumes.
ENTRIES: dict[str, type] = {"state_dict": dict, "hyper_parameters": dict, "datamodule_hyper_parameters": dict}
ENTRIES |= {"epoch": int, "global_step": int, "pytorch-lightning_version": str}
TRAINING_ENTRIES: dict[str, type] = {"loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
TRAINING_ENTRIES |= {"settings": dict, "processes": list}
COUNT_LIMIT = 2**53

# Whoever of these functions of Lightning 2.6 and of this project fails, fails over the checkpoint.
PROGRESS = {"last_epoch", "base_lrs", "_step_count", "_last_lr"}  # of a schedule; without them it would begin again
RESTORING = {"_restore_modules_and_callbacks", "restore_training_state", "_load_combined_loader_states"}


class StateError(ValueError):
    """An entry of a checkpoint that does not have the form it must have; the message names it."""


def check_entries(checkpoint: Mapping[str, Any], entries: Mapping[str, type]) -> None:
    """Check that entries are there, and of their types.

    Raises:
        StateError: one is not.
    """
    for name, kind in entries.items():
        value = checkpoint.get(name)
        if not isinstance(value, kind) or (kind is int and type(value) is not int):  # True is an int
            found = f"is {described(value)}" if name in checkpoint else "is missing"
            raise StateError(f"{name} {found}, expected {kind.__name__}")
        if isinstance(value, int) and not 0 <= value < COUNT_LIMIT:
            raise StateError(f"{name} is {shortened(str(value), 40)}, expected a count")


def check_state(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Check the progress of loops, optimizers and schedules, once the trainer has its own.

    Raises:
        StateError: something does not have the form of the trainer's.
    """
    fresh = trainer.fit_loop.state_dict()
    loops = mapping(checkpoint["loops"].get("fit_loop"), "loops/fit_loop")
    loaders = mapping(loops.get("state_dict"), "loops/fit_loop/state_dict").get("combined_loader", [])
    check(fresh | {"state_dict": {}}, {**loops, "state_dict": {}}, "loops/fit_loop")
    for path, count in counts(loops, "loops/fit_loop"):
        if type(count) is not int or count < 0:
            raise StateError(f"{path} is {described(count)}, expected a count")
    if not (isinstance(loaders, list) and all(isinstance(state, dict) for state in loaders)):
        raise StateError(f"loops/fit_loop/state_dict is {described(loaders)}, expected the states of loaders")
    own = [optimizer.state_dict() for optimizer in trainer.optimizers]
    same_length(own, checkpoint["optimizer_states"], "optimizer_states")
    for number, optimizer in enumerate(trainer.optimizers):
        path = f"optimizer_states/{number}"
        check_optimizer(optimizer, mapping(checkpoint["optimizer_states"][number], path), path)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    same_length(schedulers, checkpoint["lr_schedulers"], "lr_schedulers")
    for number, scheduler in enumerate(schedulers):
        path = f"lr_schedulers/{number}"
        state, loaded = scheduler.state_dict(), mapping(checkpoint["lr_schedulers"][number], path)
        # torch puts every entry into the scheduler's __dict__; what another version of it kept does no harm there
        odd = [key for key in loaded.keys() - state.keys() if type(key) is not str or hasattr(scheduler, key)]
        missing = PROGRESS & state.keys() - loaded.keys()
        if odd or missing:
            raise StateError(f"{path}/{shortened(str([*missing, *odd][0]))} is {'missing' if missing else 'unknown'}")
        fill(state, loaded)
        check(state, {key: loaded[key] for key in state}, path)
        for name, values in state.items():
            if isinstance(values, list):
                same_length(values, loaded[name], f"{path}/{name}")


def fill(fresh: Mapping[str, Any], loaded: dict[Any, Any]) -> None:
    """Give entries that the version before did not have their present values."""
    for key, value in fresh.items():
        loaded.setdefault(key, value)


def check_optimizer(optimizer: torch.optim.Optimizer, loaded: dict[str, Any], path: str) -> None:
    groups = optimizer.state_dict()["param_groups"]
    same_length(groups, loaded.get("param_groups"), f"{path}/param_groups")
    for number, group in enumerate(groups):
        at = f"{path}/param_groups/{number}"
        own = mapping(loaded["param_groups"][number], at)
        if "params" in own:
            fill(group, own)
        check(group, {key: own[key] for key in group.keys() & own.keys()}, at)
        if loaded["param_groups"][number]["params"] != group["params"]:
            raise StateError(f"{at}/params are not those of this network")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = mapping(loaded.get("state"), f"{path}/state")
    first = mapping(next(iter(states.values()), {}), f"{path}/state")
    for number, state in states.items():
        at = f"{path}/state/{shortened(str(number), 40)}"
        if type(number) is not int or not 0 <= number < len(parameters):
            raise StateError(f"{at} belongs to no parameter")
        if mapping(state, at).keys() != first.keys():
            raise StateError(f"{at} has other entries than the first")
        for name, value in state.items():
            if name == "step":  # a number, or a tensor of one
                number_of_steps = float(value.detach()) if isinstance(value, Tensor) and value.numel() == 1 else value
                if not (plain(number_of_steps) and 0 <= float(number_of_steps) < COUNT_LIMIT):
                    raise StateError(f"{at}/{name} is {described(value)}, expected a count")
            elif value is None and any(group.get("momentum", 1) for group in groups):
                raise StateError(f"{at}/{name} is None")
            if isinstance(value, Tensor) and name != "step":
                check(parameters[number].detach(), value, f"{at}/{name}")
            elif not (value is None or isinstance(value, Tensor) or plain(value)):
                raise StateError(f"{at}/{name} is {described(value)}, expected a tensor or a number")
            else:
                check(first[name], value, f"{at}/{name}")


def check_callbacks(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Check the states of the callbacks, before any of them loads its own.

    Raises:
        StateError: one does not have the form of the callback's present state, or one of this project's is missing.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state, path = callback.state_dict(), f"callbacks/{callback.state_key}"
        module = type(callback).__module__
        if callback.state_key not in checkpoint["callbacks"]:
            if state and module.startswith(f"{__package__}."):
                raise StateError(f"{path} is missing")
        elif module.startswith((f"{__package__}.", "pytorch_lightning.")):  # a user's own may keep what it likes
            loaded = mapping(checkpoint["callbacks"][callback.state_key], path)
            check(state, {**state, **loaded}, path)  # what a version before did not have, its `load_state_dict` knows


def check(fresh: Any, loaded: Any, path: str) -> None:
    """Check that a value has the form of another: types, keys, shapes.

    None and an empty container, which may have been filled since, admit plain values and tensors, and containers; a
    number admits a number.

    Raises:
        StateError: it has another.
    """
    if fresh is None:
        fits = loaded is None or plain(loaded) or (isinstance(loaded, Tensor) and loaded.numel() == 1)
    elif isinstance(fresh, Tensor):
        fits = isinstance(loaded, Tensor) and tensor_form(fresh) == tensor_form(loaded)
    elif type(fresh) in (int, float):
        fits = type(loaded) in (int, float) and (plain(loaded) or loaded == fresh)  # some begin at infinity
    elif isinstance(fresh, (dict, list, tuple)):
        fits = isinstance(loaded, dict if isinstance(fresh, dict) else (list, tuple))
        fits = fits and (not isinstance(fresh, tuple) or len(loaded) == len(fresh))
    else:
        fits = type(loaded) is type(fresh) and plain(loaded)
    if not fits:
        raise StateError(f"{shortened(path)} is {described(loaded)}, expected {described(fresh)}")
    if isinstance(fresh, dict) and fresh:
        if loaded.keys() != fresh.keys():
            odd = min(loaded.keys() ^ fresh.keys(), key=str)
            raise StateError(f"{shortened(f'{path}/{odd}')} is {'missing' if odd in fresh else 'unknown'}")
        for key, value in fresh.items():
            check(value, loaded[key], f"{path}/{key}")
    elif isinstance(fresh, (list, tuple)) and fresh:
        for number, value in enumerate(loaded):  # a longer one has grown
            check(fresh[number] if len(loaded) == len(fresh) else fresh[0], value, f"{path}/{number}")


def check_weights(module: LightningModule, weights: Mapping[str, Any]) -> None:
    """Check a state dict against the module's own.

    Raises:
        StateError: a tensor is missing, unknown, of another shape, or of integers in place of real numbers.
    """
    if fresh := module.state_dict():  # else they are made later, by `configure_model`
        check(dict(fresh), dict(weights), "state_dict")


def tensor_form(tensor: Tensor) -> tuple[Any, ...]:
    """What must agree: not the precision, which the restoring brings to that of the run."""
    kind = tensor.dtype if not tensor.dtype.is_floating_point else "real"
    return kind, tuple(tensor.shape), tensor.layout, tensor.device.type == "meta", tensor.is_quantized


def plain(value: Any) -> bool:
    """Whether it is a string, a boolean, or a number that a counter or a setting may have."""
    if type(value) in (int, float):
        return math.isfinite(value) and abs(value) < 1e300 if type(value) is float else abs(value) < COUNT_LIMIT
    return type(value) in (str, bool)


def counts(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """All the numbers in nested dictionaries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from counts(inner, f"{path}/{key}")
    elif type(value) in (int, float):
        yield path, value


def mapping(value: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise StateError(f"{path} is {described(value)}, expected dict")
    return value


def same_length(fresh: list[Any], loaded: Any, path: str) -> None:
    if not isinstance(loaded, list) or len(loaded) != len(fresh):
        raise StateError(f"{path} is {described(loaded)}, expected {described(fresh)}")


def described(value: Any) -> str:
    """A value in a few words: never the whole of a nested one."""
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {shortened(repr(value), 40)}" if value is not None else "None"


def restoring(error: BaseException) -> bool:
    """Whether an error comes out of the restoring of a checkpoint."""
    if isinstance(error, (NameError, ImportError, torch.OutOfMemoryError)):
        return False  # whatever a checkpoint holds
    functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return isinstance(error, StateError) or not functions.isdisjoint(RESTORING)


def not_restorable(path: Any, reason: BaseException) -> UserError:
    """The one error for whatever goes wrong with a checkpoint's state."""
    words = " ".join(str(reason).split()) or type(reason).__name__
    if not isinstance(reason, StateError):
        words = f"{type(reason).__name__}: {words}"
    return UserError(f"--ckpt_path {path}: that checkpoint's state cannot be restored ({shortened(words)})")
