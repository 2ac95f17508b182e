"""fit, validate, test and predict on LightningCLI."""

from __future__ import annotations

import errno
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse.typing import restricted_number_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from lit_mnist.board import Board
from lit_mnist.cli import COMMANDS, fit
from lit_mnist.cli.console import quiet
from lit_mnist.cli.settings import DEFAULT_SEED, Parser, Settings, parse
from lit_mnist.cli.trainer import (
    AutoTrainer,
    Processes,
    check_network,
    check_processes,
    make_run,
    place_loggers,
    trainer_settings,
)
from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.exact.checkpoint_io import CheckpointWriteError
from lit_mnist.exact.checkpoints import BestSettings, LastCheckpoint, SaveSettings, callback_of
from lit_mnist.exact.console import shortened, shown
from lit_mnist.exact.ddp import environment_kept, launched, lost
from lit_mnist.exact.errors import Interrupted, ProcessLost, TrainingFailed, UserError
from lit_mnist.exact.run import Run
from lit_mnist.exact.state import not_restorable, restoring
from lit_mnist.module import LitMNIST

__all__ = ["MNISTCLI", "Interrupted", "ProcessLost", "TrainingFailed", "UserError", "translate_errors"]

DEFAULT_EPOCHS = 4
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class MNISTCLI(LightningCLI):
    """LightningCLI for the one model and the one data module of this project.

    `--ckpt_path` takes best, last or a path for each command. The settings of the checkpoint's run become the defaults
    that configuration files and flags go over.
    """

    settings: Settings
    run = Run()
    watch: Sequence[Callback] = ()  # callbacks of whoever runs this command, before the user's own

    def __init__(self, args: list[str]) -> None:
        self.command = args[0]
        processes, machines = launched()
        try:
            super().__init__(
                LitMNIST,
                MNISTDataModule,
                trainer_class=AutoTrainer,
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
        finally:
            self.run.discard_unused()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Parsers are built for the command that was asked for alone: each costs a part of a second.
        skip = {"weights_only", "return_predictions", "verbose"}
        return {self.command: LightningCLI.subcommands()[self.command] | skip}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Lightning 2.6 allows true, a seed drawn at random; a run here can always be repeated
        parser.add_argument("--seed_everything", type=Seed, default=DEFAULT_SEED, help="Seed of everything random.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # what a user looks for first stands first in `--help`
        parser.add_lightning_class_args(LitMNIST, "model")
        parser.add_lightning_class_args(MNISTDataModule, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.own_parser = parser
        parser.usage = f"python -m lit_mnist {self.command} [options]"
        parser.description = COMMANDS[self.command][:1].upper() + COMMANDS[self.command][1:] + "."
        # int: a checkpoint must not name jsonargparse's type, or it would not load with weights_only=True
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data", "model.classes", compute_fn=self._classes, apply_on="instantiate")
        parser.add_class_arguments(Processes, "processes")
        if self.command == "fit":
            parser.add_class_arguments(SaveSettings, "checkpoint")
            parser.add_class_arguments(BestSettings, "best")
        if self.command in ("fit", "test"):
            parser.add_class_arguments(Board, "board")

    def _classes(self, data: MNISTDataModule) -> int:
        # a trained network has those of the data that it was trained on, which predict may do without
        loaded = self.settings.loaded
        return int(loaded["hyper_parameters"].get("classes", 10)) if loaded else data.classes

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.settings = parse(parser, self.own_parser, args)
        self.config = self.settings.config

    def before_instantiate_classes(self) -> None:
        self.config_text = self.own_parser.dump(self.settings.own, skip_none=False) if self.command == "fit" else ""
        self.run = make_run(self.settings)
        place_loggers(self.settings, self.run)

    def instantiate_classes(self) -> None:
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
            made = self.config_init[self.command]
            self.datamodule, self.model = made["data"], made["model"]
            self.trainer = self.trainer_class(
                **trainer_settings(self.settings, self.run, made, self.config_text, self.watch)
            )
        except Exception as error:  # Lightning checks with whatever comes: a package that is missing, SLURM's variables
            # a UserError from a link comes wrapped in jsonargparse's words
            reason = error.__cause__ if isinstance(error.__cause__, UserError) else error
            raise UserError(shortened(" ".join(str(reason).split()), 300)) from reason

    def after_instantiate_classes(self) -> None:
        settings = self.settings
        if not self.trainer.is_global_zero:
            self.run.discard_unused()  # only the first makes a folder; this one did not know that it is not
        check_processes(settings, self.trainer, self.datamodule)
        if settings.precision and self.trainer.is_global_zero:
            print(settings.precision, flush=True)
        if settings.checkpoint:
            if self.trainer.is_global_zero:
                print("\n".join([f"Checkpoint: {settings.checkpoint}", *settings.changes]), flush=True)
            check_network(settings, self.model)

    # LightningCLI calls these four in place of the trainer's methods: checkpoints load with weights_only=True.

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        with failures(self):
            fit.fit(self.trainer, self.run, model, datamodule, data_flags(datamodule))

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        if not datamodule.hparams["val_size"]:
            raise UserError("validate needs held-out images, and data.val_size is 0")
        self._score("validate", datamodule=datamodule, model=model, verbose=False)

    def test(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        self._score("test", datamodule=datamodule, model=model, verbose=False)

    def _score(self, name: str, **kwargs: Any) -> None:
        with failures(self):
            scores = getattr(self.trainer, name)(ckpt_path=self.settings.checkpoint, weights_only=True, **kwargs)
        if not scores:
            raise UserError(f"trainer.limit_{name.replace('validate', 'val')}_batches leaves no image to score")


def data_flags(data: Any) -> str:
    """What to add to a command that takes this one up: where data lies is in no checkpoint."""
    return "" if data.root == "data" else f" --data.root {shlex.quote(data.root)}"


@contextmanager
def failures(cli: MNISTCLI) -> Iterator[None]:
    """Bring what Lightning and torch raise while a trainer runs to this project's few kinds of errors."""
    flags = data_flags(cli.datamodule)
    try:
        yield
    except SystemExit as stop:  # Lightning 2.6 turns KeyboardInterrupt into exit status 1
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        if cli.run.started:  # what only the training can show, such as a score that the module does not log
            raise TrainingFailed(f"training stopped: {shortened(' '.join(str(error).split()), 300)}") from error
        raise
    except (UserError, TrainingFailed, CheckpointWriteError):
        raise
    except Interrupted as stop:
        stop.flags = flags
        raise
    except Exception as error:
        if (reason := lost(error)) and not torch.distributed.is_initialized():
            raise ProcessLost(f"the processes could not be joined: {reason}") from error
        if reason:
            last = callback_of(cli.trainer, LastCheckpoint)
            path = shown(last.path) if last and last.path else ""
            resume = f"; to resume: python -m lit_mnist fit --ckpt_path {path}{flags}" if path else ""
            raise ProcessLost(f"another process of this run was lost ({reason}){resume}") from error
        if cli.settings.checkpoint and restoring(error):
            raise not_restorable(cli.settings.checkpoint, error) from error
        if isinstance(error, ImportError) and innermost(error).startswith("pytorch_lightning."):
            raise UserError(shortened(str(error), 300)) from error  # what a callback needs
        if not cli.run.started:
            raise
        cause = error.__cause__ if isinstance(error, ValueError) else error  # TensorBoardLogger 2.6 wraps it
        if isinstance(cause, OSError):
            raise TrainingFailed(stopped(cause)) from error
        if isinstance(error, ValueError):  # of the experiment's own code: with the place where it was raised
            raise RuntimeError(f"the training failed: {error}") from error
        if isinstance(error, RuntimeError) and innermost(error).startswith("pytorch_lightning."):
            # what only the training can show, such as a callback that asks for a metric that there is not
            raise TrainingFailed(f"training stopped: {shortened(str(error), 300)}") from error
        raise


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


@contextmanager
def translate_errors() -> Iterator[None]:
    """Bring whatever a command raises to `UserError`, for input that cannot be used, and `TrainingFailed`."""
    with quiet(), environment_kept():
        try:
            yield
        except UserError as error:
            raise UserError(str(error)) from error
        except (ValueError, MisconfigurationException) as error:  # this project's and Lightning's for what users set
            raise UserError(" ".join(str(error).split())) from error
        except CheckpointWriteError as error:
            raise TrainingFailed(stopped(error)) from error
        except OSError as error:
            if error.errno in FULL:
                raise TrainingFailed(failed_file(error)) from error  # it has begun: the input was right
            raise UserError(failed_file(error)) from error
