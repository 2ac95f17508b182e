"""A run: the folder it writes to, the state it begins with, and the parts that a Trainer needs for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

from .batchnorm import SynchronizedBatchNorm
from .checkpoints import BestCheckpoint, DurableCheckpointIO, LastCheckpoint, callback_of, stop_on_signals
from .loggers import FILE_LOGGERS, RunLogger
from .processes import is_first
from .progress import EpochLines, Progress
from .results import Results
from .resume import ExactResume, RunStart
from .runs import RunError, claim_version, discard, newest, only_process, read_results, run_folder, section


@dataclass
class Run:
    """Where a fit writes, and what it begins with.

    Args:
        folder: of its checkpoints, config.yaml and results.json; None on all processes but the first until it starts.
        checkpoint: what it begins with; None for nothing.
        loaded: the content of that checkpoint.
        origin: the run that the checkpoint belongs to; None where it lies in no run's folder.
        unchanged: whether it is resumed with the settings that it had; then one that a callback had stopped stays so.
        made: the last folder above `folder` that was there before; None where `folder` was there itself.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    loaded: Mapping[str, Any] = field(default_factory=dict)
    origin: Path | None = None
    unchanged: bool = True
    made: Path | None = None
    started: bool = False

    @classmethod
    def new(cls, runs: Path, checkpoint: Path | None = None, loaded: Mapping[str, Any] | None = None) -> Run:
        """A run in a new folder `version_N`, which only one process can make.

        Raises:
            RunError: no folder can be made there.
        """
        run = cls(None, checkpoint, loaded or {}, run_folder(checkpoint) if checkpoint else None)
        if is_first():
            runs = runs.absolute()
            run.made = next(folder for folder in (runs, *runs.parents) if folder.exists())
            try:
                run.folder = runs / f"version_{claim_version(runs)}"
            except OSError as error:
                raise RunError(f"no run can be written to {runs} ({error.strerror})") from error
        return run

    @classmethod
    def resumed(cls, checkpoint: Path, loaded: Mapping[str, Any], unchanged: bool = True) -> Run:
        """The run that a checkpoint belongs to, in its own folder."""
        folder = run_folder(checkpoint)
        return cls(folder, checkpoint, loaded, folder, unchanged)

    @property
    def continues(self) -> bool:
        """Whether it goes on in the folder of its checkpoint."""
        return self.origin is not None and self.made is None and self.folder == self.origin

    @property
    def parent(self) -> str | None:
        """The checkpoint of another run that this one begins with."""
        return f"{self.origin.name}/{self.checkpoint.name}" if self.checkpoint and self.origin and self.made else None

    @contextmanager
    def held(self, trainer: Trainer) -> Iterator[None]:
        """Hold the folder for this process, and let SIGTERM and Ctrl-C stop the training after the step at hand.

        Raises:
            RunError: another process has it.
            Interrupted: the training was stopped.
        """
        with ExitStack() as held:
            if trainer.is_global_zero and self.folder:
                held.enter_context(only_process(self.folder))
                if self.checkpoint and not self.checkpoint.is_file():
                    raise RunError(f"--ckpt_path {self.checkpoint}: another process resumed it just now")
            held.enter_context(stop_on_signals(callback_of(trainer, LastCheckpoint)))
            yield

    def discard_unused(self) -> None:
        """Remove the folder that was made for a run which never started."""
        if self.folder and self.made and not self.started:
            discard(self.folder, self.made)
            self.folder = None


def is_newest(checkpoint: Path) -> bool:
    """Whether a checkpoint is the newest state of the run that it belongs to."""
    folder = run_folder(checkpoint)
    last = newest(folder) if folder else None
    return last is not None and last.resolve() == checkpoint.resolve()


def callbacks(
    run: Run,
    last: LastCheckpoint | None,
    best: BestCheckpoint | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    config: str = "",
    recipe: str = "",
    command: str = "",
) -> list[Callback]:
    """What makes a fit exact, durable and reported.

    Args:
        last: keeps the newest state; without it nothing can be resumed.
        best: keeps the best state.
        settings: plain settings that go into each checkpoint.
        config: the text of the run's config.yaml; empty for none.
        recipe: a name for the settings of a new run.
        command: what was typed.
    """
    progress = Progress()
    resume = ExactResume(run, dict(settings or {}))
    parts: list[Callback] = [
        RunStart(run, resume, config),
        EpochLines(progress, best),  # before the clock, which starts anew with each epoch
        progress,
        Results(run, progress, recipe, command, settings),
        resume,
    ]
    if best and last:
        last.monitor = str(best.monitor)
    for keeper in (best, last):
        if keeper:
            keeper.run = run
            parts.append(keeper)
    return parts


def plugins(run: Run, sync_batchnorm: bool = True) -> list[Any]:
    """Durable checkpoints, and batch norm over all processes."""
    # what was read is used: until the trainer would read it, a run in progress may have removed the file
    loaded = {str(run.checkpoint): dict(run.loaded)} if run.checkpoint else {}
    return [DurableCheckpointIO(loaded), *([SynchronizedBatchNorm()] if sync_batchnorm else [])]


def run_logger(run: Run, **settings: Any) -> RunLogger:
    """TensorBoard's events in the run's folder."""
    folder = run.folder or Path()  # of the other processes, which write nothing
    return RunLogger(folder.parent, name="", version=folder.name, default_hp_metric=False, **settings)


def place_logger(run: Run, logger: Any, number: int, runs: Path) -> None:
    """Give a configured logger its place: in a resumed run the one that it had, in a new one, where it writes files
    among the runs, the folder of its run; and a class that writes nothing before the training starts.

    Args:
        logger: its `class_path` and `init_args`, changed in place.
        number: which of the run's loggers it is.
        runs: the folder of all runs.
    """
    if not (run.folder and "class_path" in logger and "version" in logger["init_args"]):
        return
    settings, given = logger["init_args"], logger["init_args"]["version"]
    if given is None and run.continues:  # not from the checkpoint: it becomes a folder's name
        kept = section(read_results(run.folder), "fit").get("loggers")
        settings["version"] = kept[number] if isinstance(kept, list) and number < len(kept) else None
    if ours := FILE_LOGGERS.get(logger["class_path"]):
        logger["class_path"] = f"{ours.__module__}.{ours.__qualname__}"
        root = Path(settings["save_dir"] or ".", settings["name"] or "")
        if given is None and root.resolve() == runs.resolve():
            settings["version"] = run.folder.name
        if "default_hp_metric" in settings:
            settings["default_hp_metric"] = False  # which would be logged once more by every resume
