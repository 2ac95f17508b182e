"""fit, validate, test and predict on LightningCLI."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse.typing import restricted_number_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichModelSummary, RichProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from lit_mnist import runs
from lit_mnist.cli import COMMANDS
from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.data.mnist import DataError
from lit_mnist.module import LitMNIST
from lit_mnist.report import PredictionWriter, RunReport, TrainingError, interactive
from lit_mnist.tensorboard import RunLogger

__all__ = ["CommandError", "TrainingError", "run"]

DEFAULT_EPOCHS = 8
DEFAULT_SEED = 1
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class CommandError(ValueError):
    """Input that cannot be used, told in words for the user."""


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse 4.53 prints the usage of some hundred flags and a list of Python's types; here it is one line
        raise CommandError(one_line(message)) from ex


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


class Checkpoints(ModelCheckpoint):
    """Keeps one checkpoint, whose name tells epoch and validation accuracy: the best by it, or the last one.

    These are two callbacks because ModelCheckpoint 2.6 with `save_last` writes the last checkpoint only where it has
    just written a best one.

    Args:
        keep: `best` (written after validation) or `last` (at the end of each training epoch).
        validated: whether the run has a validation set; without one there is no accuracy to tell.
        resumed: whether this goes on with a run in its own folder.
    """

    def __init__(self, keep: Literal["best", "last"], validated: bool, resumed: bool) -> None:
        super().__init__(
            filename=f"{keep}-epoch={{epoch:02d}}" + ("-accuracy={val/accuracy:.4f}" if validated else ""),
            monitor="val/accuracy" if keep == "best" else None,
            mode="max",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=keep == "last",
            enable_version_counter=not resumed,  # a resumed run that comes to the same name means the same file
        )
        self.resumed = resumed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # ModelCheckpoint 2.6 forgets the best score, but not the best path, when the folder is written in another
        # way: relative or absolute, or moved. Here the run decides: its own folder, its own best.
        if not (self.resumed and self.dirpath):
            return
        here = Path(self.dirpath)
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: str(here / Path(state_dict[key]).name) if state_dict[key] else "" for key in paths}
        best_k_models = {str(here / Path(path).name): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best_k_models, "dirpath": self.dirpath})

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # ModelCheckpoint 2.6 keeps the file that a run was resumed from, as a second "last" for ever
        return previous != current and Path(previous).parent == Path(current).parent


class MNISTCLI(LightningCLI):
    """LightningCLI for the one model and the one data set of this project.

    `--ckpt_path` takes best, last or a path for each command. The checkpoint's settings, and for `fit` those of its
    run's trainer, become the defaults that configuration files and flags go over.
    """

    def __init__(self, args: list[str]) -> None:
        self.command = args[0]
        self.checkpoint: Path | None = None
        self.checkpoint_step = 0
        super().__init__(
            LitMNIST,
            MNISTDataModule,
            seed_everything_default=DEFAULT_SEED,
            trainer_defaults={"max_epochs": DEFAULT_EPOCHS, "num_sanity_val_steps": 0},
            parser_class=Parser,
            auto_configure_optimizers=False,
            # it would put `_instantiator`, code to call, into every checkpoint
            load_from_checkpoint_support=False,
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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        configs = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
        configs += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
        try:
            self.config = parser.parse_args(args)
        except CommandError as error:  # jsonargparse does not say which file
            raise CommandError(
                f"{error} (in {' or '.join([*configs, 'a flag'])})" if configs else str(error)
            ) from error
        given = self.config[self.command]
        wanted = given.get("ckpt_path")
        if wanted is None and self.command != "fit":
            raise CommandError(f"{self.command} needs --ckpt_path best, last or the path of a checkpoint")
        if wanted is not None:
            root = given.get("trainer.default_root_dir") or "."
            self.checkpoint = runs.find_checkpoint(str(wanted), Path(root) / "lightning_logs")
            self._take_over(self._parser(self.command), self.checkpoint)
            self.config = parser.parse_args(args)  # again, now over the checkpoint's settings
            self.config[self.command]["ckpt_path"] = str(self.checkpoint)

    def _take_over(self, parser: LightningArgumentParser, path: Path) -> None:
        """Make the settings that a checkpoint was trained with the defaults of this command."""
        checkpoint = runs.read_checkpoint(path)
        self.checkpoint_step = int(checkpoint.get("global_step", 0))
        settings = runs.plain_settings("model", checkpoint["hyper_parameters"])
        settings |= runs.plain_settings("data", checkpoint["datamodule_hyper_parameters"])
        settings["seed_everything"] = settings.pop("model.seed", DEFAULT_SEED)
        settings.pop("data.seed", None)
        run = runs.run_folder(path)
        if self.command == "fit" and run:
            settings |= runs.trainer_settings(run)
        known = parser.get_defaults()
        try:
            parser.set_defaults({key: value for key, value in settings.items() if key in known})
        except (TypeError, ValueError, KeyError) as error:
            raise CommandError(f"--ckpt_path {path}: its settings do not fit this version ({error})") from error

    def _parse_ckpt_path(self) -> None:
        """LightningCLI 2.6 lays the checkpoint's settings over the user's flags; `parse_arguments` does it the
        other way round, for the data as well."""

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:  # torch's type for weights of another shape or name
            if "loading state_dict" not in str(error):
                raise
            raise CommandError(
                f"--ckpt_path {self.checkpoint}: its weights do not fit the network of model.layers:"
                f" {self.config[subcommand]['model.layers']}"
            ) from error

    def before_instantiate_classes(self) -> None:
        if self.checkpoint:
            print(f"Checkpoint: {self.checkpoint}", flush=True)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise CommandError(" ".join(str(error).split())) from error
        if (
            self.command == "fit"
            and self.model.needs_total_steps
            and self.trainer.max_epochs == -1 == self.trainer.max_steps
        ):
            raise CommandError(
                "trainer.max_epochs must be a positive number, or trainer.max_steps, for this model.schedule and"
                " model.warmup; without an end only constant and 0 make sense"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.command]["trainer"]
        run = runs.run_folder(self.checkpoint) if self.checkpoint else None
        if settings["logger"] in (None, True):
            if run and self.command in ("fit", "test"):
                # a resumed run goes on in its own folder, and a test's result goes where the run lies
                kwargs["logger"] = RunLogger(run.parent.parent, version=run.name, default_hp_metric=False)
                kwargs["logger"].tested_step = self.checkpoint_step
            elif self.command == "fit" and not settings["fast_dev_run"]:
                kwargs["logger"] = RunLogger(settings["default_root_dir"] or ".", default_hp_metric=False)
            else:
                kwargs["logger"] = False
        callbacks: list[Callback] = [RunReport(run, self.checkpoint)]
        if self.command == "fit":
            validated = self.datamodule.hparams["val_size"] > 0
            if settings["enable_checkpointing"] is not False:
                if validated:
                    callbacks.append(Checkpoints("best", validated, resumed=run is not None))
                callbacks.append(Checkpoints("last", validated, resumed=run is not None))
        if self.command == "predict":
            assert self.checkpoint
            callbacks.append(
                PredictionWriter((run or self.checkpoint.parent) / f"predictions-{self.checkpoint.stem}.csv")
            )
        if settings["enable_progress_bar"] is not False and interactive():
            callbacks.append(RichProgressBar(refresh_rate=10))
        else:
            kwargs["enable_progress_bar"] = False
        if self.command == "fit" and settings["enable_model_summary"] is not False:
            callbacks.append(RichModelSummary(max_depth=1))
        if self.command != "fit":
            kwargs["enable_model_summary"] = False
        if self.command != "fit" or kwargs.get("logger", settings["logger"]) is False:
            self.save_config_callback = None  # it would go to the current folder, or over the run's own
        self.save_config_kwargs = {"overwrite": run is not None}
        self.trainer_defaults = {"callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)

    # LightningCLI calls these four in place of the trainer's methods: checkpoints load with weights_only=True.

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        if self.trainer.is_global_zero:
            datamodule.prepare_data()  # Lightning does so too, but claims the run's folder first: no data, no run
        self.trainer.fit(model, datamodule=datamodule, weights_only=True, **kwargs)

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        if not datamodule.hparams["val_size"]:
            raise CommandError("validate needs held-out images, and data.val_size is 0")
        self.trainer.validate(model, datamodule=datamodule, weights_only=True, verbose=False, **kwargs)

    def test(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        self.trainer.test(model, datamodule=datamodule, weights_only=True, verbose=False, **kwargs)

    def predict(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        self.trainer.predict(model, datamodule=datamodule, weights_only=True, return_predictions=False, **kwargs)


def run(args: list[str]) -> None:
    """Run the command `args[0]` with the flags that follow.

    Raises:
        CommandError: the input cannot be used.
        TrainingError: the training failed.
        SystemExit: from `--help` and `--print_config`.
    """
    assert args[0] in COMMANDS
    with quiet():
        try:
            MNISTCLI(args)
        except (DataError, runs.RunError, MisconfigurationException) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a user can do nothing about off the console: advertisements, and warnings about what is meant."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # batches come from memory
            ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
            ".*smaller than the logging interval.*",
            ".*callbacks used to create the checkpoint need to be provided.*",  # only fit writes checkpoints
            ".*Total length of `list` across ranks is zero.*",  # data.val_size is 0
            ".*infer the batch indices.*",  # predictions come in the order of the test set
            ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.15
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
