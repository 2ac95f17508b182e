"""Loggers that write nothing until a run is restored, and then continue in its files where its checkpoint was saved."""

import csv
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar

from .checkpoints import Run
from .console import UserError, shortened
from .ddp import is_first
from .runs import replaced

EVENTS = "events.out.tfevents."  # how the names of TensorBoard's files begin
# Replaced by each `fit`. TensorBoard 2.21 reads a folder's files in the order of their names, and keeps the first
# settings that it finds.
SETTINGS, TEXTS = f"{EVENTS}0000000000.settings", f"{EVENTS}0000000000.texts"
TEST_SUFFIX = ".test"  # of the file with the scores of all tests, replaced by each `test`


class RewindableLogger(Logger):
    """A logger that writes nothing before `load_state_dict`, which brings its files to where `state_dict` was called.

    A run that does not continue in the folder of its checkpoint begins with a copy. The state is None if the checkpoint
    has none of this logger.
    """

    opened = False
    state_dict: Callable[[], dict[str, int]]
    load_state_dict: Callable[[Mapping[str, Any] | None, Run], None]

    @property
    def experiment(self) -> Any:
        # Lightning 2.6 asks for it before a checkpoint is restored, and its loggers then make their files
        if is_first() and not self.opened:
            raise AttributeError("nothing can be logged before on_train_start: until then a run is not touched")
        return super().experiment  # type: ignore[misc]

    def save(self) -> None:
        if self.opened:
            super().save()


class RunLogger(RewindableLogger, TensorBoardLogger):
    """TensorBoard's events of one run, made with `default_hp_metric=False`.

    Each metric of an epoch is there twice: against the step, and as `by_epoch/...` against the epoch.
    """

    shown: Mapping[str, int | float | str] = {}  # the settings in the tab HParams
    tested_step: int | None = None  # of the checkpoint that `test` scores; Lightning 2.6 would log its metrics at 0

    @property
    def experiment(self) -> Any:
        made, folder = self._experiment, Path(self.log_dir)
        writer = super().experiment
        if made is None and self._experiment is not None:
            # TensorBoard reads a file that sorts before an older one first, and then drops its steps; the clock may be
            # behind. The writer of tensorboard 2.21 opens the file by this name each time.
            events = writer.file_writer.event_writer
            own = Path(events._file_name)
            latest = max(path.name for path in folder.glob("*tfevents*"))
            if latest != own.name:
                events._general_file_writer.filename = os.fsencode(own.rename(folder / f"{latest}.1"))
        return writer

    def state_dict(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in event_files(Path(self.log_dir))}

    def load_state_dict(self, state: Mapping[str, Any] | None, run: Run) -> None:
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for path in event_files(run.origin) if run.origin and state is not None else []:
            size, target = (state or {}).get(path.name), folder / path.name
            if type(size) is int and size >= 0:
                if not run.continues:
                    shutil.copyfile(path, target)
                os.truncate(target, min(size, target.stat().st_size))
            elif run.continues and run.checkpoint and path.stat().st_mtime_ns >= run.checkpoint.stat().st_mtime_ns:
                path.unlink()  # of a process that was killed before it could save
        if run.continues:  # TensorBoardLogger 2.6 would leave it as it is
            (folder / self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        if self.shown:
            # TensorBoardLogger 2.6 writes nothing without a metric. Without a list of columns, the first summary,
            # TensorBoard has one for each setting of any run, those that differ first.
            write_events(folder / SETTINGS, [Event(wall_time=time(), summary=hparams(dict(self.shown), {})[1])])
        self.opened = True

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.tested_step is not None:
            self._add_test({name: metrics[name] for name in metrics if name != "epoch"}, self.tested_step)
            return
        super().log_metrics(metrics, step)
        if "epoch" in metrics:
            names = [name for name in metrics if name.startswith(("train/", "val/")) and not name.endswith("_step")]
            super().log_metrics({f"by_epoch/{name}": metrics[name] for name in names}, int(metrics["epoch"]))

    def _add_test(self, metrics: Mapping[str, float], step: int) -> None:
        """Put the scores of a checkpoint of this step, in the place of older ones, beside those of other steps."""
        if not is_first():
            return
        # a new name: a TensorBoard that is running reads no file again
        folder, target = Path(self.log_dir), f"{EVENTS}{int(time()):010d}{TEST_SUFFIX}"
        before = sorted(folder.glob(f"*tfevents*{TEST_SUFFIX}"))
        events = [event for path in before for event in LegacyEventFileLoader(str(path)).Load()]
        events += [Event(wall_time=time(), step=step, summary=scalar(*metric)) for metric in metrics.items()]
        points = {(event.step, event.summary.value[0].tag): event for event in events if event.summary.value}
        # TensorBoard drops the higher steps of a metric where it reads a lower one
        write_events(folder / target, [points[key] for key in sorted(points) if key[1] in metrics])
        for path in before:
            if path.name != target:
                path.unlink()


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a run's training; those that are replaced as a whole are left out."""
    found = folder.glob(f"{EVENTS}*")
    return [path for path in found if path.name not in (SETTINGS, TEXTS) and not path.name.endswith(TEST_SUFFIX)]


def write_events(path: Path, events: Iterable[Event]) -> None:
    """Write an event file, or replace it as a whole."""
    # the name of the other is not one that TensorBoard reads
    with (partial := path.with_name(f".{os.getpid()}.tmp")).open("wb") as file:
        writer = RecordWriter(file)
        for event in (Event(file_version="brain.Event:2"), *events):
            writer.write(event.SerializeToString())
    partial.replace(path)


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Leave the table that is there; that of Lightning 2.6 removes it."""


class RunCSVLogger(RewindableLogger, CSVLogger):
    """CSVLogger that continues in its run's table, and never overwrites another."""

    rows = 0  # in the table
    waiting: dict[str, Any] | Namespace | None = None  # hyperparameters, until it may write

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any] | None, run: Run) -> None:
        table = Path(self.log_dir, "metrics.csv")
        for path in (table, table.with_name("hparams.yaml")):
            if path.exists() and not run.continues:
                raise UserError(f"{path}: that file exists; give the logger another place")
        source = table if run.continues or not run.origin else run.origin / table.name
        try:
            lines = list(csv.reader(source.read_text().splitlines())) if source.exists() else []
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{source}: the run's metrics cannot be read ({shortened(str(error), 100)})") from error
        self.opened, self._experiment = True, _KeepingWriter(self.log_dir)
        if lines:
            rows = state.get("rows") if state else None
            lines = lines[: 1 + rows if type(rows) is int and rows >= 0 else None]
            with replaced(table) as partial, partial.open("w", newline="") as file:
                csv.writer(file).writerows(lines)
            self._experiment.metrics_keys, self.rows = lines[0], len(lines) - 1
        self.log_hyperparams(self.waiting)

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        if self.opened:
            super().log_hyperparams(params)
        else:
            self.waiting = params

    def save(self) -> None:
        if self.opened:
            self.rows += len(self.experiment.metrics)
        super().save()


