"""Which run and which parts of a Trainer each command gets."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from math import inf
from typing import Any, Literal

from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry

from lit_mnist.cli.settings import MACHINE, Settings
from lit_mnist.exact.assembly import make_callbacks, make_logger, make_plugins, place_logger
from lit_mnist.exact.checkpoints import Run, callback_of
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import UserError, shown
from lit_mnist.exact.ddp import ExactDDP, launched
from lit_mnist.exact.loggers import RunLogger
from lit_mnist.exact.progress import Progress, print_once, total_steps
from lit_mnist.exact.reader import ENTRIES
from lit_mnist.exact.results import Results
from lit_mnist.exact.runs import run_folder


class AutoTrainer(Trainer):
    """Lightning's Trainer settings; precision also takes `auto`, which `settings.parse` replaces."""

    def __init__(self, *args: Any, precision: Literal["auto"] | _PRECISION_INPUT | None = None, **kwargs: Any) -> None:
        assert precision != "auto"
        super().__init__(*args, precision=precision, **kwargs)


class Unprofiled(PassThroughProfiler):
    """PassThroughProfiler of Lightning 2.6 runs a generator for each of some sixty hooks of a step."""

    def profile(self, action_name: str, nothing: Any = nullcontext()) -> Any:  # noqa: B008, one for all
        return nothing


class Bar(lightning.RichProgressBar):
    """RichProgressBar with the latest loss, and the time left of the whole run."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        progress: Any = callback_of(trainer, Progress)
        times, steps = progress.state_dict(), total_steps(trainer) / max(trainer.global_step, 1)
        left = (times["train_seconds"] + times["validation_seconds"]) * (steps - 1)
        time = {"time left": str(timedelta(seconds=round(left)))} if left < inf else {}
        # the loss is read when it is shown: in each step that would wait for a GPU
        return {"loss": progress.loss, **time, **super().get_metrics(trainer, pl_module)}


def announce(run: Run, trainer: Trainer, module: LightningModule) -> None:
    """Print what is trained, on which device and where to."""
    sizes = {name: len(part[1]) for name, part in trainer.datamodule.sets.items()}  # type: ignore[attr-defined]
    device = conditions(module.device)["hardware"]["device" if module.device.type == "cuda" else "processor"]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print_once(trainer, f"Images:     {sizes['train']:,} to train on, {sizes.get('val', 0):,} held out")
    print_once(trainer, f"Device:     {trainer.world_size} x {device}, for {parameters:,} parameters")
    print_once(trainer, f"The run:    {shown(run.folder) if run.folder else 'not kept'}")
    if run.folder and any(isinstance(logger, RunLogger) for logger in trainer.loggers):
        print_once(trainer, f"Look at it: tensorboard --logdir {shlex.quote(shown(run.folder.parent))}")


def make_run(settings: Settings) -> Run:
    """Return the run of a command, a fit's own or the one of the checkpoint to score, and place a fit's loggers."""
    checkpoint, loaded = settings.checkpoint, settings.loaded
    if settings.command != "fit":
        assert checkpoint
        folder = run_folder(checkpoint)
        return Run(folder, checkpoint, {key: loaded[key] for key in ENTRIES}, folder)
    if settings.config["trainer.fast_dev_run"]:
        return Run(None, checkpoint, loaded)
    if checkpoint and settings.continues:
        run = Run.resumed(checkpoint, loaded, settings.unchanged)
    else:
        run = Run.new(settings.runs, checkpoint, loaded, settings.name)
    for number, logger in enumerate(as_list(settings.config["trainer.logger"])):
        if hasattr(logger, "init_args"):
            place_logger(run, logger, number, settings.runs)
    return run


def as_list(value: Any) -> list[Any]:
    """Return the values of a setting that takes none, one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def trainer_settings(settings: Settings, run: Run, made: Any, watch: Sequence[Callback]) -> dict[str, Any]:
    """Return the arguments of a command's Trainer; `made` are the settings with their classes instantiated."""
    trainer, command = made["trainer"], settings.command
    ddp = {"waiting": made["processes.timeout"], "synchronized": trainer["sync_batchnorm"], "start_method": "popen"}
    StrategyRegistry.register("ddp", ExactDDP, override=True, **ddp)  # Lightning's choice for several processes
    keeps = command == "fit" and not trainer["fast_dev_run"] and trainer["enable_checkpointing"] is not False
    callbacks = [*watch, *as_list(trainer["callbacks"])]
    drawn = any(isinstance(callback, lightning.ProgressBar) for callback in callbacks)  # Lightning takes only one bar
    bar = not drawn and trainer["enable_progress_bar"] is not False and sys.stdout.isatty()  # in a file it is noise
    if trainer["max_time"]:  # else Lightning 2.6 would silently ignore it beside a Timer
        callbacks = [callback for callback in callbacks if not isinstance(callback, lightning.Timer)]
    if command == "fit":
        parts, now = ("trainer.", "checkpoint.", "best.", "board."), settings.plain
        callbacks = make_callbacks(
            run,
            made["checkpoint"] if keeps else None,
            made["best"] if keeps and now["data.val_size"] > 0 else None,
            own=callbacks,
            board=[made["board"]] if made["board"].every_n_epochs > 0 else [],
            settings={key: value for key, value in now.items() if key.startswith(parts) and key not in MACHINE},
            config=settings.text,
            recipe=settings.recipe,
            command=settings.line,
        )
        callbacks.append(lightning.LambdaCallback(on_train_start=partial(announce, run)))
        # Lightning 2.6 has a table by default, with 18 lines for a small network, and FLOPs of 0
        callbacks += [lightning.RichModelSummary()] if trainer["enable_model_summary"] else []
    else:
        callbacks.append(progress := Progress())
        callbacks += [Results(run, progress)] if command == "test" else []
    return {
        **trainer,
        "callbacks": [*callbacks, Bar(refresh_rate=10)] if bar else callbacks,
        "logger": make_loggers(settings, run, trainer["logger"]),
        "plugins": [*as_list(trainer["plugins"]), *make_plugins(run, trainer["sync_batchnorm"])],
        "profiler": trainer["profiler"] or Unprofiled(),
        "enable_checkpointing": keeps,
        "enable_progress_bar": bar or (drawn and trainer["enable_progress_bar"]),
        "enable_model_summary": False,
    }


