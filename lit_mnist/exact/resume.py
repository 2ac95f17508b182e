"""Exact resume: saves and restores the state that Lightning's checkpoints omit, before any file is modified."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning import callbacks as lightning
from torchmetrics import Metric

from . import metrics, optimizers
from .checkpoints import CheckpointKeeper, Run, callback_of
from .conditions import conditions
from .console import UserError
from .dataloaders import make_loaders_exact
from .ddp import ExactDDP, gather_all, part_of_batch
from .loggers import logger_states, open_loggers
from .progress import Progress
from .runs import FORMAT, FORMAT_ENTRY, replaced

# callbacks of Lightning 2.6 that cannot be resumed exactly: why, and what to do instead
REFUSED: dict[type[Callback], str] = {
    lightning.LearningRateFinder: "each start would search again; set the learning rate that it has found",
    lightning.BatchSizeFinder: "each start would search again; set the batch size that it has found",
    lightning.StochasticWeightAveraging: "it replaces the schedule, and resumes between epochs; use WeightAveraging",
    lightning.ModelPruning: "checkpoints lack its masks; prune the trained weights",
    lightning.OnExceptionCheckpoint: "it saves within a step; resume the run's last checkpoint",
    lightning.SpikeDetection: "it cannot load its own state; stop the training in a callback",
    lightning.ThroughputMonitor: "it counts its samples anew; look at train/samples_per_second",
}


class ExactResume(Callback):
    """Adds to checkpoints what Lightning 2.6 leaves out, and restores it; only then is the run's folder touched."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run.folder = trainer.strategy.broadcast(self.run.folder)
        refuse_callbacks(trainer)  # again, now with those of the module
        # Lightning 2.6 does so only once a checkpoint is loaded, whose weights of 64 bits would have been cut to 32
        trainer.precision_plugin.convert_module(pl_module)
        make_loaders_exact(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for part in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(part, lightning.EarlyStopping) and part.state_key in checkpoint["callbacks"]:
                checkpoint["callbacks"][part.state_key]["patience"] = part.patience  # of 2.6 it would be the former one

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # those that accumulate: at a validation, or at any step of a module with manual optimization
        accumulated = not pl_module.automatic_optimization or trainer.fit_loop.epoch_loop._should_accumulate()
        parameters = pl_module.named_parameters() if accumulated else ()
        own = {
            "random": rng_state(pl_module.device),
            "metrics": metrics.metric_states(trainer, pl_module, self._initial),
            "logged": metrics.logged_state(trainer),
            "gradients": {name: metrics.moved(part.grad) for name, part in parameters if part.grad is not None},
        }
        validation, reloads = trainer.fit_loop.epoch_loop.val_loop, vars(trainer)["reload_dataloaders_every_n_epochs"]
        checkpoint |= {
            FORMAT_ENTRY: FORMAT,
            "configured": self._configured,
            "frozen": optimizers.frozen_parts(trainer, pl_module),
            "conditions": conditions(pl_module.device),
            "stopped": trainer.should_stop,
            "validation_batches": dict(validation._seen_batches_per_dataloader),
            "validation_loaded": reloads and validation._last_val_dl_reload_epoch,
            "latest": metrics.moved({k: v for k, v in trainer.callback_metrics.items() if v.numel() == 1}),
            "processes": gather_all(own),
            "curves": logger_states(trainer.loggers) if trainer.is_global_zero else [],
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._configured, self._fresh = optimizers.configured_hparams(trainer, pl_module)  # before they are restored
        # as they were restored, until the hooks of the start have been called
        self._weights = deepcopy(pl_module.state_dict()) if self.run.checkpoint else {}
        found = metrics.find_parts(pl_module).items()
        # what differs from it is kept in checkpoints
        self._initial = {name: metrics.plain_data(part) for name, part in found if isinstance(part, Metric)}
        if trainer.global_rank > 0:  # each process has its own dropout
            torch.manual_seed((torch.initial_seed() + 0x9E3779B97F4A7C15 * trainer.global_rank) % 2**63)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_exactness(trainer)
        # each process reads the checkpoint for itself, and machines may see different files
        states = gather_all((trainer.current_epoch, trainer.global_step))
        if len(set(states)) > 1:
            raise UserError(f"the processes have read different checkpoints, of these epochs and steps: {states}")
        if self.run.checkpoint:
            changed = self.restore_rest(trainer, pl_module) or not self.run.unchanged
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            if self.run.loaded["stopped"] is True and not changed:
                trainer.should_stop = True  # a callback had ended this run, and no setting says to train it longer
            elif changed and (step := trainer.global_step) and rates and not any(rates) and not trainer.is_last_batch:
                raise UserError(f"the learning rate is 0 after step {step}: configure a longer schedule")
        problem: OSError | UserError | None = None
        try:
            open_loggers(trainer, self.run)
            if trainer.is_global_zero and self.run.folder and self.run.config:  # SaveConfigCallback 2.6 is too early
                with replaced(self.run.folder / "config.yaml") as unfinished:
                    unfinished.write_text(self.run.config)
        except (OSError, UserError) as error:
            problem = error
        for found in filter(None, gather_all(problem)):
            raise found  # in all processes: none waits for another
        # Lightning 2.6 calls this last of all hooks of a start
        trainer.strategy.on_train_start = partial(self._begin, trainer, pl_module)  # type: ignore[method-assign]

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what the hooks of a resumed run's start have changed, and save: never is there nothing to resume."""
        if schedule := callback_of(trainer, lightning.GradientAccumulationScheduler):
            schedule.on_train_epoch_start(trainer, pl_module)  # Lightning 2.6 calls it in no epoch that is resumed
        if self.run.checkpoint:
            self._restore_state(trainer, pl_module)
            self._weights = {}
        if keeper := callback_of(trainer, CheckpointKeeper):
            keeper.save(trainer)
        self.run.started = True

    def restore_rest(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Restore what Lightning does not; return whether settings of optimizers and schedules have changed."""
        loaded, device = self.run.loaded, pl_module.device
        loop: Any = trainer.fit_loop
        loop._restarting = False  # or Lightning 2.6, which keeps no metrics, would leave ReduceLROnPlateau out
        epoch, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
        if epoch.current.started == epoch.current.processed:  # the next epoch is whole, also after one that was cut
            epoch.current.completed, epoch.total.completed = epoch.current.processed, epoch.total.processed
            # with `max_steps` Lightning 2.6 would take an ended epoch, whose counters are full, for an unfinished one
            loop.epoch_loop.restarting = False
            loop.reset_restart_stage()
            batches.reset_on_run()
        elif not batches.is_last_batch:
            # Lightning 2.6 does not call these hooks where it resumes within an epoch
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                # what BaseFinetuning did is in its checkpoints
                if is_users(callback) and not isinstance(callback, (lightning.ProgressBar, lightning.BaseFinetuning)):
                    callback.on_train_epoch_start(trainer, pl_module)
            pl_module.on_train_epoch_start()
        validation = loop.epoch_loop.val_loop
        validation._seen_batches_per_dataloader.update(loaded.get("validation_batches", {}))
        if vars(trainer)["reload_dataloaders_every_n_epochs"] and "validation_loaded" in loaded:
            validation._last_val_dl_reload_epoch = loaded["validation_loaded"]
        # Lightning 2.6 does not always give the loaders their states (issue 20550)
        loop._combined_loader._load_state_dicts(loaded["loops"]["fit_loop"]["state_dict"].get("combined_loader", []))
        iter(loop._data_fetcher)  # in which torchdata's reads its state
        loop._resuming_from_checkpoint = False  # or a new epoch would begin with this iterator
        optimizers.restore_optimizers(trainer, loaded)
        changed = optimizers.apply_settings(trainer, loaded["configured"], self._configured, self._fresh)
        optimizers.restore_frozen(pl_module, loaded, self._configured)
        trainer.callback_metrics.update({name: value.to(device) for name, value in loaded["latest"].items()})
        if batches.current.ready:  # or Lightning 2.6 would begin all values anew in the next step
            trainer._logger_connector._first_loop_iter = False
        self._restore_state(trainer, pl_module)
        return changed

    def _restore_state(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what the hooks of a start may have changed, as they did when the run was first started."""
        pl_module.load_state_dict(self._weights, strict=False)
        parts: list[dict[str, Any]] = self.run.loaded["processes"]
        own = parts if trainer.global_rank == 0 else []  # on another number of processes the first has all
        if len(parts) == trainer.world_size:
            own = [parts[trainer.global_rank]]
        elif any(part.get("gradients") for part in parts):
            raise ValueError("gradients that accumulate are those of as many processes")
        for name, gradient in own[0].get("gradients", {}).items() if own else ():
            pl_module.get_parameter(name).grad = gradient.to(pl_module.device)
        metrics.restore_metrics(pl_module, [part["metrics"] for part in own], (own or parts)[0]["metrics"])
        metrics.restore_logged(trainer, pl_module, [part["logged"] for part in own])
        if trainer.global_rank < len(parts):
            _set_rng_states(random := parts[trainer.global_rank]["random"])
            if "cuda" in random and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"], pl_module.device)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_users(callback) and callback.state_key in self.run.loaded["callbacks"]:
                callback.load_state_dict(deepcopy(self.run.loaded["callbacks"][callback.state_key]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total  # not even where a hook has ended the epoch
        vars(total).update(dict.fromkeys(("ready", "started", "processed"), total.completed))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # first: a run that is trained longer continues without what WeightAveraging does to the weights at the end
        if progress := callback_of(trainer, Progress):
            progress.print_epoch(trainer)
        if keeper := callback_of(trainer, CheckpointKeeper):
            keeper.save(trainer)


def refuse_callbacks(trainer: Trainer) -> None:
    """Raise UserError for a callback that cannot be resumed exactly, or not be used with this module."""
    for part in trainer.callbacks:  # type: ignore[attr-defined]
        saves = getattr(part, "save_on_exception", False)  # a ModelCheckpoint
        for kind in filter(REFUSED.get, [lightning.OnExceptionCheckpoint] if saves else type(part).__mro__):
            raise UserError(f"{type(part).__name__} cannot be resumed exactly: {REFUSED[kind]}")
        fits = trainer.training and isinstance(part, lightning.BackboneFinetuning)
        if fits and not hasattr(trainer.lightning_module, "backbone"):
            raise UserError(f"{type(part).__name__} is for a module with an attribute `backbone`")


def check_exactness(trainer: Trainer) -> None:
    """Refuse what could not be resumed exactly, or is not the same on several processes, with a UserError."""
    for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
        if not hasattr(loader, "load_state_dict") or sized_len(loader) is None:
            # Lightning 2.6 takes a batch ahead of a loader without a length
            what = f"train_dataloader gives a {type(loader).__name__} that cannot be resumed within an epoch"
            raise UserError(f"{what}: give a DataLoader with a length, in_order, no __iter__ and no IterableDataset")
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and (config.interval == "step" or trainer.max_steps != -1):
            what = "ReduceLROnPlateau is left out by a resume with interval step or trainer.max_steps"
            raise UserError(f"{what}; use interval epoch and trainer.max_epochs")
    # batch norm of each process alone cannot do without samples, nor torch's synchronised one in mixed precision
    alone = isinstance(trainer.strategy, ExactDDP) and not trainer.strategy.synchronized
    *_, size = part_of_batch(trainer, len(loader) - 1, 1)
    if size < trainer.world_size and (alone or "mixed" in trainer.precision):
        what = f"an epoch's last batch has {size} samples for {trainer.world_size} processes"
        raise UserError(f"{what}: trainer.sync_batchnorm must be true and trainer.precision not mixed")


def is_users(callback: Callback) -> bool:
    known = type(callback).__module__.startswith(("pytorch_lightning.", f"{__package__}."))
    return isinstance(callback, lightning.LambdaCallback) or not known


def rng_state(device: torch.device) -> dict[str, Any]:
    state = _collect_rng_states(include_cuda=False)
    name, keys, *rest = state["numpy"]
    state["numpy"] = [name, keys.tolist(), *rest]  # `weights_only=True` loads no arrays
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
