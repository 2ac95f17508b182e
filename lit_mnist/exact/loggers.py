"""Loggers that write nothing until a run is restored, and then continue in its files where its checkpoint was saved."""

import csv
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from torch.utils.tensorboard.summary import hparams

from .checkpoints import Run
from .console import UserError, shortened
from .ddp import is_first
from .runs import replaced

TEST_SUFFIX = ".test"  # of the event files that `test` writes beside those of the training


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

    shown: Mapping[str, Any] = {}  # the settings in the tab HParams, the first ones first
    shown_metrics: tuple[str, ...] = ()  # and the metrics beside them
    tested_step: int | None = None  # of the checkpoint that `test` scores; Lightning 2.6 would log its metrics at 0

    def state_dict(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in event_files(Path(self.log_dir))}

    def load_state_dict(self, state: Mapping[str, Any] | None, run: Run) -> None:
        for path in event_files(run.origin) if run.origin and state is not None else []:
            size, target = (state or {}).get(path.name), Path(self.log_dir, path.name)
            if type(size) is int and size >= 0:
                if not run.continues:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
                os.truncate(target, min(size, target.stat().st_size))
            elif run.continues and run.checkpoint and path.stat().st_mtime_ns >= run.checkpoint.stat().st_mtime_ns:
                path.unlink()  # of a process that was killed before it could save
        self.opened = True
        if self.shown:
            # TensorBoardLogger 2.6 either invents a metric of -1, which then is what the tab shows, or writes nothing
            plain = {key: value for key, value in self.shown.items() if type(value) in (int, float, str, bool)}
            for summary in hparams(plain, dict.fromkeys(self.shown_metrics, 0.0))[:2]:
                self.experiment.file_writer.add_summary(summary)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.tested_step is not None:
            self.opened, step = True, self.tested_step
        super().log_metrics(metrics, step)
        if "epoch" in metrics:
            names = [name for name in metrics if name.startswith(("train/", "val/")) and not name.endswith("_step")]
            super().log_metrics({f"by_epoch/{name}": metrics[name] for name in names}, int(metrics["epoch"]))


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a run's training; those of `test` are left out."""
    return [path for path in folder.glob("events.out.tfevents.*") if not path.name.endswith(TEST_SUFFIX)]


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
