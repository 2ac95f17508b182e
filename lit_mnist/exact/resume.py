"""Going on with a run: what a checkpoint of Lightning lacks, and nothing touched before all of it is restored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ProgressBar
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchmetrics.wrappers import MetricTracker

from .checkpoint_io import FORMAT, FORMAT_ENTRY
from .conditions import conditions
from .console import shortened
from .ddp import ExactDDP, every, smallest_part
from .errors import UserError
from .loggers import curves, open_loggers
from .metrics import counted, logged_state, metric_states, pending, restore_logged, restore_metric, unfreeze_reset
from .run import Run
from .runs import replaced
from .state import StateError, check, check_callbacks, check_state, described, mapping, plain, same_length, tensor_form

# hooks of the module that come after a checkpoint is saved: a resume would leave them out
TOO_LATE = {"on_train_batch_end": "training_step", "on_validation_end": "on_validation_epoch_end"}


class RunStart(Callback):
    """Touches the folder of a run only once everything is restored: until then a failure costs nothing.

    Then it brings the curve to where the checkpoint was, writes config.yaml, which SaveConfigCallback of Lightning 2.6
    would replace before anything is restored, and opens the loggers.

    Args:
        resume: what restores the rest of the state.
        config: the text of config.yaml; empty for none.
    """

    def __init__(self, run: Run, resume: ExactResume, config: str = "") -> None:
        self.run = run
        self.resume = resume
        self.config = config
        self.written = run.checkpoint.stat().st_mtime_ns if run.checkpoint else 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # not who made it: the first process alone may remove it again
        self.run.folder = trainer.strategy.broadcast(self.run.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_exactness(trainer, pl_module)
        # each process reads the checkpoint for itself, and machines may see different files
        steps, loaded = every((trainer.current_epoch, trainer.global_step)), self.run.loaded
        if len(set(steps)) > 1:
            raise UserError(
                "--ckpt_path: the processes have read different checkpoints, of these epochs and steps:"
                f" {', '.join(map(str, steps))}; give all machines the same file"
            )
        epochs = {loaded["epoch"], loaded["epoch"] + 1} if loaded else set()  # saved at an epoch's end, it is the next
        if loaded and not (steps[0][0] in epochs and steps[0][1] == loaded["global_step"]):
            raise StateError(f"loops/fit_loop is at epoch and step {steps[0]}, and the rest of it elsewhere")
        changed = self.resume.restore(trainer, pl_module)
        if loaded.get("stopped") is True and not changed and self.run.unchanged:
            trainer.should_stop = True  # a callback had ended this run, and nothing says that it is to go on
        problem: OSError | UserError | None = None
        try:
            if trainer.is_global_zero and self.run.folder:
                self.run.folder.mkdir(parents=True, exist_ok=True)
            open_loggers(trainer, loaded, self.written, self.run.origin, self.run.continues)
            if metrics := dict(loaded.get("pending", {})):
                step = int(metrics.pop("step", 0))
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step)
            if trainer.is_global_zero and self.run.folder and self.config:
                with replaced(self.run.folder / "config.yaml") as partial:
                    partial.write_text(self.config)
        except (OSError, UserError) as error:
            problem = error
        if reason := next(filter(None, every(str(problem or ""))), ""):  # all end with it, and none waits for another
            raise problem or UserError(f"another process could not write to the run: {reason}")
        self.run.started = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.resume.begin(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.resume.begin(trainer, pl_module)


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
        raise UserError("a MetricTracker grows as it goes, and could not be restored; log its metric instead")
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


class ExactResume(Callback):
    """Puts into checkpoints what Lightning 2.6 leaves out, and restores it: random states, half-filled metrics and
    logged values, the metrics that callbacks look at, how much of the curves was written, and the settings.

    The order of the batches and their augmentation are the data's: a function of its seed, or in its loader's state.

    Args:
        settings: plain settings with dotted keys, for whoever reads the checkpoint.
    """

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        self.run = run
        self.settings = settings
        self._fresh: dict[str, Any] = {}
        self._resumed = False
        self._logged: list[Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning 2.6 does so only once a checkpoint is loaded, whose weights of 64 bits would have been cut to 32
        trainer.precision_plugin.convert_module(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[FORMAT_ENTRY] = FORMAT
        checkpoint["settings"] = self.settings
        checkpoint["asked"] = self._fresh
        checkpoint["conditions"] = conditions(pl_module.device)
        checkpoint["stopped"] = trainer.should_stop
        checkpoint["latest"] = {
            name: torch.tensor(value.item(), dtype=value.dtype)
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1
        }
        own = {
            "random": random_state(pl_module.device),
            "metrics": metric_states(trainer, pl_module),
            "logged": logged_state(trainer),
        }
        checkpoint["processes"] = every(own)
        checkpoint["pending"] = pending(trainer)
        if trainer.is_global_zero:
            checkpoint["curves"] = curves(trainer.loggers)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_callbacks(trainer, checkpoint)
        self._resumed = True
        form = random_state(torch.device("cpu"))
        for number, part in enumerate(checkpoint["processes"]):
            at = f"processes/{number}"
            check({"random": {}, "metrics": {}, "logged": []}, mapping(part, at), at)
            cuda = {"cuda": part["random"].get("cuda")} if "cuda" in part["random"] else {}
            check(form | cuda, part["random"], f"{at}/random")
            set_random_state(part["random"], torch.device("cpu"), check_only=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:  # now that there are optimizers to compare with, and before they are restored
            check_state(trainer, self.run.loaded)
        self._fresh = configured_hparams(trainer)
        if trainer.global_rank > 0:  # dropout of its own on each process
            torch.manual_seed((torch.initial_seed() + 0x9E3779B97F4A7C15 * trainer.global_rank) % 2**63)

    def restore(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Restore what Lightning does not, all but the random state.

        Returns:
            Whether settings of optimizers and schedules differ from those of the checkpoint.

        Raises:
            StateError: something does not have the form that it must have.
        """
        if not self._resumed:
            return False
        loaded, rank = self.run.loaded, trainer.global_rank
        within = not loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] and loaded["global_step"]
        if within:
            start_epoch_again(trainer, pl_module)
            reload(trainer, loaded["loops"]["fit_loop"])
        changed = apply_settings(trainer, loaded.get("asked"), self._fresh)
        for name, value in mapping(loaded.get("pending", {}), "pending").items():
            if type(name) is not str or type(value) not in (int, float):
                raise StateError(f"pending/{shortened(str(name))} is {described(value)}, expected a number")
        latest = mapping(loaded.get("latest", {}), "latest")
        for name, value in latest.items():
            form = tensor_form(value)[1:] if isinstance(value, torch.Tensor) and not value.is_complex() else None
            if type(name) is not str or form != tensor_form(torch.tensor(0.0))[1:]:
                raise StateError(f"latest/{shortened(str(name))} is {described(value)}, expected a tensor of a number")
        trainer.callback_metrics.update({name: value.to(pl_module.device) for name, value in latest.items()})
        parts = loaded["processes"]
        # on another number of processes the first has all that was counted
        everything = parts if rank == 0 else []
        own = [parts[rank]] if len(parts) == trainer.world_size else everything
        for name, metric in counted(pl_module).items():
            states = [mapping(part["metrics"].get(name), f"metrics/{name}") for part in own]
            restore_metric(metric, list(filter(None, states)), f"metrics/{name}")
        self._logged = [part["logged"] for part in own]
        restore_logged(trainer, pl_module, self._logged)  # whether it can be; the metrics are not to be seen yet
        trainer.fit_loop.epoch_loop._results.clear()
        return changed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the last hook before the first batch: whatever was drawn on the way here does not count
        rank, parts = trainer.global_rank, self.run.loaded.get("processes", [])
        if self._resumed and rank < len(parts):
            set_random_state(parts[rank]["random"], pl_module.device)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before each step, and at the end of an epoch: let the epoch's logged values go on at the first of these."""
        if trainer.global_step == 0:
            # Lightning 2.6 resumes a checkpoint of step 0 with this counter of the loggers' steps at 1
            trainer.fit_loop.epoch_loop._batches_that_stepped = 0
        unfreeze_reset(trainer)
        if self._logged is not None:
            restore_logged(trainer, pl_module, self._logged)
            self._logged = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unfreeze_reset(trainer)
        if trainer.fit_loop.restarting and trainer.max_steps == -1:
            # Lightning 2.6 keeps no metrics, and so leaves ReduceLROnPlateau out at the end of a resumed epoch; here
            # they are restored
            trainer.fit_loop.restarting = False


