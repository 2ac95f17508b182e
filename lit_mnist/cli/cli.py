"""fit, validate and test on LightningCLI: their run, the parts of their Trainer, and what they print."""

import logging
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from shlex import quote
from time import gmtime, strftime
from typing import Any, Literal
from unittest.mock import patch

import torch
from jsonargparse.typing import restricted_number_type
from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry

from lit_mnist.board import Board
from lit_mnist.cli.console import one_line, resume_command
from lit_mnist.cli.settings import DEFAULT_SEED, Parser, SettingsCLI, as_list
from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.exact.assembly import hold, make_callbacks, make_logger, make_plugins, place_logger
from lit_mnist.exact.checkpoint_io import translate_restoring
from lit_mnist.exact.checkpoints import BestSettings, CheckpointKeeper, Run, SaveSettings, callback_of
from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import PROGRAM, Interrupted, ProcessLost, TrainingFailed, UserError, shown
from lit_mnist.exact.ddp import ExactDDP, launched, lost
from lit_mnist.exact.loggers import RunLogger
from lit_mnist.exact.progress import Progress, print_once, total_steps, words
from lit_mnist.exact.results import Results
from lit_mnist.module import LitMNIST

MEANT = (  # warnings about what is meant here, or that a user can do nothing about
    "Checkpoint directory .* exists and is not empty|Previous log files in this directory will be deleted",  # both kept
    "callbacks used to create the checkpoint need to be provided",  # only fit writes checkpoints
    "Total length of `.*` across ranks is zero",  # data.val_size is 0
    "smaller than the logging interval|You requested to overfit but",  # every epoch has the order of the first
    "is not supported by the model summary",
    "isinstance.treespec, LeafSpec",  # Lightning 2.6 on torch 2.15
    "broadcast_buffers. is deprecated",  # in torch 2.15; torch 2.10 does not know the new name
)
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
Timeout = restricted_number_type("Timeout", float, [(">", 0), ("<=", 86400)])


class AutoTrainer(Trainer):
    """Lightning's Trainer settings; precision also takes `auto`, which `SettingsCLI` replaces."""

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
        time = {"time left": str(timedelta(seconds=round(left)))} if left < math.inf else {}
        # the loss is read when it is shown: in each step that would wait for a GPU
        return {"loss": progress.loss, **time, **super().get_metrics(trainer, pl_module)}


