import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import several
from helpers import REPOSITORY, Capsys, Command, Patch, at_call, fail, fails

from lit_mnist.__main__ import main
from lit_mnist.data import datasets
from lit_mnist.exact.console import TrainingFailed
from lit_mnist.exact.progress import Progress
from lit_mnist.exact.runs import read_results
from lit_mnist.sweep import comparison, sweep
from lit_mnist.sweep.study import Study, retry

BASE = """\
trainer: {max_epochs: 1, log_every_n_steps: 1}
model: {layers: 8x5/2 16/2, activation: relu, schedule: cosine, ema_decay: 0.0}
data: {val_size: 100, batch_size: 10}
checkpoint: {every_n_steps: 1}
"""
STUDY = "base: base.yaml\nsettings:\n  model.lr: [0.05, 0.2]\nseeds: 2\nheartbeat: 1\n"
STEPS = 30  # of a run
RUNS = Path("lightning_logs")


@pytest.fixture
def study(command: Command) -> Command:
    """Sweep with a study file of this text, in the folder of `command`."""
    Path("base.yaml").write_text(BASE)

    def run(text: str = STUDY, *flags: str) -> int:
        Path("study.yaml").write_text(text)
        return command("sweep", "--config=study.yaml", *flags)

    return run


def tried(name: str = "study", folder: Path = Path()) -> list[dict[str, Any]]:
    return list(read_results(folder / RUNS / "sweeps" / name)["settings_tried"])


def rows(name: str = "study", folder: Path = Path()) -> list[dict[str, Any]]:
    """The table without times and places: what must not depend on kills and workers."""
    lines = tried(name, folder)
    for part in [*lines, *(trial for line in lines for trial in line["trials"])]:
        for key in ("sample", "seconds", "run", "host", "hardware", "versions", "commit"):
            part.pop(key, None)
    return lines


def runs(folder: Path = Path()) -> list[str]:
    return sorted(path.name for path in folder.glob("lightning_logs/version_*"))


def sweep_in(folder: Path, root: Path, *flags: str, processes: int = 1, death: Any = None) -> list[int | None]:
    """Start the study in a folder as several commands at once, and return how they ended."""
    folder.mkdir(exist_ok=True)
    for name in ("base.yaml", "study.yaml"):
        (folder / name).write_bytes(Path(name).read_bytes())
    flags = ("sweep", "--config=study.yaml", "--data.root", str(root), *flags)
    ended = several.run(processes, flags, folder, datasets.FILES, death, environment=[{}] * processes)
    return [one.status for one in ended]


def test_each_seed_is_a_run_and_the_table_is_of_their_results(study: Command, command: Command, capsys: Capsys) -> None:
    assert study() == 0
    assert runs() == ["version_0", "version_1", "version_2", "version_3"]
    values: dict[float, dict[int, float]] = {0.05: {}, 0.2: {}}
    for name in runs():
        fit = read_results(RUNS / name)["fit"]
        assert fit["state"] == "finished"
        values[fit["model"]["lr"]][fit["data"]["seed"]] = fit["best"]["val/accuracy"]
    table = tried()
    for row in table:
        expected = values[row["model.lr"]]
        assert {trial["seed"]: trial["value"] for trial in row["trials"]} == expected
        assert row["n"] == 2
        moments = statistics.mean(expected.values()), statistics.stdev(expected.values())
        assert (row["mean"], row["std"]) == pytest.approx(moments)
        assert (row["best"], row["worst"]) == (max(expected.values()), min(expected.values()))
        assert row["parameters"] == 8 * 25 + 16 + 16 * 72 + 32 + 170
    means = [row["mean"] for row in table]
    assert means == sorted(means, reverse=True)
    folder = RUNS / "sweeps" / "study"
    assert pd.read_csv(folder / "settings.csv")["mean"].tolist() == means
    assert (folder / "settings.png").read_bytes().startswith(b"\x89PNG")
    trials = optuna.load_study(study_name="study", storage="sqlite:///lightning_logs/sweeps/study/trials.db").trials
    ordered = [row["mean"] for row in sorted(table, key=lambda row: row["sample"])]
    assert [trial.value for trial in trials] == pytest.approx(ordered)
    assert all(trial.intermediate_values[0] == values[trial.params["model.lr"]][1] for trial in trials)

    capsys.readouterr()
    assert study() == 0
    assert len(runs()) == 4  # nothing is trained again
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    winner = max(table[0]["trials"], key=lambda trial: trial["value"])
    assert Path(printed[-2]).match(f"{winner['run']}/checkpoints/best-*")
    assert main(printed[printed.index("test") :]) == command("test", "--ckpt_path", "best") == 0


