"""fit, validate, test and predict on LightningCLI."""

from __future__ import annotations

import errno
import json
import logging
import re
import shlex
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse.typing import restricted_number_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    RichModelSummary,
    RichProgressBar,
)
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry

from lit_mnist import runs
from lit_mnist.batchnorm import SynchronizedBatchNorm
from lit_mnist.checkpoint import (
    BestCheckpoint,
    CheckpointWriteError,
    DurableCheckpointIO,
    Interrupted,
    LastCheckpoint,
    find_and_read,
)
from lit_mnist.cli import COMMANDS
from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.data.mnist import DataError
from lit_mnist.module import LitMNIST
from lit_mnist.predictions import PredictionWriter
from lit_mnist.processes import ExactDDP, Processes, environment_kept, launched, lost
from lit_mnist.report import ProcessLost, RunReport, TrainingError, conditions, interactive
from lit_mnist.report import callbacks as callbacks_of
from lit_mnist.resume import ExactResume, RunStart, differences, only_process, stop_on_signals
from lit_mnist.runs import RunError, shortened
from lit_mnist.state import (
    ENTRIES,
    TRAINING_ENTRIES,
    StateError,
    check_entries,
    check_weights,
    mapping,
    not_restorable,
    restoring,
)
from lit_mnist.tensorboard import TEST_SUFFIX, Board, RunLogger

__all__ = ["CommandError", "Interrupted", "ProcessLost", "TrainingError", "run"]

DEFAULT_EPOCHS = 6
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
DEFAULT_SEED = 1
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class CommandError(ValueError):
    """Input that cannot be used, told in words for the user."""


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse 4.53 prints the usage of some hundred flags and a list of Python's types; here it is one line
        raise CommandError(shortened(one_line(message), 300)) from ex


def one_line(message: str) -> str:
    """jsonargparse's account of a value that does not fit, as `KEY: expected A or B, got VALUE`."""
    message = " ".join(message.split())
    key = re.search(r'Parser key "([^"]+)":', message)
    expected = re.findall(r"Expected an? (.+?)(?=\. Got value:| - Expected| Given value|$)", message)
    value = re.search(r"(?:Got|Given) value: (.+)$", message)
    if not (key and expected and value):
        return message
    names = [re.sub(r"typing\.Literal\[(.+)\]|<class '(.+)'>", r"\1\2", name) for name in expected]
    allowed = " or ".join("null" if name == "NoneType" else name for name in names)
    return f"{key[1]}: expected {allowed}, got {value[1]}"