class MNISTCLI(SettingsCLI):
    """LightningCLI for one command, which `args` begin with; files and flags override the run's of `--ckpt_path`.

    `watch` is called with the run when it starts. Without `start` everything is only made.
    """

    def __init__(self, args: list[str], watch: Callable[[Run], object] | None = None, start: bool = True) -> None:
        self.command, self.watch = args[0], watch
        processes, machines = launched()
        defaults = {"max_epochs": 4, "num_sanity_val_steps": 0, "devices": processes, "num_nodes": machines}
        # a table has 18 lines for a small network; without synchronized batch norm the number of processes would matter
        defaults |= {"enable_model_summary": False, "sync_batchnorm": True}
        try:
            super().__init__(
                LitMNIST,
                MNISTDataModule,
                trainer_class=AutoTrainer,
                trainer_defaults=defaults,
                parser_class=Parser,
                parser_kwargs={"usage": f"python -m lit_mnist {self.command} [options]", "description": None},
                auto_configure_optimizers=False,
                # it would put `_instantiator`, code to call, into every checkpoint
                load_from_checkpoint_support=False,
                save_config_callback=None,  # ExactResume does that, once everything is restored
                args=args,
                run=False,  # its subcommands would lay a checkpoint's settings over the flags
            )
            if start:
                self.start()
        finally:
            self.run.discard_unused()

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="best, last, a file, or a run's folder.")
        if self.command == "fit":
            parser.add_argument("--name", type=str | None, default=None, help="A new run's folder (version_N).")
        # Lightning 2.6 allows true, a seed drawn at random; a run here can always be repeated
        parser.add_argument("--seed_everything", type=Seed, default=DEFAULT_SEED, help="Seed of everything random.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # int: a checkpoint must not name jsonargparse's type, or it would not load with weights_only=True
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        for name in ("classes", "image_shape"):
            parser.link_arguments("data", f"model.{name}", partial(self._of_data, name), "instantiate")
        wait = "Seconds that a process waits for another before it is considered lost, once the training has started."
        parser.add_argument("--processes.timeout", type=Timeout, default=120.0, help=wait)
        # in each command, so that each takes a run's config.yaml
        for part, name in ((SaveSettings, "checkpoint"), (BestSettings, "best"), (Board, "board")):
            parser.add_class_arguments(part, name)

    def _of_data(self, name: str, data: MNISTDataModule) -> Any:
        # a trained network has that of the data that it was trained on
        return self.run.loaded.get("hyper_parameters", {}).get(name, getattr(data, name))

    def instantiate_classes(self) -> None:
        self.run = self.make_run()
        try:
            made = self.parser.instantiate_classes(self.config)
            self.datamodule, self.model = made["data"], made["model"]
            self.trainer = AutoTrainer(**self.trainer_settings(made))
        except (ValueError, TypeError, LookupError, ImportError, RuntimeError, MisconfigurationException) as error:
            # what was configured cannot be made; jsonargparse 4.53 wraps the error of a link
            cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
            said = one_line(cause)
            for key, part in vars(self.config["trainer"]).items():
                if str(error).endswith(f"Given value: {part}"):
                    name = str(getattr(part, "class_path", "")).rpartition(".")[2].removeprefix("Run")
                    said = f"trainer.{key}: {f'{name}: ' * (name not in said)}{said}"
            raise UserError(said) from cause
        self.check_trainer()
        for line in self.lines if self.trainer.is_global_zero else []:
            print(line, flush=True)

    def make_run(self) -> Run:
        """Return the run of the checkpoint to score, or a fit's own, in its folder and with loggers there."""
        run, runs = self.run, self.runs
        if self.command != "fit":
            return run
        if self.config["trainer.fast_dev_run"]:
            return Run(None, run.checkpoint, run.loaded)
        if not run.continues:
            run.claim(runs, self.name)
        for number, logger in enumerate(as_list(self.config["trainer.logger"])):
            if hasattr(logger, "init_args"):
                place_logger(run, logger, number, runs)
        return run

    def trainer_settings(self, made: Any) -> dict[str, Any]:
        """Return the arguments of the Trainer; `made` are the settings with their classes instantiated."""
        trainer, run, command = made["trainer"], self.run, self.command
        ddp = {"waiting": made["processes.timeout"], "synchronized": trainer["sync_batchnorm"], "start_method": "popen"}
        StrategyRegistry.register("ddp", ExactDDP, override=True, **ddp)  # Lightning's choice for several processes
        writes = command == "fit" and not trainer["fast_dev_run"]
        keeps = writes and trainer["enable_checkpointing"] is not False
        callbacks = [*as_list(trainer["callbacks"])]
        drawn = any(isinstance(part, lightning.ProgressBar) for part in callbacks)  # Lightning takes only one bar
        bar = not drawn and trainer["enable_progress_bar"] is not False and sys.stdout.isatty()  # in a file it is noise
        if trainer["max_time"]:  # else Lightning 2.6 would silently ignore it beside a Timer
            callbacks = [part for part in callbacks if not isinstance(part, lightning.Timer)]
        if command == "fit":
            save = made["checkpoint"] if keeps else None
            best = made["best"] if self.config["data.val_size"] > 0 else None
            board = [made["board"]] if made["board"].every_n_epochs > 0 else []
            callbacks = make_callbacks(run, save, best, own=callbacks, board=board)
            callbacks.append(lightning.LambdaCallback(on_train_start=self.announce))
        else:
            callbacks.append(progress := Progress())
            callbacks += [Results(run, progress)] if command == "test" else []
        return {
            **trainer,
            "callbacks": [*callbacks, Bar(refresh_rate=10)] if bar else callbacks,
            "logger": (writes and make_logger(run)) if trainer["logger"] in (None, True) else trainer["logger"],
            "plugins": [*as_list(trainer["plugins"]), *make_plugins(run, trainer["sync_batchnorm"])],
            "profiler": trainer["profiler"] or Unprofiled(),
            "enable_checkpointing": keeps,
            "enable_progress_bar": bar or (drawn and trainer["enable_progress_bar"]),
        }

    def check_trainer(self) -> None:
        """Refuse what Lightning 2.6 would not end with, processes that were not started, and what cannot be resumed."""
        now, trainer, (processes, machines) = self.config, self.trainer, launched()
        wanted, endless = trainer.world_size, trainer.max_epochs == trainer.max_steps == -1
        for name in ("check_val_every_n_epoch", "accumulate_grad_batches", "val_check_interval"):
            value = now[f"trainer.{name}"]  # a time would be another step on a resumed run
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise UserError(f"trainer.{name} must be a positive number, got {value}")
        if endless and (now["model.schedule"] != "constant" or now["model.warmup"]):
            raise UserError("trainer.max_epochs or trainer.max_steps must be positive for this model.schedule, got -1")
        before = len(self.run.loaded.get("processes", ()))  # 0 also where it is scored
        if before not in (0, wanted):
            self.lines += [f"processes: {before} -> {wanted} (the same batches, but the last bits may differ)"]
        if processes * machines not in (1, wanted):
            started = f"{processes} on each of {machines} machines were started; leave both out"
            raise UserError(f"trainer.devices and trainer.num_nodes ask for {wanted} processes in all, but {started}")
        if not isinstance(trainer.strategy, (ExactDDP, SingleDeviceStrategy)):
            raise UserError(f"trainer.strategy must be auto or ddp, got {now['trainer.strategy']}")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if processes * machines > 1 and not getattr(environment, "creates_processes_externally", True):
            raise UserError("Lightning 2.6 starts processes itself in a SLURM job named bash or interactive: rename it")

    def announce(self, trainer: Trainer, module: LightningModule) -> None:
        """Print what is trained, on which device and where to."""
        if self.watch:
            self.watch(self.run)
        sizes = {name: len(part) for name, part in trainer.datamodule.parts.items()}  # type: ignore[attr-defined]
        device = conditions(module.device)["hardware"]["device" if module.device.type == "cuda" else "processor"]
        parameters = sum(parameter.numel() for parameter in module.parameters())
        print_once(trainer, f"Images:     {sizes['train']:,} to train on, {sizes.get('val', 0):,} held out")
        print_once(trainer, f"Device:     {trainer.world_size} x {device}, for {parameters:,} parameters")
        print_once(trainer, f"The run:    {shown(self.run.folder) if self.run.folder else 'not kept'}")
        if self.run.folder and any(isinstance(logger, RunLogger) for logger in trainer.loggers):
            print_once(trainer, f"Look at it: tensorboard --logdir {quote(shown(self.run.folder.parent))}")

    def start(self) -> None:
        """Run the command; what Lightning and torch raise meanwhile becomes one of this project's errors."""
        try:
            self.fit() if self.command == "fit" else self.score()
        except SystemExit as stop:  # Lightning 2.6 turns KeyboardInterrupt into exit status 1
            raise stop.__context__ if isinstance(stop.__context__, KeyboardInterrupt) else stop  # noqa: B904
        except (UserError, TrainingFailed, Interrupted):
            raise
        except Exception as error:
            if reason := lost(error):
                keeper = callback_of(self.trainer, CheckpointKeeper)
                resume = resume_command(keeper.last_path if keeper else None)
                raise ProcessLost(f"another process of this run was lost ({reason}); {resume}") from error
            cause = error.__cause__ or error  # TensorBoardLogger 2.6 wraps an OSError in a ValueError
            modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
            lightnings = modules[-1].startswith("pytorch_lightning.")
            says = isinstance(error, (RuntimeError, ImportError, ValueError)) and lightnings
            says |= isinstance(cause, MisconfigurationException)
            if (self.run.started or self.run.continues) and (says or isinstance(cause, OSError)):
                raise TrainingFailed(f"training stopped: {one_line(cause)}; earlier checkpoints are intact") from error
            if says:
                raise UserError(one_line(error)) from error
            raise

    def fit(self) -> None:
        trainer, run = self.trainer, self.run
        # glibc's malloc maps each large block anew until one of nearly 32 MB was freed: a fifth of the first epoch
        torch.empty(31 * 2**20, dtype=torch.uint8)
        with hold(run, trainer):
            trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=run.checkpoint, weights_only=True)
        reason, longer = ended_by(trainer, self.config["trainer.max_time"])
        limits = [*longer, *["the patience of EarlyStopping"] * ("EarlyStopping" in reason)]
        finished = f"Nothing to train: this run has finished. To train longer, raise {' and '.join(limits)}."
        untrained = trainer.global_step == run.loaded.get("global_step")
        if untrained and run.claimed:
            run.started = False  # the new run's folder has nothing that is not its parent's
            raise UserError(finished)
        if not (run.started or run.continues):
            raise UserError("nothing to train: trainer.max_epochs, max_steps or limit_train_batches leaves no step")
        if trainer.is_global_zero and run.folder:
            print(f"stopped: {reason}\n" if reason else "", f"{finished}\n" if untrained else "", sep="", end="")
            self._print_summary(longer)

    def score(self) -> None:
        score, path = getattr(self.trainer, self.command), self.run.checkpoint
        with translate_restoring(path):
            scores = score(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        if not scores:
            raise UserError("no image to score: data.val_size or trainer.limit_val_batches or limit_test_batches is 0")

    def _print_summary(self, longer: dict[str, str]) -> None:
        """Print the result of a fit, and the commands for what comes next."""
        trainer, root = self.trainer, self.config["data.root"]
        progress: Any = callback_of(trainer, Progress)
        keeper, epochs, best = callback_of(trainer, CheckpointKeeper), trainer.current_epoch, ""
        seconds = progress.train_seconds + progress.validation_seconds
        if keeper and keeper.best and keeper.best_path:
            best = f"; best {words({keeper.best.monitor: keeper.best_values[keeper.best.monitor]})[0]}"
        print(f"\nTrained:    {epochs} epoch{'s' * (epochs != 1)}, {trainer.global_step} steps, {seconds:.1f} s{best}")
        if last := (keeper and keeper.last_path) or self.run.checkpoint:
            place = "" if root == "data" else f" --data.root {quote(root)}"
            tested = (keeper and keeper.best_path) or last
            flags = " ".join(f"--{name} {value}" for name, value in longer.items())
            print(f"Test it:    python -m {PROGRAM} test --ckpt_path {quote(shown(tested))}{place}")
            print(f"Train on:   python -m {PROGRAM} fit --ckpt_path {quote(shown(last))} {flags}")


def ended_by(trainer: Trainer, max_time: object) -> tuple[str, dict[str, str]]:
    """Return why a callback stopped a run, empty if none did, and with which settings it would be trained longer."""
    reason, longer, epochs, most = "a callback", {}, trainer.current_epoch, trainer.max_epochs or 0
    timer, stopping = callback_of(trainer, lightning.Timer), callback_of(trainer, lightning.EarlyStopping)
    if stopping and stopping.stopping_reason_message:
        reason = f"EarlyStopping: {stopping.stopping_reason_message.partition(' Signaling')[0]}"
    if timer and (timer.time_remaining() or 1) <= 0:  # `trainer.max_time` makes one, too
        reason = f"{'trainer.max_time' if max_time else 'the duration of the Timer'} is used up"
        seconds = math.ceil(2 * timer.time_elapsed())
        longer["trainer.max_time"] = f"{seconds // 86400:02}:{strftime('%H:%M:%S', gmtime(seconds))}"
    if 0 <= trainer.max_steps <= trainer.global_step:
        longer["trainer.max_steps"] = str(2 * max(1, trainer.global_step))
    if not longer or 0 <= most <= epochs:
        longer["trainer.max_epochs"] = str(2 * max(1, epochs, most))
    return reason if trainer.should_stop else "", longer


@contextmanager
def quiet() -> Iterator[None]:
    """Keep advertisements, and warnings about what is meant, off the console."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks", "profilers"):  # which print what a user asked for
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.INFO)
    # TensorBoard 2.21 writes in a thread, which prints its failure; whoever writes next gets the same exception
    threading.excepthook = lambda _: isinstance(_.exc_value, OSError) or threading.__excepthook__(_)
    # Lightning 2.6 sets variables when it launches: the next run of this process would wait for others in vain
    with warnings.catch_warnings(), patch.dict(os.environ):
        warnings.filterwarnings("ignore", f".*({'|'.join(MEANT)})")
        yield
