"""The parts that a Trainer needs for a run: callbacks, plugins and loggers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

from .batchnorm import SynchronizedBatchNorm
from .checkpoint_io import DurableCheckpointIO, translate_restoring
from .checkpoints import BestSettings, CheckpointKeeper, Run, SaveSettings, callback_of
from .console import UserError
from .loggers import OURS, RunLogger
from .progress import Progress
from .results import Results
from .resume import ExactResume, refuse_callbacks
from .runs import only_process, read_results, section


def make_callbacks(
    run: Run,
    save: SaveSettings | None = None,
    best: BestSettings | None = None,
    *,
    own: Sequence[Callback] = (),
    board: Sequence[Callback] = (),
) -> list[Callback]:
    """Return the callbacks that make a fit exact, durable and reported, in the order in which they must be called.

    Without `save` nothing is saved, and nothing can be resumed; `board` are callbacks that write to the run's loggers.
    """
    progress = Progress()
    return [
        ExactResume(run),  # first: nothing may touch the run before all of it is restored
        *own,
        progress,
        Results(run, progress),
        *board,  # after the timer, which leaves their time out
        *([CheckpointKeeper(run, save, best)] if save else []),  # last: it saves what all others have done
    ]


@contextmanager
def hold(run: Run, trainer: Trainer) -> Iterator[None]:
    """Hold a run's folder for this process, or raise UserError; a signal ends the training with Interrupted."""
    keeper = callback_of(trainer, CheckpointKeeper)
    with ExitStack() as held:
        held.callback(run.discard_unused)
        refuse_callbacks(trainer)  # here, too: Lightning 2.6 sets its finders up before all other callbacks
        if trainer.is_global_zero and run.folder:
            held.enter_context(only_process(run.folder))
            if run.checkpoint and not run.checkpoint.is_file():
                raise UserError(f"{run.checkpoint}: another process resumed it just now")
        if keeper:
            held.enter_context(keeper.changes)
            keeper.handle_signals()
        held.enter_context(translate_restoring(run.checkpoint))
        yield


def make_plugins(run: Run, sync_batchnorm: bool = True) -> list[Any]:
    """Return the plugins for durable checkpoints and for batch norm over all processes."""
    # the trainer restores what was read before: a run in progress may have removed the file since
    loaded = {str(run.checkpoint): dict(run.loaded)} if run.checkpoint else {}
    return [DurableCheckpointIO(loaded), *([SynchronizedBatchNorm()] if sync_batchnorm else [])]


def make_logger(run: Run) -> RunLogger:
    """Return a logger of TensorBoard's events in the run's folder."""
    folder = run.folder or Path()  # of the other processes, which write nothing
    return RunLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)


def place_logger(run: Run, logger: Any, number: int, runs: Path) -> None:
    """Change the `class_path` and `init_args` of the run's n-th logger: its place, and a class that writes late.

    In a resumed run the place is the one that it had; in a new one it is the run's folder, if the logger writes files
    and would write them among the runs.
    """
    settings = logger["init_args"]
    # what names a logger's run; the last two are MLFlowLogger's and CometLogger's
    name = next((name for name in ("version", "run_id", "experiment_key") if name in settings), None)
    if not (run.folder and name):
        return
    given = settings[name]
    if given is None and run.continues:  # not from the checkpoint: it becomes a folder's name
        settings[name] = dict(enumerate(section(read_results(run.folder), "fit").get("loggers", []))).get(number)
    module, _, kind = logger["class_path"].rpartition(".")
    if module.startswith("pytorch_lightning.") and (ours := OURS.get(kind)):
        logger["class_path"] = f"{ours.__module__}.{ours.__qualname__}"
        root = Path(settings["save_dir"] or ".", settings.get("name") or "")
        if name == "version" and given is None and root.resolve() == runs.resolve():
            settings["version"] = run.folder.name
        if "default_hp_metric" in settings:
            settings["default_hp_metric"] = False  # which would be logged once more by every resume
