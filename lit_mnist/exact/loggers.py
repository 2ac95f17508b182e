"""Loggers that write nothing until a run is restored, and then continue in its files where its checkpoint was saved."""

import csv
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any
from unittest.mock import patch

from lightning_fabric.loggers.logger import _DummyExperiment
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar

from .checkpoints import Run
from .console import UserError
from .runs import own_tests, read_results, replaced

# Event files that are replaced as a whole, the last one by each `test`, under a new name, as TensorBoard reads no file
# again. Version 2.21 reads a folder's files in the order of their names, and keeps the first settings that it finds.
SETTINGS, TEXTS, TESTS = "0settings.tfevents", "0texts.tfevents", "0tests.{:.3f}.tfevents"


class RewindableLogger(Logger):
    """A logger that writes nothing before `load_state_dict`, which brings its files to where `state_dict` was called,
    or begins with a copy of them. A user's logger needs no more than these two methods.
    """

    opened = False

    @property
    def experiment(self) -> Any:
        # Lightning 2.6 asks for it before a checkpoint is restored, and its loggers then make their files
        return super().experiment if self.opened else _DummyExperiment()  # type: ignore[misc]

    def save(self) -> None:
        if self.opened:
            super().save()


class RunLogger(RewindableLogger, TensorBoardLogger):
    """TensorBoard's events of one run; a metric of an epoch is also there as `by_epoch/...`, against the epoch."""

    def state_dict(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in event_files(Path(self.log_dir))}

    def load_state_dict(self, state: Mapping[str, Any], run: Run) -> None:
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for path in event_files(run.origin) if run.origin else []:
            if path.name in state:
                if not run.continues:
                    shutil.copyfile(path, folder / path.name)
                os.truncate(folder / path.name, min(state[path.name], path.stat().st_size))
            elif run.continues and run.checkpoint and path.stat().st_mtime_ns >= run.checkpoint.stat().st_mtime_ns:
                path.unlink()  # of a process that was killed before it could save
        if run.continues:  # TensorBoardLogger 2.6 would leave it as it is
            (folder / self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        own = {"recipe": run.recipe} if run.recipe else {}
        for name, value in run.settings.items():
            if name.startswith("trainer."):  # one type in all runs: TensorBoard 2.21 compares no text with a number
                own[name.removeprefix("trainer.")] = value if name.endswith(("max_epochs", "max_steps")) else str(value)
        self.hparams = {**own, **dict(self.hparams)}  # the module's and the data's
        # TensorBoardLogger 2.6 writes nothing without a metric; without the first summary TensorBoard finds all columns
        write_events(folder / SETTINGS, (0, hparams(self._sanitize_params(dict(self.hparams)), {})[1]))
        self.opened = True

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if "epoch" in metrics:
            names = [name for name in metrics if name.startswith(("train/", "val/")) and not name.endswith("_step")]
            super().log_metrics({f"by_epoch/{name}": metrics[name] for name in names}, int(metrics["epoch"]))


def event_files(folder: Path) -> list[Path]:
    return list(folder.glob("events.out.tfevents.*"))


def show_tests(run: Path) -> None:
    """Write the scores of `own_tests` for TensorBoard, if the run has a curve."""
    if tests := own_tests(read_results(run) if event_files(run) else {}):
        before = list(run.glob("0tests*"))
        # TensorBoard drops the higher steps of a metric where it reads a lower one
        scores = [(step, item) for step in sorted(tests) for item in tests[step].items() if item[0].startswith("test/")]
        write_events(run / TESTS.format(time()), *((step, scalar(*item)) for step, item in scores))
        for path in before:
            path.unlink()


def write_events(path: Path, *summaries: tuple[int, Any]) -> None:
    """Write an event file of steps and summaries, or replace it as a whole."""
    events = [Event(wall_time=time(), step=step, summary=summary) for step, summary in summaries]
    with replaced(path) as partial, partial.open("wb") as file:
        writer = RecordWriter(file)
        for event in (Event(file_version="brain.Event:2"), *events):
            writer.write(event.SerializeToString())


class RunCSVLogger(RewindableLogger, CSVLogger):
    """CSVLogger that continues in its run's table, and never overwrites another."""

    waiting: dict[str, Any] | Namespace | None = None  # hyperparameters, until it may write

    def state_dict(self) -> dict[str, int]:
        table = Path(self.log_dir, "metrics.csv")
        return {"rows": len(table.read_text().splitlines()) - 1 if table.exists() else 0}

    def load_state_dict(self, state: Mapping[str, Any], run: Run) -> None:
        table = Path(self.log_dir, "metrics.csv")
        for path in (table, table.with_name("hparams.yaml")):
            if path.exists() and not run.continues:
                raise UserError(f"{path}: that file exists; give the logger another place")
        with patch.object(ExperimentWriter, "_check_log_dir_exists"):  # that of Lightning 2.6 removes the table
            self._experiment = ExperimentWriter(self.log_dir)
        source = run.origin / table.name if run.origin and not run.continues else table
        if source.exists():
            lines = source.read_text().splitlines(keepends=True)
            with replaced(table) as partial:
                partial.write_text("".join(lines[: 1 + state.get("rows", len(lines))]), newline="\r\n")
            self._experiment.metrics_keys = next(csv.reader(lines), [])
        self.opened = True
        self.log_hyperparams(self.waiting)

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        self.waiting = params
        if self.opened:
            super().log_hyperparams(params)


class RunMLFlowLogger(MLFlowLogger):
    """MLFlowLogger whose run may be resumed: MLflow 3.17 keeps the first value of a setting, the latest is a tag."""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        settings = dict(params if isinstance(params, dict) else vars(params))
        for name in settings.keys() & self.experiment.get_run(self.run_id).data.params.keys():
            self.experiment.set_tag(self.run_id, name, str(settings.pop(name)))
        super().log_hyperparams(settings)


OURS = {"CSVLogger": RunCSVLogger, "TensorBoardLogger": RunLogger, "MLFlowLogger": RunMLFlowLogger}


def logger_states(loggers: Sequence[Any]) -> list[dict[str, Any]]:
    """Return how much each logger has written; nothing of one that cannot be rewound."""
    for logger in loggers:
        logger.save()  # onto the disk first
    return [logger.state_dict() if hasattr(logger, "load_state_dict") else {} for logger in loggers]


def open_loggers(trainer: Trainer, run: Run) -> None:
    """Let each logger begin to write where the run's checkpoint was saved; UserError for a user's file in its place."""
    states = dict(enumerate(run.loaded.get("curves", [])))
    # RunLogger, which refuses nothing, comes last: until then no event file has been cut
    for number, logger in sorted(enumerate(trainer.loggers), key=lambda pair: isinstance(pair[1], RunLogger)):
        if trainer.is_global_zero and hasattr(logger, "load_state_dict"):
            logger.load_state_dict(states.get(number, {}), run)
        elif trainer.is_global_zero and run.continues:
            title = type(logger).__name__
            trainer.print(f"{title} has no load_state_dict: what it logged after step {trainer.global_step} stays")
