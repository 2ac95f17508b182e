import os
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


def begin(run: Path, loaded: Any = None, origin: Path | None = None, written: int = 0) -> list[RewindableLogger]:
    made = loggers(run)
    trainer: Any = SimpleNamespace(loggers=made, is_global_zero=True)
    (checkpoint := run.parent / "last.ckpt").touch()
    os.utime(checkpoint, ns=(written, written))
    open_loggers(trainer, Run(run, checkpoint, {"curves": loaded} if loaded else {}, origin))
    return made


def log(made: list[RewindableLogger], *steps: int, **more: float) -> None:
    for logger in made:
        for step in steps:
            logger.log_metrics({"loss": step / 2, **more}, step)


def end(made: list[RewindableLogger]) -> None:
    for logger in made:
        logger.finalize("success")


def logged(run: Path) -> tuple[list[int], list[str]]:
    """Return the steps of both curves."""
    events = EventAccumulator(str(run))
    events.Reload()
    header, *rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    return [event.step for event in events.Scalars("loss")], [row[header.index("step")] for row in rows]


def test_a_killed_run_continues_on_its_curve(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    made = begin(run)
    log(made, 0, 1)
    saved = logger_states(made)
    log(made, 2, 3, other=1.0)  # after the checkpoint: lost
    end(made)
    killed = begin(run, saved, run, written=(run / "metrics.csv").stat().st_mtime_ns)
    log(killed, 2)
    end(killed)  # before it could save
    resumed = begin(run, saved, run, written=max(path.stat().st_mtime_ns for path in event_files(run)[:1]))
    log(resumed, 2, 3, third=1.0)
    end(resumed)
    assert logged(run) == ([0, 1, 2, 3], ["0", "1", "2", "3"])


def test_a_new_run_begins_with_the_curve_of_its_checkpoint(tmp_path: Path) -> None:
    first, second = tmp_path / "version_0", tmp_path / "version_1"
    made = begin(first)
    log(made, 0, 1)
    saved = logger_states(made)
    log(made, 2)
    end(made)
    made = begin(second, saved, first)
    log(made, 5)
    end(made)
    assert logged(second) == ([0, 1, 5], ["0", "1", "5"])
    assert logged(first) == ([0, 1, 2], ["0", "1", "2"])


@pytest.mark.parametrize("saved", [None, [], [{}]])
def test_a_curve_that_the_checkpoint_does_not_know_stays(tmp_path: Path, saved: Any) -> None:
    run = tmp_path / "version_0"
    made = begin(run)
    log(made, 0, 1)
    end(made)
    end(begin(run, saved, run, written=2**61))
    assert logged(run) == ([0, 1], ["0", "1"])


@pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml"])
def test_a_users_own_file_stays(tmp_path: Path, name: str) -> None:
    run = tmp_path / "version_0"
    run.mkdir()
    (run / name).write_text("mine")
    with pytest.raises(UserError, match=name):
        begin(run)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [(name, "mine")]


def test_nothing_is_written_before_it_is_restored(tmp_path: Path) -> None:
    for logger in loggers(tmp_path / "version_0"):
        logger.save()
        assert not hasattr(logger, "experiment")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["9999999999.host.1.0", "by hand"])
def test_a_new_event_file_is_read_last(tmp_path: Path, name: str) -> None:
    run = tmp_path / "version_0"
    made = begin(run)
    log(made, 0, 1)
    end(made)
    (old,) = event_files(run)
    old.rename(run / f"events.out.tfevents.{name}")  # as by a clock that was ahead
    saved = [*logger_states(loggers(run)[:1]), {"rows": 2}]
    made = begin(run, saved, run)
    log(made, 2)
    end(made)
    assert [path.name.startswith(f"events.out.tfevents.{name}") for path in sorted(event_files(run))] == [True, True]
    assert logged(run) == ([0, 1, 2], ["0", "1", "2"])
