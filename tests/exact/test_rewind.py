import os
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.exact.checkpoints import Run
from lit_mnist.exact.console import UserError
from lit_mnist.exact.loggers import RewindableLogger, RunCSVLogger, RunLogger, event_files, logger_states, open_loggers


def loggers(run: Path) -> list[RewindableLogger]:
    parts = RunLogger(run.parent, "", run.name, default_hp_metric=False), RunCSVLogger(run.parent, "", run.name)
    for logger in parts:
        logger.log_hyperparams({"lr": 0.1})
    return list(parts)


def log(
    run: Path, *steps: int, lost: tuple[int, ...] = (), origin: Path | None = None, saved: Any = None, written: int = 0
) -> Any:
    """Log to a run that begins with what was saved; return what is saved after these steps, and before those lost."""
    made = loggers(run)
    (checkpoint := run.parent / "last.ckpt").touch()
    os.utime(checkpoint, ns=(written, written))
    trainer: Any = SimpleNamespace(loggers=made, is_global_zero=True)
    open_loggers(trainer, Run(run, checkpoint, {"curves": saved} if saved else {}, origin))
    states: list[Any] = []
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
    return [event.step for event in events.Scalars("loss")], [row[header.index("step")] for row in rows]


def test_a_killed_run_continues_on_its_curve(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    saved = log(run, 0, 1, lost=(2, 3))
    killed = (run / "metrics.csv").stat().st_mtime_ns
    log(run, lost=(2,), origin=run, saved=saved, written=killed)  # before it could save
    log(run, 2, 3, origin=run, saved=saved, written=max(path.stat().st_mtime_ns for path in event_files(run)[:1]))
    assert logged(run) == ([0, 1, 2, 3], ["0", "1", "2", "3"])


def test_a_new_run_begins_with_the_curve_of_its_checkpoint(tmp_path: Path) -> None:
    first, second = tmp_path / "version_0", tmp_path / "version_1"
    saved = log(first, 0, 1, lost=(2,))
    log(second, 5, origin=first, saved=saved)
    assert logged(second) == ([0, 1, 5], ["0", "1", "5"])
    assert logged(first) == ([0, 1, 2], ["0", "1", "2"])


@pytest.mark.parametrize("saved", [None, [{}]])
def test_a_curve_that_the_checkpoint_does_not_know_stays(tmp_path: Path, saved: Any) -> None:
    run = tmp_path / "version_0"
    log(run, 0, 1)
    log(run, origin=run, saved=saved, written=2**61)
    assert logged(run) == ([0, 1], ["0", "1"])


@pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml"])
def test_a_users_own_file_stays(tmp_path: Path, name: str) -> None:
    run = tmp_path / "version_0"
    run.mkdir()
    (run / name).write_text("mine")
    for logger in loggers(run):
        logger.save()
        assert not hasattr(logger, "experiment")
    with pytest.raises(UserError, match=name):
        log(run)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("name", ["9999999999.host.1.0", "by hand"])
def test_a_new_event_file_is_read_last(tmp_path: Path, name: str) -> None:
    run = tmp_path / "version_0"
    saved = log(run, 0, 1)
    (old,) = event_files(run)
    old.rename(run / f"events.out.tfevents.{name}")  # as by a clock that was ahead
    saved[0] = {f"events.out.tfevents.{name}": saved[0][old.name]}
    log(run, 2, origin=run, saved=saved)
    assert [path.name.startswith(f"events.out.tfevents.{name}") for path in sorted(event_files(run))] == [True, True]
    assert logged(run) == ([0, 1, 2], ["0", "1", "2"])