class MNISTCLI(LightningCLI):
    """LightningCLI for the one model and the one data set of this project.

    `--ckpt_path` takes best, last or a path for each command. The checkpoint's settings, and for `fit` those of its
    run's trainer, become the defaults that configuration files and flags go over.
    """

    def __init__(self, args: list[str]) -> None:
        self.command = args[0]
        self.checkpoint: Path | None = None
        self.loaded: dict[str, Any] = {}
        self.origin: Path | None = None  # the run that the checkpoint belongs to
        self.continues = False  # whether the run goes on in its own folder
        self.changes: list[str] = []
        self.last: LastCheckpoint | None = None
        processes, machines = launched()
        super().__init__(
            LitMNIST,
            MNISTDataModule,
            seed_everything_default=DEFAULT_SEED,
            trainer_defaults={
                "max_epochs": DEFAULT_EPOCHS,
                "num_sanity_val_steps": 0,
                "devices": processes,
                "num_nodes": machines,
                "sync_batchnorm": True,  # else another number of processes is another training
            },
            parser_class=Parser,
            auto_configure_optimizers=False,
            # it would put `_instantiator`, code to call, into every checkpoint
            load_from_checkpoint_support=False,
            save_config_callback=None,  # RunStart does that, later
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Parsers are built for the command that was asked for alone: each costs a part of a second.
        skip = {"weights_only", "return_predictions", "verbose"}
        return {self.command: LightningCLI.subcommands()[self.command] | skip}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Lightning 2.6 allows true, a seed drawn at random; a run here can always be repeated
        parser.add_argument("--seed_everything", type=Seed, default=DEFAULT_SEED, help="Seed of everything random.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # int: a checkpoint must not name jsonargparse's type, or it would not load with weights_only=True
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data", "model.classes", compute_fn=self._classes, apply_on="instantiate")
        parser.add_class_arguments(Processes, "processes")
        if self.command == "fit":
            parser.add_class_arguments(LastCheckpoint, "checkpoint")
        if self.command in ("fit", "test"):
            parser.add_class_arguments(Board, "board")

    def _classes(self, data: MNISTDataModule) -> int:
        # a trained network has those of the data that it was trained on, which predict may do without
        return int(self.loaded["hyper_parameters"].get("classes", 10)) if self.loaded else data.classes

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.args = args
        args, images = taken(args, "--data.images")
        configs = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
        configs += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
        for config in configs:  # a shell's <(...) is one too, which somebody writes to
            if len(config) < 256 and Path(config).is_fifo() and not config.startswith(("/dev/fd/", "/proc/")):
                raise CommandError(f"--config {shortened(config)}: that file is a named pipe")
        self.recipe = "+".join(Path(config).stem for config in configs) or "default"
        try:
            self.config = parser.parse_args(args)
        except (CommandError, UnicodeDecodeError, RecursionError) as error:  # jsonargparse does not say which file
            raise CommandError(
                f"{error} (in {' or '.join([*configs, 'a flag'])})" if configs else str(error)
            ) from error
        given = self.config[self.command]
        wanted = given.get("ckpt_path")
        if wanted is None and self.command != "fit":
            raise CommandError(f"{self.command} needs --ckpt_path best, last or the path of a checkpoint")
        if wanted is not None:
            folder = root_folder(given.get("trainer.default_root_dir")) / "lightning_logs"
            self.checkpoint, self.loaded = find_and_read(str(wanted), folder)
            self.origin = runs.run_folder(self.checkpoint)
            if self.command == "fit":
                self._check_training_state()
            before = self._settings_of_checkpoint(self.loaded)
            defaults = self._parser(self.command).get_defaults()
            before = {key: value for key, value in before.items() if key in defaults}
            # the run's settings become this command's defaults, and everything is parsed again over them
            self._parser(self.command).set_defaults(before)
            self.config = parser.parse_args(args)
            self.config[self.command]["ckpt_path"] = str(self.checkpoint)
            try:  # jsonargparse 4.53 takes defaults as they are
                self._parser(self.command).validate(self.config[self.command], skip_unset=False)
            except (TypeError, ValueError, KeyError) as error:
                raise CommandError(f"--ckpt_path {self.checkpoint}: {shortened(one_line(str(error)), 300)}") from error
            if self.command == "validate":
                for key in ("data.name", "data.val_size", "data.split_seed"):
                    if before.get(key) != self.config["validate"][key]:
                        raise CommandError(
                            f"{key} was {before.get(key)} in this run; with {self.config['validate'][key]} images that"
                            " were not held out would be scored"
                        )
            if self.command == "fit":
                progress = self.loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]
                self.changes += differences(before, self.config["fit"], not progress["is_last_batch"])
        if images is not None:
            self.config[self.command]["data.images"] = images
        check_trainer(self.config[self.command])

    def _check_training_state(self) -> None:
        assert self.checkpoint
        if not {"loops", "optimizer_states", "callbacks"} <= self.loaded.keys():
            raise CommandError(f"--ckpt_path {self.checkpoint}: it holds weights alone, no state to resume")
        try:
            check_entries(self.loaded, TRAINING_ENTRIES)
            progress = self.loaded["loops"]
            for name in ("fit_loop", "epoch_loop.batch_progress"):
                progress = mapping(progress.get(name), f"loops/{name}")
            check_entries(progress, {"is_last_batch": bool})
        except StateError as error:
            raise not_restorable(self.checkpoint, error) from error
        last = runs.newest(self.origin) if self.origin else None
        self.continues = last is not None and last.resolve() == self.checkpoint.resolve()
        if not self.continues:
            self.changes.append(
                "A new run: that checkpoint is not the newest state of its run, which stays as it is"
                if self.origin
                else "A new run: that checkpoint lies in no run's folder"
            )

    def _settings_of_checkpoint(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = runs.plain_settings("model", checkpoint["hyper_parameters"])
        settings = {"model.network": "digitnet", "data.name": "mnist"} | settings
        settings |= runs.plain_settings("data", checkpoint["datamodule_hyper_parameters"])
        settings["seed_everything"] = settings.pop("model.seed", DEFAULT_SEED)
        # where data lies and whether it may be fetched is the machine's matter
        for key in ("data.seed", "data.root", "data.download"):
            settings.pop(key, None)
        if self.command == "fit" and isinstance(checkpoint.get("settings"), dict):
            settings |= runs.run_settings(checkpoint["settings"])
        return settings

    def _parse_ckpt_path(self) -> None:
        """LightningCLI 2.6 lays the checkpoint's settings over the user's flags; `parse_arguments` does it the
        other way round, for the data as well."""

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            if self.loaded:
                self._check_weights()
            super()._run_subcommand(subcommand)
        except SystemExit as stop:  # Lightning 2.6 turns KeyboardInterrupt into exit status 1
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except (RunError, CommandError, TrainingError, DataError, CheckpointWriteError, MisconfigurationException):
            raise
        except Interrupted as stop:
            stop.flags = self._data_flags()
            raise
        except Exception as error:
            if (reason := lost(error)) and not torch.distributed.is_initialized():
                raise ProcessLost(f"the processes could not be joined: {reason}") from error
            if reason:
                last = self.last.path if self.last else None
                go_on = f"; to go on: python -m lit_mnist fit --ckpt_path {last}{self._data_flags()}" if last else ""
                raise ProcessLost(f"another process of this run was lost ({reason}){go_on}") from error
            if self.checkpoint and restoring(error):
                raise not_restorable(self.checkpoint, error) from error
            if isinstance(error, ImportError) and innermost(error).startswith("pytorch_lightning."):
                raise CommandError(shortened(str(error), 300)) from error  # what a callback needs
            if not (subcommand == "fit" and self.report.trained):
                raise
            if isinstance(error, OSError):
                raise TrainingError(stopped(error)) from error
            if isinstance(error, RuntimeError) and innermost(error).startswith("pytorch_lightning."):
                # what only the training can show, such as a callback that asks for a metric that there is not
                raise TrainingError(f"training stopped: {shortened(str(error), 300)}") from error
            raise

    def _data_flags(self) -> str:
        """What to add to a command that takes this one up: where data lies is in no checkpoint."""
        root = self.datamodule.root
        return "" if root == "data" else f" --data.root {shlex.quote(root)}"

    def _check_weights(self) -> None:
        try:
            check_weights(self.model, self.loaded["state_dict"])
        except StateError as error:
            layers = self.config[self.command]["model.layers"]
            raise CommandError(
                f"--ckpt_path {self.checkpoint}: its weights do not fit the network of model.layers: {layers} ({error})"
            ) from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            # a DataError from a link comes wrapped in jsonargparse's words
            reason = error.__cause__ if isinstance(error.__cause__, DataError) else error
            raise CommandError(shortened(" ".join(str(reason).split()), 300)) from error
        if self.datamodule.images and self.command != "predict":
            raise CommandError(f"data.images is for predict alone, got {self.datamodule.images}")
        self._check_processes()
        for callback in callbacks_of(self.trainer):  # they train in advance, and change the run's settings then
            if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
                raise CommandError(f"trainer.callbacks must have no {type(callback).__name__}: set the value it found")
        if self.checkpoint and self.trainer.is_global_zero:
            print("\n".join([f"Checkpoint: {self.checkpoint}", *self.changes]), flush=True)
        if self.command == "fit" and self.model.needs_total_steps and not has_end(self.config["fit"]):
            raise CommandError(
                "trainer.max_epochs must be a positive number, or trainer.max_steps, for this model.schedule and"
                " model.warmup; without an end only constant and 0 make sense"
            )

    def _check_processes(self) -> None:
        asked, (processes, machines) = self.trainer.world_size, launched()
        before = self.loaded.get("processes", 1)
        if self.command == "fit" and self.checkpoint and before != asked:
            self.changes.append(f"processes: {before} -> {asked} (the same batches, but the last bits may differ)")
        if processes * machines not in (1, asked):
            raise CommandError(
                f"trainer.devices and trainer.num_nodes ask for {asked} processes in all, but {processes} on each of"
                f" {machines} machines were started; leave both out, and the number is taken over"
            )
        if not isinstance(self.trainer.strategy, (ExactDDP, SingleDeviceStrategy)):
            raise CommandError(
                f"trainer.strategy must be auto or ddp, got {self.config_init[self.command]['trainer']['strategy']}"
            )
        if not isinstance(self.trainer.strategy, ExactDDP):
            return
        if processes * machines > 1 and not self.trainer.strategy.started_outside:
            raise CommandError(
                "from SLURM's jobs of the name bash or interactive Lightning takes no processes; give another name:"
                " srun --job-name digits"
            )
        batch_size = self.datamodule.hparams["batch_size"]
        if batch_size < asked:
            raise CommandError(f"data.batch_size must be at least the number of processes, {asked}, got {batch_size}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.command]["trainer"]
        if settings["logger"] == []:
            settings["logger"] = False  # as Lightning takes it
        StrategyRegistry.register(
            "ddp",  # which Lightning chooses for more than one process
            ExactDDP,
            override=True,
            waiting=self.config_init[self.command]["processes"].timeout,
            synchronized=settings["sync_batchnorm"],
            start_method="popen",
        )
        # where this command's files go: a new run's folder is not known yet
        run = self.origin if self.continues or self.command != "fit" else None
        if settings["logger"] in (None, True):
            if settings["fast_dev_run"] or self.command in ("validate", "predict"):
                kwargs["logger"] = False
            elif run:
                # a resumed run goes on in its own folder, and a test's result goes where the run lies
                suffix = TEST_SUFFIX if self.command == "test" else ""
                kwargs["logger"] = RunLogger(
                    run.parent, name="", version=run.name, default_hp_metric=False, filename_suffix=suffix
                )
                if self.command == "test":
                    kwargs["logger"].tested_step = self.loaded["global_step"]
            elif self.command == "fit":
                folder = root_folder(settings["default_root_dir"])
                kwargs["logger"] = RunLogger(folder, default_hp_metric=False)
            else:
                kwargs["logger"] = False
        parent = f"{self.origin.name}/{self.checkpoint.name}" if self.checkpoint and self.origin and not run else ""
        self.report = RunReport(run, self.checkpoint, self.recipe, shlex.join(self.args), parent)
        callbacks: list[Callback] = [self.report]
        if self.command == "fit" and kwargs.get("logger", settings["logger"]) is not False:
            self.config["fit"]["ckpt_path"] = None  # config.yaml repeats the run, it does not resume it
            config = self._parser("fit").dump(self.config["fit"], skip_none=False)
            written = self.checkpoint.stat().st_mtime_ns if self.checkpoint else 0
            callbacks.insert(0, RunStart(config, self.origin, self.loaded, written))
        if self.command in ("fit", "test"):
            board: Board = self.config_init[self.command]["board"]
            if not self.origin:  # a resumed run has its texts
                board.texts = {
                    "command": f"    python -m lit_mnist {shlex.join(self.args)}",
                    "conditions": f"    {json.dumps(conditions(torch.device('cpu')), indent=4)}".replace(
                        "\n", "\n    "
                    ),
                }
            callbacks.append(board)
        if self.command == "fit" and kwargs.get("logger", settings["logger"]) is not False:
            callbacks.append(ExactResume(runs.run_settings(dict(self.config["fit"].items()))))
            if settings["enable_checkpointing"] is not False:
                if self.datamodule.hparams["val_size"] > 0:
                    callbacks.append(BestCheckpoint(self.origin / "checkpoints" if self.origin else None))
                self.last = self.config_init["fit"]["checkpoint"]
                callbacks.append(self.last)
        elif settings["enable_checkpointing"] is None:
            kwargs["enable_checkpointing"] = False  # without a folder of the run's own they could hit another's
        if self.command == "fit" and isinstance(kwargs.get("logger"), RunLogger):
            recipe = {"recipe": runs.section(self.loaded.get("callbacks"), "RunReport").get("recipe", self.recipe)}
            kwargs["logger"].settings = recipe | {k: v for k, v in settings.items() if k in runs.TRAINER_SETTINGS}
        if self.command == "predict":
            assert self.checkpoint
            self.writer = PredictionWriter(run or self.checkpoint.parent, self.checkpoint.stem)
            callbacks.append(self.writer)
        if settings["enable_progress_bar"] is not False and interactive():
            callbacks.append(RichProgressBar(refresh_rate=10))
        else:
            kwargs["enable_progress_bar"] = False
        if settings["profiler"] is None:
            kwargs["profiler"] = Unprofiled()
        if self.command == "fit" and settings["enable_model_summary"] is not False:
            callbacks.append(RichModelSummary(max_depth=1))
        if self.command != "fit":
            kwargs["enable_model_summary"] = False
        plugins = settings["plugins"] or []
        # what was read is used: until the trainer would read it, a run in progress may have removed the file
        state = self.loaded if self.command == "fit" else {key: self.loaded[key] for key in ENTRIES if self.loaded}
        loader = DurableCheckpointIO({str(self.checkpoint): state} if self.checkpoint else {})
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), loader]
        if settings["sync_batchnorm"]:
            kwargs["plugins"].append(SynchronizedBatchNorm())
        self.trainer_defaults = {"callbacks": callbacks}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:  # Lightning checks with whatever comes: a package that is missing, SLURM's variables
            raise CommandError(shortened(" ".join(str(error).split()), 300)) from error
        # before a user's own, which may log as soon as the training starts
        callbacks_of(trainer).sort(key=lambda callback: not isinstance(callback, RunStart))
        return trainer

    # LightningCLI calls these four in place of the trainer's methods: checkpoints load with weights_only=True.

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        with ExitStack() as held:
            if self.trainer.is_global_zero:
                datamodule.prepare_data()  # Lightning does so too, but claims the run's folder first: no data, no run
                if isinstance(logger := self.trainer.logger, RunLogger):
                    run = Path(logger.log_dir)
                    held.callback(self._discard_unused, logger)
                    held.enter_context(only_process(run))
                    if self.checkpoint and not self.checkpoint.is_file():
                        raise CommandError(f"--ckpt_path {self.checkpoint}: another process went on from it just now")
            held.enter_context(stop_on_signals(self.last))
            self.trainer.fit(model, datamodule=datamodule, weights_only=True, **kwargs)

    def _discard_unused(self, logger: RunLogger) -> None:
        if logger.claimed and not self.report.trained:
            runs.discard(*logger.claimed)

    def after_fit(self) -> None:
        if not (self.report.trained or self.continues):
            raise CommandError(
                "nothing to train: trainer.max_epochs, trainer.max_steps and trainer.limit_train_batches leave no step"
            )
        self.report.print_summary(self.trainer, self._data_flags())

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        if not datamodule.hparams["val_size"]:
            raise CommandError("validate needs held-out images, and data.val_size is 0")
        if not self.trainer.validate(model, datamodule=datamodule, weights_only=True, verbose=False, **kwargs):
            raise CommandError("trainer.limit_val_batches leaves no image to score")

    def test(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        if not self.trainer.test(model, datamodule=datamodule, weights_only=True, verbose=False, **kwargs):
            raise CommandError("trainer.limit_test_batches leaves no image to score")

    def predict(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        self.trainer.predict(model, datamodule=datamodule, weights_only=True, return_predictions=False, **kwargs)
        assert isinstance(datamodule, MNISTDataModule)
        self.writer.join()
        if not self.trainer.is_global_zero:
            return
        if not datamodule.images:
            self.writer.write_test_set()
        elif not self.writer.write_pictures(datamodule.pictures):
            raise CommandError("data.images: none of the files shows a digit")


def has_end(config: Any) -> bool:
    return (config["trainer.max_epochs"] or -1) > 0 or config["trainer.max_steps"] > 0  # checked by check_trainer


def check_trainer(config: Any) -> None:
    """Check the trainer's settings that Lightning 2.6 takes and then trips over, or trains for ever with.

    Raises:
        CommandError: one is out of its range.
    """
    least_values = {"max_epochs": 1, "max_steps": 1, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 1}
    for name, least in {**least_values, "log_every_n_steps": 0}.items():
        value = config[f"trainer.{name}"]
        endless = name.startswith("max_")
        if isinstance(value, str) or (value is not None and value < least and not (endless and value == -1)):
            raise CommandError(f"trainer.{name} must be a number from {least}{' or -1' * endless}, got {value}")
    interval = config["trainer.val_check_interval"]
    if type(interval) is int and interval < 1:
        raise CommandError(
            f"trainer.val_check_interval must be a share of an epoch or at least 1 batch, got {interval}"
        )
    if config["trainer.max_epochs"] is None and not has_end(config) and config["trainer.max_time"] is None:
        raise CommandError("trainer.max_epochs must be a positive number, or trainer.max_steps or trainer.max_time")
    if config["trainer.profiler"] == "xla":
        raise CommandError("trainer.profiler must be simple, advanced, pytorch or a class, got xla, which is for TPUs")
    for key, value in config.items():
        if key.startswith("trainer.") and type(value) in (int, float) and not abs(value) < 2**31:
            raise CommandError(f"{key} must be less than {2**31}, got {value}")


class Unprofiled(PassThroughProfiler):
    """PassThroughProfiler of Lightning 2.6 runs a generator for each of some sixty hooks of a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> nullcontext[None]:  # type: ignore[override]
        return self.nothing


def taken(args: list[str], flag: str) -> tuple[list[str], list[str] | None]:
    """Split off all values behind a flag, however they are given: `--flag a b`, `--flag=a`, and again.

    jsonargparse 4.53 takes a list as `--flag '["a","b"]'`, and of names in YAML's character set alone.
    """
    others: list[str] = []
    values: list[str] = []
    taking = found = False
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            taking = name == flag
            found = found or taking
            if taking:
                values += [value] if equals else []
                continue
        (values if taking else others).append(arg)
    return others, values if found else None


def stopped(error: OSError) -> str:
    return f"training stopped: {failed_file(error)}; checkpoints written before are as they were"


def failed_file(error: OSError) -> str:
    unnamed = "the files for TensorBoard" if any("tensorboard." in name for name in modules(error)) else "a file"
    return f"{shortened(str(error.filename or unnamed))}: {error.strerror or error}"


def modules(error: BaseException) -> list[str]:
    """Those that an exception came through, the one that raised it last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]


def innermost(error: BaseException) -> str:
    return modules(error)[-1]


def root_folder(default_root_dir: str | None) -> Path:
    return runs.expanded(default_root_dir or ".", "trainer.default_root_dir")


def run(args: list[str]) -> None:
    """Run the command `args[0]` with the flags that follow.

    Raises:
        CommandError: the input cannot be used.
        TrainingError: the training failed.
        SystemExit: from `--help` and `--print_config`.
    """
    assert args[0] in COMMANDS
    with quiet(), environment_kept():
        try:
            if args[0] == "export":
                from lit_mnist.export import main

                main(args[1:])
            else:
                MNISTCLI(args)
        except DataError as error:
            raise CommandError(str(error)) from error
        except (ValueError, MisconfigurationException) as error:  # this project's and Lightning's for what users set
            raise CommandError(" ".join(str(error).split())) from error
        except CheckpointWriteError as error:
            raise TrainingError(stopped(error)) from error
        except OSError as error:
            if error.errno in FULL:
                raise TrainingError(failed_file(error)) from error  # it has begun: the input was right
            raise CommandError(failed_file(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a user can do nothing about off the console: advertisements, and warnings about what is meant."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    hook, threading.excepthook = threading.excepthook, writer_failed
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # batches come from memory
            ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
            ".*smaller than the logging interval.*",
            ".*callbacks used to create the checkpoint need to be provided.*",  # only fit writes checkpoints
            ".*Total length of `.*` across ranks is zero.*",  # data.val_size is 0, or no picture shows a digit
            ".*You requested to overfit but.*",
            ".*is supported for historical reasons.*",
            ".*is not supported by the model summary.*",
            ".*infer the batch indices.*",  # predictions come in the order of the test set
            ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.15
            ".*broadcast_buffers. is deprecated.*",  # in torch 2.15; the new name is unknown to 2.10
            ".*on epoch level in distributed setting.*",  # the metrics are of all processes when they are logged
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            threading.excepthook = hook


def writer_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard 2.21 writes in a thread, which prints its failure; whoever writes next gets the same exception."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