RANGES = "{model.lr: {low: 0.01, high: 0.5, log: true}, data.batch_size: {low: 40, high: 60}}"
TPE = f"base: base.yaml\nsettings: {RANGES}\nseeds: 1\nsampler: tpe\nsamples: 3\nheartbeat: 1\n"


@contextmanager
def database() -> Iterator[list[str]]:
    """Start a PostgreSQL server for the length of a test, and give the flag of a study in it."""
    if not shutil.which("pg_virtualenv"):
        pytest.skip("there is no PostgreSQL here (Debian's package postgresql)")
    code = "echo --storage=postgresql+psycopg://$PGUSER:$PGPASSWORD@$PGHOST:$PGPORT/postgres; exec cat"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(["pg_virtualenv", "-t", "sh", "-c", code], text=True, **pipes)
    try:
        yield [next(line.strip() for line in server.stdout or [] if line.startswith("--storage"))]
    finally:
        server.communicate(timeout=60)  # cat ends with its input, and the server with cat


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "workers", "deaths", "storage"),
    [
        (STUDY, 1, (5, 12), nullcontext([])),
        (TPE, 1, (5, 12), nullcontext([])),
        (STUDY, 2, (STEPS // 2,), nullcontext([])),
        (STUDY.replace("0.2]", "0.1, 0.2]"), 3, (STEPS // 2,), database()),
    ],
    ids=["grid", "tpe", "workers", "database"],
)
def test_a_killed_study_ends_as_one_that_was_not(
    study: Command, tiny_root: Path, tmp_path: Path, text: str, workers: int, deaths: Any, storage: Any
) -> None:
    Path("study.yaml").write_text(text)
    with storage as where:
        assert sweep_in(tmp_path / "whole", tiny_root) == [0]
        for step in deaths:
            death = several.Death(workers - 1, step)
            ended = sweep_in(tmp_path / "killed", tiny_root, *where, processes=workers, death=death)
            assert ended == [0] * (workers - 1) + [-signal.SIGKILL]
    if workers == 1:  # otherwise another has resumed the trial
        assert sweep_in(tmp_path / "killed", tiny_root) == [0]
    whole, killed = (rows(folder=tmp_path / name) for name in ("whole", "killed"))
    assert killed == whole
    assert len(runs(tmp_path / "killed")) == len(runs(tmp_path / "whole"))  # each was resumed in its own folder
    if text == TPE:
        drawn = {(row["model.lr"], row["data.batch_size"]) for row in whole}
        assert len(drawn) == 3
        assert all(0.01 <= lr <= 0.5 and size in range(40, 61) for lr, size in drawn)


@pytest.mark.slow
def test_workers_are_started_and_watched(study: Command, tiny_root: Path, monkeypatch: Patch, capfd: Capsys) -> None:
    # other processes know nothing of the tiny set
    Path("base.yaml").write_text(BASE.replace("data: {", "data: {name: idx, "))
    raw = str(tiny_root / "MNIST" / "raw")
    assert study(STUDY, "--workers", "2", "--data.root", raw) == 0
    assert [row["n"] for row in tried()] == [2, 2]
    assert len(runs()) == 4
    assert capfd.readouterr().out.count(" s\n") == 4
    broken = Path("broken")
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken.absolute()))
    assert study(STUDY.replace("seeds: 2", "seeds: 3"), "--workers", "2", "--data.root", raw) == 3
    assert "worker 1 ended with status 7" in capfd.readouterr().out


def stop(status: int) -> None:
    if status == 3:
        raise TrainingFailed("no space left") from OSError(28, "No space left on device")
    os.kill(os.getpid(), status - 128)


BATCH, SAY = (Progress, "on_train_batch_end"), (sweep.Worker, "say")


@pytest.mark.parametrize(
    ("moment", "status"),
    [(BATCH, 143), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((BATCH, 130), (SAY, 143), (BATCH, 3)))],
)
def test_the_same_command_continues_a_sweep(study: Command, moment: Any, status: int) -> None:
    with at_call(1, partial(stop, status), *moment):
        assert study() == status
    assert study() == 0
    assert [(row["n"], row["reason"]) for row in tried()] == [(2, None)] * 2
    assert len(runs()) == 4


@pytest.mark.slow
def test_a_reassigned_trial_is_left_to_the_other_worker(study: Command, capsys: Capsys) -> None:
    original, patch = sweep.Worker.train_run, Patch()

    def reassign(self: sweep.Worker, trial: optuna.Trial, seed: str, flags: list[str]) -> None:
        patch.undo()
        original(self, trial, seed, flags)
        frozen = self.study.get_trials()[trial.number]
        self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        retry(self.study, frozen)

    patch.setattr(sweep.Worker, "train_run", reassign)
    assert study() == 0
    assert "This trial was reassigned" in capsys.readouterr().out
    assert len(runs()) == 4
    assert [row["n"] for row in tried()] == [2, 2]


