"""Loggers that touch nothing before the training starts, and go on in the files of a resumed run."""

from __future__ import annotations

import csv
import os
import shutil
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from .console import shortened
from .ddp import is_first
from .errors import UserError
from .runs import replaced

TEST_SUFFIX = ".test"  # of the event files that `test` writes beside those of the training
CLOSED = "nothing can be logged before on_train_start: until then a run is not touched"


class RunLogger(TensorBoardLogger):
    """TensorBoard's events of one run.

    Each metric of an epoch is there twice: against the step, and as `by_epoch/...` against the epoch.
    """

    shown: Mapping[str, Any] = {}  # the settings in the tab HParams, the first ones first
    shown_metrics: tuple[str, ...] = ()  # and the metrics beside them
    tested_step: int | None = None  # of the checkpoint that `test` scores; Lightning 2.6 would log its metrics at 0
    opened = False

    @property
    def experiment(self) -> SummaryWriter:
        # Lightning 2.6 asks whether there is one before a checkpoint is restored, and TensorBoardLogger makes one
        if is_first() and not self.opened:
            raise AttributeError(CLOSED)
        return super().experiment

    def open(self) -> None:
        """Begin to write: once a run is restored, or has a result."""
        if self.opened or not is_first():
            return
        self.opened = True
        super().log_hyperparams(self.hparams)
        if self.shown:
            # TensorBoardLogger 2.6 either invents a metric of -1, which then is what the tab shows, or writes nothing
            plain = {key: value for key, value in self.shown.items() if type(value) in (int, float, str, bool)}
            experiment, start, _ = hparams(plain, dict.fromkeys(self.shown_metrics, 0.0))
            for summary in (experiment, start):
                assert self.experiment.file_writer is not None
                self.experiment.file_writer.add_summary(summary)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.tested_step is not None:
            self.open()
            step = self.tested_step
        super().log_metrics(metrics, step)
        if "epoch" in metrics:
            stages = ("train/", "val/")
            names = [name for name in metrics if name.startswith(stages) and not name.endswith("_step")]
            super().log_metrics({f"by_epoch/{name}": metrics[name] for name in names}, int(metrics["epoch"]))

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        if self.opened:
            super().log_hyperparams(params, metrics, step)
        else:
            self.hparams.update(params if isinstance(params, dict) else vars(params))

    def save(self) -> None:
        if self.opened:
            super().save()


class RunCSVLogger(CSVLogger):
    """CSVLogger that goes on in its file: that of Lightning 2.6 removes the one it finds."""

    opened = False

    @property
    def experiment(self) -> Any:
        if is_first() and not self.opened:
            raise AttributeError(CLOSED)
        return super().experiment

    def open(self, rows: int | None = None) -> None:
        """Begin to write after the first rows of the file that is there; after all of them, where it is not said."""
        if self.opened or not is_first():
            return
        self.opened = True
        path = Path(self.log_dir, "metrics.csv")
        kept = path.with_name(".metrics.csv.kept")  # there alone after a kill between the removal and the last line
        header, content = read_csv(path if path.exists() else kept)
        if content:
            with replaced(kept) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=header)
                writer.writeheader()
                writer.writerows(content if rows is None else content[:rows])
        experiment = self.experiment
        experiment.log_hparams(self._waiting)
        if content:
            kept.replace(path)
            experiment.metrics_keys = header

    _waiting: dict[str, Any] = {}  # noqa: RUF012, replaced and never changed

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        if self.opened:
            super().log_hyperparams(params)
        else:
            self._waiting = {**self._waiting, **(params if isinstance(params, dict) else vars(params or Namespace()))}

    def save(self) -> None:
        if self.opened:
            super().save()


