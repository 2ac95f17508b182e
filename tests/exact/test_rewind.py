import os
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.exact.checkpoints import Run
from lit_mnist.exact.console import UserError
from lit_mnist.exact.loggers import RunCSVLogger, RunLogger, event_files, logger_states, open_loggers


def log(run: Path, *steps: int, lost: Any = (), origin: Path | None = None, saved: Any = None, written: int = 0) -> Any:
    """Log to a run that begins with what was saved; return what is saved after these steps, and before those lost."""
    made = [RunLogger(run.parent, "", run.name, default_hp_metric=False), RunCSVLogger(run.parent, "", run.name)]
    for logger in made:
        logger.log_hyperparams({"lr": 0.1})
    (checkpoint := run.parent / "last.ckpt").touch()
    os.utime(checkpoint, ns=(written, written))
    trainer: Any = SimpleNamespace(loggers=made, is_global_zero=True)
    open_loggers(trainer, Run(run, checkpoint, {"curves": saved} if saved else {}, origin))
    states = []
    for part in (steps, lost):
        for logger, step in product(made, part):
            logger.log_metrics({"loss": step / 2, f"at {step}": 1.0}, step)
        states.append(logger_states(made))
    for logger in made:
        logger.finalize("success")
    return states[0]


def logged(run: Path) -> tuple[list[int], list[str]]:
    """Return the steps of both curves."""
    events = EventAccumulator(str(run)).Reload()
    header, *rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    return sorted(event.step for event in events.Scalars("loss")), [row[header.index("step")] for row in rows]


def test_a_run_continues_on_the_curve_of_its_checkpoint(tmp_path: Path) -> None:
    run, new = tmp_path / "version_0", tmp_path / "version_1"
    saved = log(run, 0, 1, lost=(2, 3))
    log(new, 5, origin=run, saved=saved)
    assert (logged(new), logged(run)) == (([0, 1, 5], ["0", "1", "5"]), ([0, 1, 2, 3], ["0", "1", "2", "3"]))
    killed = (run / "metrics.csv").stat().st_mtime_ns
    log(run, lost=(2,), origin=run, saved=saved, written=killed)  # before it could save
    log(run, 2, 3, origin=run, saved=saved, written=max(path.stat().st_mtime_ns for path in event_files(run)[:1]))
    assert logged(run) == ([0, 1, 2, 3], ["0", "1", "2", "3"])
    log(run, origin=run, written=2**61)  # which the checkpoint does not know
    assert logged(run) == ([0, 1, 2, 3], ["0", "1", "2", "3"])


@pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml"])
def test_a_users_own_file_stays(tmp_path: Path, name: str) -> None:
    run = tmp_path / "version_0"
    run.mkdir()
    (run / name).write_text("mine")
    with pytest.raises(UserError, match=name):
        log(run)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [(name, "mine")]