class RunMLFlowLogger(MLFlowLogger):
    """MLFlowLogger whose run may be resumed: settings that differ become tags, as MLflow 3.17 keeps the first value."""

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        if is_first():
            settings = dict(params if isinstance(params, dict) else vars(params))
            before = self.experiment.get_run(self.run_id).data.params
            for name in settings.keys() & before.keys():
                if (value := str(settings.pop(name))[:250]) != before[name]:
                    self.experiment.set_tag(self.run_id, name, value)
            super().log_hyperparams(settings)


MLFLOW = [f"pytorch_lightning.loggers.{module}MLFlowLogger" for module in ("", "mlflow.")]
# of those that a user may name, the ones that are replaced
FILE_LOGGERS: dict[str, type[RewindableLogger]] = {
    f"pytorch_lightning.loggers.{module}{name}": ours
    for name, ours in (("CSVLogger", RunCSVLogger), ("TensorBoardLogger", RunLogger))
    for module in ("", "csv_logs.", "tensorboard.")
}


def logger_states(loggers: Sequence[Logger]) -> list[dict[str, int]]:
    """Return how much each logger has written; nothing of one that cannot be rewound."""
    for logger in loggers:
        logger.save()  # onto the disk first
    return [logger.state_dict() if isinstance(logger, RewindableLogger) else {} for logger in loggers]


def open_loggers(trainer: Trainer, run: Run) -> None:
    """Let each logger begin to write where the run's checkpoint was saved.

    UserError if a file of the user's would be overwritten, or one of the run cannot be read.
    """
    states = run.loaded.get("curves")
    loggers = [(n, logger) for n, logger in enumerate(trainer.loggers) if isinstance(logger, RewindableLogger)]
    # RunLogger, which refuses nothing, comes last: until then no event file has been cut
    for number, logger in sorted(loggers, key=lambda pair: isinstance(pair[1], RunLogger)):
        state = states[number] if isinstance(states, list) and number < len(states) else None
        if trainer.is_global_zero:
            logger.load_state_dict(state if isinstance(state, dict) else None, run)
