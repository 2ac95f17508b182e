"""Which parts of a Trainer each command gets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry

from lit_mnist.board import HPARAM_METRICS, Board
from lit_mnist.cli.progress_bar import NetworkSummary, OneLineBar
from lit_mnist.cli.settings import TRAINER_SETTINGS, Settings, run_settings
from lit_mnist.exact.assembly import make_callbacks, make_logger, make_plugins, place_logger
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import interactive
from lit_mnist.exact.ddp import ExactDDP, launched
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.loggers import TEST_SUFFIX, RunLogger
from lit_mnist.exact.progress import EpochLines
from lit_mnist.exact.results import Results
from lit_mnist.exact.run import Run
from lit_mnist.exact.runs import run_folder, section
from lit_mnist.exact.state import ENTRIES, StateError, check_weights

NOT_SHOWN = {"root", "download", "images", "split"}  # in the tab HParams: where data lies


class Processes:
    """How processes work together.

    Args:
        timeout: seconds that one waits for another until it is taken for lost. One that ends is noticed at once; this
            is for machines that vanish and links that are cut. Before the training starts it is half an hour.

    Raises:
        ValueError: it is no positive number.
    """

    def __init__(self, timeout: float = 120.0) -> None:
        if not 0 < timeout <= 86_400:
            raise ValueError(f"processes.timeout must be a number of seconds in (0, 86400], got {timeout}")
        self.timeout = timeout


class AutoTrainer(Trainer):
    """Lightning's, whose precision may be `auto` too: bf16-mixed where the device has units for it, else 32-true.

    The command line decides (`settings.choose_precision`), and the run keeps what it came to.
    """

    def __init__(self, *args: Any, precision: Literal["auto"] | _PRECISION_INPUT | None = None, **kwargs: Any) -> None:
        assert precision != "auto"
        super().__init__(*args, precision=precision, **kwargs)


def make_run(settings: Settings) -> Run:
    """The run of a command: a fit's own, or the one that a checkpoint to score belongs to."""
    checkpoint, loaded = settings.checkpoint, settings.loaded
    if settings.command != "fit":  # of a checkpoint that is only scored, the weights and settings count
        folder = run_folder(checkpoint) if checkpoint else None
        return Run(folder, checkpoint, {key: loaded[key] for key in ENTRIES}, folder)
    if settings.own["trainer.fast_dev_run"]:
        return Run(None, checkpoint, loaded)
    if checkpoint and settings.continues:
        return Run.resumed(checkpoint, loaded, settings.unchanged)
    try:
        return Run.new(settings.runs, checkpoint, loaded)
    except UserError as error:
        raise UserError(f"trainer.default_root_dir: {error}") from error


def place_loggers(settings: Settings, run: Run) -> None:
    """Give the loggers that a fit was configured with their places."""
    loggers = settings.own["trainer.logger"] if settings.command == "fit" else None
    for number, logger in enumerate(loggers if isinstance(loggers, list) else [loggers]):
        if hasattr(logger, "init_args"):
            place_logger(run, logger, number, settings.runs)


def trainer_settings(
    settings: Settings, run: Run, made: Any, config: str, watch: Sequence[Callback] = ()
) -> dict[str, Any]:
    """What the Trainer of a command is made with, over the user's settings of it.

    Args:
        made: the settings with their classes instantiated.
        config: the text of the run's config.yaml.
        watch: callbacks before the user's own.
    """
    trainer, command = made["trainer"], settings.command
    StrategyRegistry.register(
        "ddp",  # which Lightning chooses for more than one process
        ExactDDP,
        override=True,
        waiting=made["processes"].timeout,
        synchronized=trainer["sync_batchnorm"],
        start_method="popen",
    )
    own: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    given = trainer["callbacks"] or []
    given = [*watch, *(given if isinstance(given, list) else [given])]
    shown: list[Callback] = []
    if trainer["enable_progress_bar"] is not False and interactive():
        own["enable_progress_bar"] = True
        shown.append(OneLineBar())
    if command == "fit" and trainer["enable_model_summary"] is not False:
        shown.append(NetworkSummary())
    if command != "fit" or trainer["fast_dev_run"]:
        own["enable_checkpointing"] = trainer["enable_checkpointing"] or False
    if trainer["logger"] in (None, True, []):
        own["logger"] = logger_of(settings, run, made) if trainer["logger"] != [] else False
    loggers = own.get("logger", trainer["logger"])
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, RunLogger) and command == "fit":
            logger.shown, logger.shown_metrics = hyperparameters(settings), HPARAM_METRICS
    if trainer["profiler"] is None:
        own["profiler"] = Unprofiled()
    plugins = trainer["plugins"] or []
    own["plugins"] = [
        *(plugins if isinstance(plugins, list) else [plugins]),
        *make_plugins(run, trainer["sync_batchnorm"]),
    ]
    if command == "fit":
        parts = fit_callbacks(settings, run, made, config, given)
    else:
        parts = [*given, *score_callbacks(settings, run), *(made["board"].callbacks() if command == "test" else [])]
    return {**trainer, **own, "callbacks": [*parts, *shown]}