def make_loggers(settings: Settings, run: Run, given: Any) -> Any:
    """Return the user's loggers, or of a fit TensorBoard's in the run's folder."""
    if given in (None, True):
        given = settings.command == "fit" and not settings.config["trainer.fast_dev_run"] and make_logger(run)
    hparams: dict[str, Any] = {"recipe": settings.recipe}
    for key, value in settings.plain.items():
        if key.startswith("trainer.") and key not in MACHINE:
            # one type in all runs: TensorBoard 2.21 compares no text with a number
            name = key.removeprefix("trainer.")
            hparams[name] = value if name in ("max_epochs", "max_steps") else str(value)
    for logger in as_list(given):
        if isinstance(logger, RunLogger):
            logger.log_hyperparams(hparams)  # beside the module's and the data's, which Lightning logs
    return given


def check_trainer(settings: Settings, trainer: Trainer) -> None:
    """Refuse what Lightning 2.6 would not end with, other processes than were started, and what cannot be resumed."""
    now, wanted, (processes, machines) = settings.plain, trainer.world_size, launched()
    for name in ("check_val_every_n_epoch", "accumulate_grad_batches", "val_check_interval"):
        value = now[f"trainer.{name}"]  # a time would be another step on a resumed run
        if value is not None and (isinstance(value, (str, dict)) or value <= 0):
            raise UserError(f"trainer.{name} must be a positive number, got {value}")
    if trainer.max_epochs == trainer.max_steps == -1 and (now["model.schedule"] != "constant" or now["model.warmup"]):
        raise UserError("trainer.max_epochs or trainer.max_steps must be positive for this model.schedule, got -1")
    before = len(settings.loaded.get("processes", ())) if settings.command == "fit" else 0
    if before not in (0, wanted):
        settings.lines.append(f"processes: {before} -> {wanted} (the same batches, but the last bits may differ)")
    if processes * machines not in (1, wanted):
        started = f"{processes} on each of {machines} machines were started; leave both out"
        raise UserError(f"trainer.devices and trainer.num_nodes ask for {wanted} processes in all, but {started}")
    if not isinstance(trainer.strategy, (ExactDDP, SingleDeviceStrategy)):
        raise UserError(f"trainer.strategy must be auto or ddp, got {now['trainer.strategy']}")
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if processes * machines > 1 and not getattr(environment, "creates_processes_externally", True):
        raise UserError("Lightning 2.6 starts processes itself in a SLURM job named bash or interactive: rename it")
    if isinstance(trainer.strategy, ExactDDP) and now["data.batch_size"] < wanted:
        raise UserError(f"data.batch_size must be at least {wanted}, one per process, got {now['data.batch_size']}")