# of those that a user may name, the ones that are replaced
FILE_LOGGERS: dict[str, type[RunLogger | RunCSVLogger]] = {
    f"{package}.{name}": ours
    for name, module, ours in (("CSVLogger", "csv_logs", RunCSVLogger), ("TensorBoardLogger", "tensorboard", RunLogger))
    for package in ("pytorch_lightning.loggers", f"pytorch_lightning.loggers.{module}")
}


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a table; nothing of one that is not there.

    Raises:
        UserError: it is there and cannot be read.
    """
    if not path.exists():
        return [], []
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            content = list(reader)
            return list(reader.fieldnames or []), content
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: the run's metrics cannot be read ({shortened(str(error), 100)})") from error


def curves(loggers: Iterable[Logger]) -> dict[str, dict[str, int]]:
    """How long the files of each logger are, in bytes or in rows, by the logger's class and the file's name."""
    found: dict[str, dict[str, int]] = {}
    for logger in loggers:
        logger.save()  # onto the disk first
        if isinstance(logger, RunLogger):
            found["events"] = {path.name: path.stat().st_size for path in event_files(Path(logger.log_dir))}
        elif isinstance(logger, RunCSVLogger):
            found["tables"] = {"metrics.csv": len(read_csv(Path(logger.log_dir, "metrics.csv"))[1])}
    return found


def lengths(checkpoint: Mapping[str, Any], kind: str) -> dict[str, int] | None:
    """Those of one kind of files, as a checkpoint has them; None where its run kept no such files."""
    every = checkpoint.get("curves")
    own = every.get(kind) if isinstance(every, dict) else None
    if not isinstance(own, dict):
        return None
    return {name: size for name, size in own.items() if type(name) is str and type(size) is int and size >= 0}


def open_loggers(
    trainer: Trainer, checkpoint: Mapping[str, Any], written: int, origin: Path | None, continues: bool
) -> None:
    """Let each logger begin to write where a checkpoint ended.

    Args:
        checkpoint: what the run begins with, or nothing.
        written: when it was written, in nanoseconds.
        origin: its run.
        continues: whether this is that run.

    Raises:
        UserError: a file of the user's would be overwritten.
    """
    tables = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, RunCSVLogger) and is_first()]
    for folder in tables:  # before any of them is changed
        read_csv(folder / "metrics.csv")
        found = [name for name in ("metrics.csv", "hparams.yaml") if (folder / name).exists()]
        if found and not continues:
            raise UserError(f"{folder / found[0]}: that file exists; give trainer.logger another place")
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            sizes = lengths(checkpoint, "events")
            if sizes is None or not is_first():
                pass  # what the checkpoint does not know is left as it is
            elif continues:
                rewind(event_files(Path(logger.log_dir)), sizes, written)
            elif origin:
                copy_curve(event_files(origin), Path(logger.log_dir), sizes)
            logger.open()
        elif isinstance(logger, RunCSVLogger) and is_first():
            before = origin / "metrics.csv" if origin else None
            if before and not continues and before.is_file():
                Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(before, Path(logger.log_dir, before.name))
            rows = lengths(checkpoint, "tables")
            logger.open(rows.get("metrics.csv") if rows else None)


def event_files(folder: Path) -> list[Path]:
    """The files of a run's training curve; those of `test` are left out."""
    found = folder.glob("events.out.tfevents.*")
    return [path for path in found if not path.name.endswith(TEST_SUFFIX) and path.is_file()]


def rewind(files: list[Path], sizes: Mapping[str, int], written: int) -> None:
    """Cut a run's curve off after a checkpoint, its newest state, so that resuming writes nothing twice."""
    for path in files:
        if path.name not in sizes:
            if path.stat().st_mtime_ns >= written:  # of a process that was killed before it could save
                path.unlink()
        elif path.stat().st_size > sizes[path.name]:
            os.truncate(path, sizes[path.name])


def copy_curve(files: list[Path], folder: Path, sizes: Mapping[str, int]) -> None:
    """Let a new run begin with another's curve up to a checkpoint of it."""
    for path in files:
        if path.name in sizes:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.name)
            os.truncate(folder / path.name, min(sizes[path.name], path.stat().st_size))