@pytest.mark.slow
def test_a_setting_that_is_drawn_again_is_not_trained_again(study: Command) -> None:
    text = "base: base.yaml\nsettings: {model.lr: [0.1, 0.2]}\nseeds: 1\nsampler: random\nsamples: 8\n"
    assert study(text) == 0
    assert len(runs()) == 2
    assert sorted(str(row["reason"]) for row in tried()) == ["None"] * 2 + ["drawn before"] * 6


@pytest.mark.slow
def test_poor_configurations_are_pruned_or_fail(study: Command) -> None:
    lrs = [0.1, 0.12, 0.14, 0.16, 0.18, 1e-6, 1e20]
    assert study(f"base: base.yaml\nsettings: {{model.lr: {lrs}}}\nseeds: 2\npruner: median\n") == 0
    table = {row["model.lr"]: row for row in tried()}
    assert all(table[lr]["n"] == 2 for lr in lrs[:5])
    assert (table[1e-6]["reason"], table[1e-6]["n"]) == ("pruned after seed 1", 1)
    assert "training failed at step" in table[1e20]["reason"]
    assert [bool(row["reason"]) for row in tried()] == [False] * 5 + [True] * 2


@pytest.mark.slow
def test_what_failed_can_be_tried_again(study: Command) -> None:
    text = "base: base.yaml\nsettings: {trainer.val_check_interval: [2, 1000]}\nseeds: 1\n"
    with at_call(1, partial(fail, TrainingFailed("no luck")), *BATCH):
        assert study(text) == 3
    assert not read_results(RUNS / "sweeps" / "study")["difference"]
    found = {row["trainer.val_check_interval"]: row["reason"] for row in tried()}
    assert found[2] == "no luck"
    assert "val_check_interval" in found[1000]  # which only the trainer refuses
    assert study(text, "--retry") == 0
    assert [row["n"] for row in tried()] == [1, 0]
    assert study("base: base.yaml\nseeds: 1\ncompare: val/f1\nmode: max\nof: last\n", "--name", "f1") == 3
    assert tried("f1")[0]["reason"].startswith("val/f1 was not logged, but ")


@pytest.mark.slow
def test_the_test_set_is_scored_for_the_chosen_configuration_alone(study: Command, capsys: Capsys) -> None:
    assert study() == 0
    assert study(STUDY, "--test", "--output", "figures") == 0
    table = read_results(Path("figures"))["settings_tried"]
    found = {run: read_results(RUNS / run) for run in runs()}
    tested = {run: found[run]["test"][-1]["test/accuracy"] for run in found if "test" in found[run]}
    assert {trial["run"]: trial["test/accuracy"] for trial in table[0]["trials"]} == tested
    assert table[0]["test/accuracy"] == pytest.approx(statistics.mean(tested.values()))
    assert table[1]["test/accuracy"] is None
    assert "Test set, test/accuracy: " in capsys.readouterr().out
    for path in RUNS.glob("version_*/checkpoints/*"):
        path.unlink()
    assert study(STUDY, "--test") == 0  # the scores are kept
    lost = STUDY.replace("[0.05, 0.2]", "0.2"), "--name", "lost"
    assert study(*lost) == 0
    next(RUNS.glob(f"{runs()[-1]}/checkpoints/best-*")).unlink()
    assert study(*lost, "--test") == 3
    assert f"{runs()[-1]} (seed 2" in capsys.readouterr().err


def test_recipes_are_compared_and_the_study_keeps_its_own(study: Command) -> None:
    recipes = [Path("base.yaml"), Path("other.yaml")]
    recipes[1].write_text(BASE.replace("8x5", "4x5"))
    text = "settings: {config: [base.yaml, other.yaml], model.lr: 0.1}\nseeds: 1\ncompare: val/loss\nof: last\n"
    with at_call(2, lambda: list(map(Path.unlink, recipes)), sweep.Worker, "train_run"):
        assert study(text) == 0
    table = tried()
    assert {row["config"]: row["parameters"] for row in table} == {"base.yaml": 1570, "other.yaml": 886}
    losses = [row["mean"] for row in table]
    assert losses == sorted(losses)
    for row in table:
        fit = read_results(RUNS / row["trials"][0]["run"])["fit"]
        assert (fit["model"]["lr"], fit["metrics"]["val/loss"]) == (0.1, row["mean"])