def start_epoch_again(trainer: Trainer, module: LightningModule) -> None:
    """Call what sets up an epoch: Lightning 2.6 does not where it resumes within one. Metrics are restored after it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        theirs = not type(callback).__module__.startswith(("pytorch_lightning.", f"{__package__}."))
        if (theirs and not isinstance(callback, ProgressBar)) or isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer, module)
    module.on_train_epoch_start()


def reload(trainer: Trainer, loop: Mapping[str, Any]) -> None:
    """Give loaders their states once more: Lightning 2.6 does not where `configure_optimizers` has read
    `trainer.estimated_stepping_batches` (issue 20550). A DataLoader keeps the iterator that it was asked for before.
    """
    loaders = trainer.train_dataloader
    states = loop["state_dict"].get("combined_loader", [])
    for loader, state in zip(loaders if isinstance(loaders, (list, tuple)) else [loaders], states, strict=False):
        if not isinstance(loader, DataLoader):
            loader.load_state_dict(state)


def random_state(device: torch.device) -> dict[str, Any]:
    """Of the generators that a module may draw from, torch's, numpy's and Python's, as plain values and tensors."""
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    _, keys, position, has_gauss, gauss = numpy
    version, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {"keys": torch.tensor(keys.tolist()), "position": position, "has_gauss": has_gauss, "gauss": gauss},
        "python": {"version": version, "words": torch.tensor(words), "gauss": next_gauss},
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device, check_only: bool = False) -> None:
    numpy, python = state["numpy"], state["python"]
    keys = np.asarray(numpy["keys"].tolist(), dtype=np.uint32)
    legacy = ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"])
    words = (python["version"], tuple(python["words"].tolist()), python["gauss"])
    if check_only:  # raises what would be raised once it is needed
        torch.Generator().set_state(state["torch"])
        np.random.RandomState().set_state(legacy)
        random.Random().setstate(words)
        return
    torch.set_rng_state(state["torch"])
    np.random.set_state(legacy)  # noqa: NPY002
    random.setstate(words)
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def configured_hparams(trainer: Trainer) -> dict[str, Any]:
    """The plain settings of optimizers and schedules as `configure_optimizers` gives them, before they are restored."""
    groups = [[plain_values(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    schedules = [plain_values(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
    return {"groups": groups, "schedules": schedules}


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        return value is None or plain(value) or (isinstance(value, (list, tuple)) and all(map(is_plain, value)))

    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {key: value for key, value in listed.items() if key != "params" and is_plain(value)}


def apply_settings(trainer: Trainer, before: Any, now: dict[str, Any]) -> bool:
    """Let the settings of optimizers and schedules that are asked for now win over the restored ones.

    Lightning restores both as they were saved, settings included. Only what differs from what the saved run asked for
    is set: what a schedule or a callback changes in training stays as it was. A rate under a schedule is multiplied by
    as much as its highest; under LambdaLR, which is a function of the step, it is computed anew.

    Returns:
        Whether anything differs.
    """
    before = mapping(before, "asked")
    check({"groups": [], "schedules": []}, before, "asked")
    same_length(now["groups"], before["groups"], "asked/groups")
    same_length(now["schedules"], before["schedules"], "asked/schedules")
    for number, groups in enumerate(now["groups"]):
        same_length(groups, before["groups"][number], f"asked/groups/{number}")
    differs = False
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    olds, news = ([g for groups in side["groups"] for g in groups] for side in (before, now))
    for group, old, new in zip(groups, olds, news, strict=True):
        old = plain_values(mapping(old, "asked/groups"))
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        differs |= bool(changed)
        if "lr" in changed and now["schedules"] and plain(old.get("lr")) and old["lr"]:
            group["lr"] *= new["lr"] / float(old["lr"])
            changed.pop("lr", None)
        for key, value in changed.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for config, old, new in zip(trainer.lr_scheduler_configs, before["schedules"], now["schedules"], strict=True):
        scheduler, old = config.scheduler, plain_values(mapping(old, "asked/schedules"))
        changed = {key: value for key, value in new.items() if old.get(key) != value}
        changed.pop("_last_lr", None)
        differs |= bool(changed)
        vars(scheduler).update(changed)
        if isinstance(scheduler, LambdaLR):
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(scheduler.last_epoch)
    return differs
