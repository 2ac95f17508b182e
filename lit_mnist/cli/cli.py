"""fit, validate and test on LightningCLI."""

import math
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from shlex import quote
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse.typing import PositiveFloat, restricted_number_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from lit_mnist.board import Board
from lit_mnist.cli.console import one_line, quiet, resume_command
from lit_mnist.cli.settings import DEFAULT_SEED, Parser, Settings, parse
from lit_mnist.cli.trainer import AutoTrainer, check_trainer, make_run, trainer_settings
from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.exact.assembly import hold
from lit_mnist.exact.checkpoint_io import translate_restoring
from lit_mnist.exact.checkpoints import BestSettings, CheckpointKeeper, Run, SaveSettings, callback_of
from lit_mnist.exact.console import PROGRAM, Interrupted, ProcessLost, TrainingFailed, UserError, shown
from lit_mnist.exact.ddp import launched, lost
from lit_mnist.exact.progress import Progress, words
from lit_mnist.module import LitMNIST

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class MNISTCLI(LightningCLI):
    """LightningCLI for this project; files and flags override the settings of the run of `--ckpt_path`.

    `args` begin with the command; the callbacks of `watch` are called before the user's own.
    """

    settings: Settings
    run = Run()

    def __init__(self, args: list[str], watch: Sequence[Callback] = ()) -> None:
        self.command, self.watch = args[0], watch
        processes, machines = launched()
        try:
            super().__init__(
                LitMNIST,
                MNISTDataModule,
                trainer_class=AutoTrainer,
                seed_everything_default=DEFAULT_SEED,
                trainer_defaults={
                    "max_epochs": 4,
                    "num_sanity_val_steps": 0,
                    "devices": processes,
                    "num_nodes": machines,
                    "sync_batchnorm": True,  # else another number of processes is another training
                },
                parser_class=Parser,
                auto_configure_optimizers=False,
                # it would put `_instantiator`, code to call, into every checkpoint
                load_from_checkpoint_support=False,
                save_config_callback=None,  # ExactResume does that, once everything is restored
                args=args,
            )
        finally:
            self.run.discard_unused()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # parsers are built for this command alone: each costs a part of a second
        return {self.command: LightningCLI.subcommands()[self.command] | {"ckpt_path", "weights_only", "verbose"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        checkpoint = "What is resumed or scored: best or last of the newest run, a file, or a run's folder."
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=checkpoint)
        if self.command == "fit":
            parser.add_argument("--name", type=str | None, default=None, help="A new run's folder (version_N).")
        # Lightning 2.6 allows true, a seed drawn at random; a run here can always be repeated
        parser.add_argument("--seed_everything", type=Seed, default=DEFAULT_SEED, help="Seed of everything random.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.subparser = parser
        parser.usage = f"python -m lit_mnist {self.command} [options]"
        # int: a checkpoint must not name jsonargparse's type, or it would not load with weights_only=True
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data", "model.classes", compute_fn=self._classes, apply_on="instantiate")
        wait = "Seconds that a process waits for another before it is considered lost, once the training has started."
        parser.add_argument("--processes.timeout", type=PositiveFloat, default=120.0, help=wait)
        # in each command, so that each takes a run's config.yaml
        for part, name in ((SaveSettings, "checkpoint"), (BestSettings, "best"), (Board, "board")):
            parser.add_class_arguments(part, name)

    def _classes(self, data: MNISTDataModule) -> int:
        # a trained network has those of the data that it was trained on
        return int(self.settings.loaded.get("hyper_parameters", {}).get("classes", data.classes))

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.settings = parse(parser, self.subparser, args)
        self.config = self.settings.config

    def instantiate_classes(self) -> None:
        self.run = make_run(self.settings)
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
            made = self.config_init[self.command]
            self.datamodule, self.model = made["data"], made["model"]
            self.trainer = AutoTrainer(**trainer_settings(self.settings, self.run, made, self.watch))
        except (ValueError, TypeError, LookupError, ImportError, RuntimeError, MisconfigurationException) as error:
            # what was configured cannot be made; jsonargparse 4.53 wraps the error of a link
            cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
            said = one_line(cause)
            for key, part in vars(self.settings.own["trainer"]).items():
                if str(error).endswith(f"Given value: {part}"):
                    name = str(getattr(part, "class_path", "")).rpartition(".")[2].removeprefix("Run")
                    said = f"trainer.{key}: {f'{name}: ' * (name not in said)}{said}"
            raise UserError(said) from cause

    def after_instantiate_classes(self) -> None:
        if not self.trainer.is_global_zero:
            self.run.discard_unused()  # the first process alone makes a folder; this one did not know that it is not
        check_trainer(self.settings, self.trainer)
        for line in self.settings.lines if self.trainer.is_global_zero else []:
            print(line, flush=True)

    # LightningCLI calls these three in place of the trainer's methods: checkpoints load with weights_only=True

    def fit(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        trainer, run = self.trainer, self.run
        # glibc's malloc maps each large block anew until one of nearly 32 MB was freed: a fifth of the first epoch
        torch.empty(31 * 2**20, dtype=torch.uint8)
        with translate_failures(self), hold(run, trainer):
            trainer.fit(model, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
        reason, longer = ended_by(trainer, self.settings.own["trainer.max_time"])
        limits = " and ".join([*longer, *["the patience of EarlyStopping"] * ("EarlyStopping" in reason)])
        finished = f"Nothing to train: this run has finished. To train longer, raise {limits}."
        untrained = trainer.global_step == run.loaded.get("global_step")
        if untrained and run.claimed:
            run.started = False  # the new run's folder has nothing that is not its parent's
            raise UserError(finished)
        if not (run.started or run.continues):
            raise UserError("nothing to train: trainer.max_epochs, max_steps or limit_train_batches leaves no step")
        if trainer.is_global_zero and run.folder:
            print(f"stopped: {reason}\n" if reason else "", f"{finished}\n" if untrained else "", sep="", end="")
            self._print_summary(longer)

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        path = self.settings.checkpoint
        with translate_failures(self), translate_restoring(path):
            score = getattr(self.trainer, self.command)
            scores = score(model, datamodule=datamodule, ckpt_path=path, weights_only=True, verbose=False)
        if not scores:
            part = "data.val_size or trainer.limit_val" if self.command == "validate" else "trainer.limit_test"
            raise UserError(f"{self.command}: {part}_batches leaves no image to score")

    test = validate

    def _print_summary(self, longer: dict[str, str]) -> None:
        """Print the result of a fit, and the commands for what comes next."""
        trainer, root = self.trainer, self.settings.own["data.root"]
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
    timer, stopping = callback_of(trainer, Timer), callback_of(trainer, EarlyStopping)
    if stopping and stopping.stopping_reason_message:
        reason = f"EarlyStopping: {stopping.stopping_reason_message.partition(' Signaling')[0]}"
    if timer and (timer.time_remaining() or 1) <= 0:  # `trainer.max_time` makes one, too
        reason = f"{'trainer.max_time' if max_time else 'the duration of the Timer'} is used up"
        minutes, seconds = divmod(math.ceil(2 * timer.time_elapsed()), 60)
        longer["trainer.max_time"] = f"{minutes // 1440:02}:{minutes // 60 % 24:02}:{minutes % 60:02}:{seconds:02}"
    if 0 <= trainer.max_steps <= trainer.global_step:
        longer["trainer.max_steps"] = str(2 * max(1, trainer.global_step))
    if not longer or 0 <= most <= epochs:
        longer["trainer.max_epochs"] = str(2 * max(1, epochs, most))
    return reason if trainer.should_stop else "", longer


@contextmanager
def translate_failures(cli: MNISTCLI) -> Iterator[None]:
    """Turn what Lightning and torch raise while a trainer runs into this project's errors."""
    try:
        yield
    except SystemExit as stop:  # Lightning 2.6 turns KeyboardInterrupt into exit status 1
        raise stop.__context__ if isinstance(stop.__context__, KeyboardInterrupt) else stop  # noqa: B904
    except (UserError, TrainingFailed, Interrupted):
        raise
    except Exception as error:
        if reason := lost(error):
            if not torch.distributed.is_initialized():
                raise ProcessLost(f"the processes could not be joined: {reason}") from error
            keeper = callback_of(cli.trainer, CheckpointKeeper)
            resume = resume_command(keeper.last_path if keeper else None)
            raise ProcessLost(f"another process of this run was lost ({reason}); {resume}") from error
        cause = error.__cause__ or error  # TensorBoardLogger 2.6 wraps an OSError in a ValueError
        module = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        says = isinstance(error, (RuntimeError, ImportError, ValueError)) and module.startswith("pytorch_lightning.")
        if cli.run.started and (says or isinstance(cause, (OSError, MisconfigurationException))):
            # such as a full disk, or a score that a callback waits for and the module does not log
            raise TrainingFailed(f"training stopped: {one_line(cause)}; earlier checkpoints are intact") from error
        if says:
            raise UserError(one_line(error)) from error
        raise


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn what Lightning raises about settings into `UserError`, and keep it quiet otherwise."""
    # Lightning 2.6 sets variables when it launches: the next run of this process would wait for others in vain
    with quiet(), patch.dict(os.environ):
        try:
            yield
        except MisconfigurationException as error:
            raise UserError(one_line(error)) from error