@pytest.mark.slow
def test_a_study_may_grow_and_not_change(study: Command, capsys: Capsys) -> None:
    assert study() == 0
    before = rows()
    fewer, others = STUDY.replace("seeds: 2", "seeds: 1"), STUDY.replace("0.2", "0.3")
    for text, name in ((others, "settings"), (fewer, "seeds"), (STUDY + "compare: val/loss\n", "compare")):
        assert f"error: {name} changed" in fails(capsys, text, run=study)
    assert len(runs()) == 4
    assert study(STUDY.replace("seeds: 2", "seeds: 3")) == 0
    assert len(runs()) == 6
    for row in rows():
        assert row["n"] == 3
        assert row["trials"][:2] == next(old["trials"] for old in before if old["model.lr"] == row["model.lr"])
    Path("base.yaml").write_text(BASE.replace("max_epochs: 1", "max_epochs: 2"))
    assert "recipes changed" in fails(capsys, STUDY.replace("seeds: 2", "seeds: 3"), run=study)


@pytest.mark.slow
def test_a_run_that_its_user_trained_on_is_left_alone(study: Command, command: Command) -> None:
    assert study() == 0
    with at_call(1, partial(stop, 130), *BATCH):
        assert study(STUDY, "--name", "again") == 130
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert study(STUDY, "--name", "again") == 0
    assert rows("again") == rows()
    assert len(runs()) == 4 + 1 + 4


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("settings: {modle.lr: [1]}", "modle.lr"),
        ("settings: {seed_everything: [1, 2]}", "settings.seed_everything"),
        ("settings: {model.lr: [0.1, -1.0]}", "got -1.0"),
        ("sampler: tpe\nsamples: 2\nsettings: {model.lr: {low: 0.1}}", "settings.model.lr"),
        ("settings: {model.lr: {low: 0.1, high: 1.0}}", "settings.model.lr"),
        ("sampler: tpe\nsamples: 2\nsettings: {model.lr: {low: 2.0, high: 1.0}}", "settings.model.lr"),
        ("settings: {config: [nowhere.yaml]}", "nowhere.yaml"),
        ("seeds: 0", "got 0"),
        ("sampler: tpe", "samples"),
        ("compare: test/accuracy", "got test/accuracy"),
        ("compare: val/f1", "val/f1"),
        ("--storage=mysql+nothing://user:secret@host/db", "--storage"),
        ("--storage=nowhere/trials.db", "--storage"),
        ("--root_dir=base.yaml", "base.yaml"),
    ],
)
def test_bad_studies(text: str, named: str, study: Command, capsys: Capsys) -> None:
    err = fails(capsys, *([STUDY, text] if text.startswith("--") else [text]), run=study)
    assert err.startswith("lit_mnist: error: ")
    assert named in err
    assert "secret" not in err
    assert not runs()


def lines(*values: dict[int, float]) -> pd.DataFrame:
    trials = [[{"seed": seed, "value": value} for seed, value in one.items()] for one in values]
    return pd.DataFrame({"model.lr": range(len(values)), "trials": trials})


def test_the_difference_is_paired() -> None:
    table = lines({1: 0.991, 2: 0.993, 3: 0.995, 9: 0.5}, {1: 0.990, 2: 0.991, 3: 0.992})
    found = list(comparison.difference(table.iloc[0], table.iloc[1]).values())
    # differences 1, 2, 3 thousandths: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    half = 4.302653 / math.sqrt(3)
    assert found[0] == [1, 2, 3]
    assert found[1:] == pytest.approx([0.002, 0.001 * (2 - half), 0.001 * (2 + half)], abs=1e-9)
    for other in ({1: 0.990}, {1: 0.990, 2: 0.992, 3: 0.994}):
        table = lines({1: 0.991, 2: 0.993, 3: 0.995}, other)
        assert comparison.difference(table.iloc[0], table.iloc[1])["low"] is None
    plan = Study(settings={"model.lr": [0, 1, 2]})
    for second, real in ((0.98, 0.9815, 0.982), True), ((0.985, 0.985, 1.0), False):  # its interval includes zero
        table = lines({1: 0.99, 2: 0.991, 3: 0.992}, *[dict(enumerate(second, 1))] * 2)
        best, words, biased = comparison.in_words(plan, table, comparison.difference(table.iloc[0], table.iloc[1]))
        assert ("a real difference" in words) == real
        assert best == "Best: lr 0"
        assert "biased" in biased


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "sweeps").iterdir()), ids=lambda path: path.stem)
def test_the_studies_of_this_repository(path: Path, study: Command, tmp_path: Path) -> None:
    assert study(path.read_text(), "--workers", "0", "--name", path.stem, "--root_dir", str(tmp_path)) == 0
    assert not read_results(tmp_path / RUNS / "sweeps" / path.stem)["settled"]