def fit_callbacks(settings: Settings, run: Run, made: Any, config: str, own: Sequence[Callback]) -> list[Callback]:
    keeps = not made["trainer"]["fast_dev_run"] and made["trainer"]["enable_checkpointing"] is not False
    board: Board = made["board"]
    if not run.origin:  # a resumed run has its texts
        described = json.dumps(conditions(torch.device("cpu")), indent=4)
        board.texts = {"command": f"python -m lit_mnist {shlex.join(settings.args)}", "conditions": described}
    return make_callbacks(
        run,
        made["checkpoint"] if keeps else None,
        made["best"] if keeps and settings.own["data.val_size"] > 0 else None,
        own=own,
        board=board.callbacks(),
        settings=run_settings(dict(settings.own.items())),
        config=config,
        recipe=settings.recipe,
        command=shlex.join(settings.args),
    )


def score_callbacks(settings: Settings, run: Run) -> list[Callback]:
    lines = EpochLines()
    return [lines, Results(run, lines=lines)] if settings.command == "test" else [lines]


def logger_of(settings: Settings, run: Run, made: Any) -> RunLogger | bool:
    """TensorBoard's events in the run's folder, where a command has something to write there."""
    if settings.command not in ("fit", "test") or made["trainer"]["fast_dev_run"]:
        return False
    if settings.command == "test":
        if not run.folder:
            return False
        logger = make_logger(run, filename_suffix=TEST_SUFFIX)
        logger.tested_step = settings.loaded["global_step"]
        return logger
    return make_logger(run)


def hyperparameters(settings: Settings) -> dict[str, Any]:
    """What the tab HParams shows of a run: its most telling settings first, then what is not as it is by default or was
    given as a flag, as all trials of a study have it.
    """
    before = section(section(settings.loaded, "callbacks"), "Results").get("recipe")
    shown = {"recipe": before or settings.recipe, "lr": settings.own.get("model.lr")}
    shown |= {"layers": settings.own.get("model.layers"), "seed": settings.own["seed_everything"]}
    for key, value in settings.own.items():
        part, _, name = key.partition(".")
        telling = part in ("model", "data") or name in TRAINER_SETTINGS
        given = value != settings.defaults.get(key) or any(arg.startswith(f"--{key}=") for arg in settings.args)
        if telling and name not in NOT_SHOWN and given:
            shown.setdefault(name, value)
    return shown


def check_processes(settings: Settings, trainer: Trainer, data: LightningDataModule) -> None:
    """Check that as many processes are asked for as there are, and that the strategy is one that is exact.

    Raises:
        UserError: not so.
    """
    asked, (processes, machines) = trainer.world_size, launched()
    before = len(settings.loaded["processes"]) if settings.command == "fit" and settings.checkpoint else asked
    if before != asked:
        settings.changes.append(f"processes: {before} -> {asked} (the same batches, but the last bits may differ)")
    if processes * machines not in (1, asked):
        raise UserError(
            f"trainer.devices and trainer.num_nodes ask for {asked} processes in all, but {processes} on each of"
            f" {machines} machines were started; leave both out, and the number is taken over"
        )
    if not isinstance(trainer.strategy, (ExactDDP, SingleDeviceStrategy)):
        raise UserError(f"trainer.strategy must be auto or ddp, got {settings.own['trainer.strategy']}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):  # which change the settings within fit
            raise UserError(f"trainer.callbacks must have no {type(callback).__name__}: set the value it found")
        if isinstance(callback, StochasticWeightAveraging):  # whose state Lightning 2.6 cannot take back
            raise UserError("trainer.callbacks must have no StochasticWeightAveraging: use model.ema_decay")
    if not isinstance(trainer.strategy, ExactDDP):
        return
    environment = trainer.strategy.cluster_environment
    if processes * machines > 1 and environment and not environment.creates_processes_externally:
        raise UserError(
            "from SLURM's jobs of the name bash or interactive Lightning takes no processes; give another name:"
            " srun --job-name digits"
        )
    batch_size = data.hparams["batch_size"]
    if batch_size < asked:
        raise UserError(f"data.batch_size must be at least the number of processes, {asked}, got {batch_size}")


def check_network(settings: Settings, model: LightningModule) -> None:
    try:
        check_weights(model, settings.loaded["state_dict"])
    except StateError as error:
        raise UserError(
            f"--ckpt_path {settings.checkpoint}: its weights do not fit the network of model.layers:"
            f" {settings.own.get('model.layers')} ({error})"
        ) from error


class Unprofiled(PassThroughProfiler):
    """PassThroughProfiler of Lightning 2.6 runs a generator for each of some sixty hooks of a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> nullcontext[None]:  # type: ignore[override]
        return self.nothing
