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

import pandas as pd
import pytest
from helpers import REPOSITORY, Capsys, Command, Death, Patch, at_call, fail, fails, run_on

from lit_mnist.__main__ import main
from lit_mnist.data import datasets
from lit_mnist.exact.console import TrainingFailed
from lit_mnist.exact.progress import Progress
from lit_mnist.exact.runs import read_results
from lit_mnist.sweep import comparison, sweep
from lit_mnist.sweep.study import Study

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
    Path("base.yaml").write_text(BASE)

    def run(text: str = STUDY, *flags: str) -> int:
        Path("study.yaml").write_text(text)
        return command("sweep", "--config=study.yaml", *flags)

    return run


def tried(name: str = "study", folder: Path = Path()) -> list[dict[str, Any]]:
    return list(read_results(folder / RUNS / "sweeps" / name)["settings_tried"])


def rows(name: str = "study", folder: Path = Path()) -> list[Any]:
    """The table without times and places: what must not depend on kills and workers."""
    keys = ("model.lr", "data.batch_size", "n", "reason", "mean", "std", "best", "worst", "parameters", "epochs")
    values = [[(run["seed"], run["value"]) for run in line["trials"]] for line in tried(name, folder)]
    return [*zip(([line.get(key) for key in keys] for line in tried(name, folder)), values, strict=True)]


def runs(folder: Path = Path()) -> list[str]:
    return sorted(path.name for path in folder.glob("lightning_logs/version_*"))


def sweep_in(folder: Path, root: Path, *flags: str, processes: int = 1, death: Any = None) -> list[int | None]:
    """Start the study in a folder as several commands at once, and return how they ended."""
    folder.mkdir(exist_ok=True)
    for name in ("base.yaml", "study.yaml"):
        (folder / name).write_bytes(Path(name).read_bytes())
    flags = ("sweep", "--config=study.yaml", "--data.root", str(root), *flags)
    outcomes = run_on(processes, flags, folder, datasets.FILES, death, variables=[{}] * processes)
    return [outcome.status for outcome in outcomes]


def test_each_seed_is_a_run_and_the_table_is_of_their_results(study: Command, command: Command, capsys: Capsys) -> None:
    assert study() == 0
    assert runs() == ["version_0", "version_1", "version_2", "version_3"]
    values: dict[float, dict[int, float]] = {0.05: {}, 0.2: {}}
    for name in runs():
        fit = read_results(RUNS / name)["fit"]
        values[fit["model"]["lr"]][fit["data"]["seed"]] = fit["best"]["val/accuracy"]
    for row in (table := tried()):
        assert {trial["seed"]: trial["value"] for trial in row["trials"]} == values[row["model.lr"]]
        both = list(values[row["model.lr"]].values())
        moments = [statistics.mean(both), statistics.stdev(both), max(both), min(both), 1570]
        assert [row[key] for key in ("mean", "std", "best", "worst", "parameters")] == pytest.approx(moments)
    means = [row["mean"] for row in table]
    assert pd.read_csv(RUNS / "sweeps/study/settings.csv")["mean"].tolist() == sorted(means, reverse=True) == means
    assert (RUNS / "sweeps/study/settings.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert study() == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a process that is forked now must end by it
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
    with subprocess.Popen(["pg_virtualenv", "-t", "sh", "-c", code], text=True, **pipes) as server:
        yield [next(line.strip() for line in server.stdout or [] if line.startswith("--storage"))]
    # cat ends with its input, which is closed now, and the server with cat


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "workers", "deaths", "storage"),
    [
        (STUDY, 1, (5, 12), nullcontext([])),
        (TPE, 1, (5, 12), nullcontext([])),
        (STUDY.replace("heartbeat: 1", "heartbeat: 4"), 2, (STEPS // 2,), nullcontext([])),  # a busy machine is slow
        (STUDY.replace("0.2]", ".1,.2,.3,.4]").replace("heartbeat: 1", "heartbeat: 4"), 3, (STEPS // 2,), database()),
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
            ended = sweep_in(tmp_path / "killed", tiny_root, *where, processes=workers, death=Death(-1, step))
            assert (ended.count(0), ended.count(-signal.SIGKILL)) == (workers - 1, 1)
    if workers == 1:  # otherwise another has resumed the trial
        assert sweep_in(tmp_path / "killed", tiny_root) == [0]
    whole, killed = (rows(folder=tmp_path / name) for name in ("whole", "killed"))
    assert killed == whole
    assert len(runs(tmp_path / "killed")) == len(runs(tmp_path / "whole"))  # each was resumed in its own folder
    if text == TPE:
        drawn = {(lr, size) for (lr, size, *_), _ in whole}
        assert len(drawn) == 3
        assert all(0.01 <= lr <= 0.5 and size in range(40, 61) for lr, size in drawn)


@pytest.mark.slow
def test_workers_are_started_and_watched(study: Command, tiny_root: Path, monkeypatch: Patch, capfd: Capsys) -> None:
    Path("base.yaml").write_text(BASE.replace("data: {", "data: {name: idx, "))  # others know nothing of the tiny set
    raw, text = str(tiny_root / "MNIST" / "raw"), STUDY.replace("heartbeat: 1", "heartbeat: 60")  # none is thought dead
    assert study(text, "--workers", "2", "--data.root", raw) == 0
    assert [row["n"] for row in tried()] == [2, 2]
    assert len(runs()) == capfd.readouterr().out.count(" s\n") == 4
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert study(text.replace("seeds: 2", "seeds: 3"), "--workers", "2", "--data.root", raw) == 3
    assert "worker 1 ended with status 1" in capfd.readouterr().out


def stop(status: int) -> None:
    if status == 3:
        raise TrainingFailed("no space left") from OSError(28, "No space left on device")
    os.kill(os.getpid(), status - 128)


BATCH, SAY = (Progress, "on_train_batch_end"), (sweep.Worker, "say")


@pytest.mark.parametrize(
    ("moment", "status"),
    [(BATCH, 143), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((BATCH, 130), (SAY, 143), (BATCH, 3)))],
)
def test_the_same_command_continues_a_sweep(study: Command, command: Command, moment: Any, status: int) -> None:
    with at_call(1, partial(stop, status), *moment):
        assert study() == status
    if trained_on := status == 130:  # by its user: the sweep leaves this run alone
        assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert study() == 0
    assert [(row["n"], row["reason"]) for row in tried()] == [(2, None)] * 2
    assert len(runs()) == 4 + trained_on


@pytest.mark.slow
def test_no_configuration_is_trained_twice_and_what_failed_can_be_tried_again(study: Command) -> None:
    assert study("base: base.yaml\nsettings: {model.lr: [0.1]}\nseeds: 1\nsampler: random\nsamples: 3\n") == 0
    assert [row["reason"] for row in tried()] == [None, "drawn before", "drawn before"]
    text = "base: base.yaml\nsettings: {trainer.val_check_interval: [2, 1000]}\nseeds: 1\n"
    with at_call(1, partial(fail, TrainingFailed("no luck")), *BATCH):
        assert study(text, "--name=failed") == 3
    found = {row["trainer.val_check_interval"]: row["reason"] for row in tried("failed")}
    assert found[2] == "no luck"
    assert "val_check_interval" in found[1000]  # which only the trainer refuses
    assert study(text, "--name=failed", "--retry") == 0
    assert [row["n"] for row in tried("failed")] == [1, 0]
    assert study("base: base.yaml\nseeds: 1\ncompare: val/f1\nmode: max\nof: last\n", "--name", "f1") == 3
    assert tried("f1")[0]["reason"].startswith("val/f1 was not logged, but ")


@pytest.mark.slow
def test_the_test_set_is_scored_for_the_chosen_configuration_alone(study: Command, capsys: Capsys) -> None:
    assert study() == 0
    checkpoint = next(RUNS.glob(f"{tried()[0]['trials'][1]['run']}/checkpoints/best-*"))
    checkpoint.rename("elsewhere")
    assert "(seed 2" in fails(capsys, STUDY, "--test", run=study, status=3)
    Path("elsewhere").rename(checkpoint)
    assert study(STUDY, "--test") == 0
    table = tried()
    found = {run: read_results(RUNS / run).get("test") for run in runs()}
    tested = {run: tests[-1]["test/accuracy"] for run, tests in found.items() if tests}
    assert {trial["run"]: trial["test/accuracy"] for trial in table[0]["trials"]} == tested
    assert table[0]["test/accuracy"] == pytest.approx(statistics.mean(tested.values()))
    assert "Test set, test/accuracy: " in capsys.readouterr().out
    for path in RUNS.glob("version_*/checkpoints/*"):
        path.unlink()
    assert study(STUDY, "--test") == 0  # the scores are kept


def test_recipes_are_compared_and_the_study_keeps_its_own(study: Command) -> None:
    recipes = [Path("base.yaml"), Path("other.yaml")]
    recipes[1].write_text(BASE.replace("8x5", "4x5"))
    text = "settings: {config: [base.yaml, other.yaml], model.lr: 0.1}\nseeds: 1\ncompare: val/loss\nof: last\n"
    with at_call(2, lambda: list(map(Path.unlink, recipes)), sweep.Worker, "train_run"):
        assert study(text) == 0
    table = tried()
    assert {row["config"]: row["parameters"] for row in table} == {"base.yaml": 1570, "other.yaml": 886}
    assert table[0]["mean"] < table[1]["mean"]
    for row in table:
        fit = read_results(RUNS / row["trials"][0]["run"])["fit"]
        assert (fit["model"]["lr"], fit["metrics"]["val/loss"]) == (0.1, row["mean"])


@pytest.mark.slow
def test_a_study_may_grow_and_not_change(study: Command, capsys: Capsys) -> None:
    assert study() == 0
    before = rows()
    for text, name in ((STUDY.replace("0.2", "0.3"), "settings"), (STUDY.replace("seeds: 2", "seeds: 1"), "seeds")):
        assert f"error: {name} changed" in fails(capsys, text, run=study)
    assert study(STUDY.replace("seeds: 2", "seeds: 3")) == 0
    assert len(runs()) == 6
    assert {key[0]: values[:2] for key, values in rows()} == {key[0]: values for key, values in before}
    Path("base.yaml").write_text(BASE.replace("max_epochs: 1", "max_epochs: 2"))
    assert "recipes changed" in fails(capsys, STUDY.replace("seeds: 2", "seeds: 3"), run=study)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("settings: {modle.lr: [1]}", "modle.lr"),
        ("settings: {seed_everything: [1, 2]}", "settings.seed_everything"),
        ("settings: {model.lr: [0.1, -1.0]}", "got -1.0"),
        ("sampler: tpe\nsamples: 2\nsettings: {model.lr: {low: 0.1}}", "settings.model.lr"),
        ("settings: {model.lr: {low: 0.1, high: 1.0}}", "settings.model.lr"),
        ("seeds: 0", "got 0"),
        ("sampler: tpe", "samples"),
        ("compare: test/accuracy", "got test/accuracy"),
        ("compare: val/f1", "val/f1"),
        ("--storage=mysql+nothing://user:secret@host/db", "--storage"),
    ],
)
def test_bad_studies(text: str, named: str, study: Command, capsys: Capsys) -> None:
    err = fails(capsys, *([STUDY, text] if text.startswith("--") else [text]), run=study)
    assert named in err
    assert "secret" not in err
    assert not runs()


# differences of 1, 2, 3 thousandths: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
HALF = 0.001 * 4.302653 / math.sqrt(3)


@pytest.mark.parametrize(
    ("second", "seeds", "expected", "words"),
    [
        ([0.990, 0.991, 0.992], [1, 2, 3], [0.002, 0.002 - HALF, 0.002 + HALF], "no difference can be seen"),
        ([0.980, 0.982, 0.984], [1, 2, 3], [0.011, None, None], ""),
        ([0.980, 0.983, 0.984], [1, 2, 3], [0.010667, 0.009232, 0.012101], "a real difference"),
        ([0.990], [1], [0.001, None, None], ""),
    ],
)
def test_the_difference_is_paired(second: list[float], seeds: list[int], expected: list[Any], words: str) -> None:
    trials = [[{"seed": s, "value": v} for s, v in enumerate(one, 1)] for one in ([0.991, 0.993, 0.995, 0.5], second)]
    table = pd.DataFrame({"model.lr": [0, 1, 2], "trials": [*trials, trials[1]]})
    found = comparison.difference(table.iloc[0], table.iloc[1])
    assert found["seeds"] == seeds
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx(expected, abs=1e-6)
    plan = Study(settings={"model.lr": [0, 1, 2]})
    best, *against, biased = comparison.in_words(plan, table, found)
    assert (best, len(against), "biased" in biased) == ("Best: lr 0", bool(words), True)
    assert not words or words in against[0]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "sweeps").iterdir()), ids=lambda path: path.stem)
def test_the_studies_of_this_repository(path: Path, study: Command, tmp_path: Path) -> None:
    assert study(path.read_text(), "--workers", "0", "--name", path.stem, "--root_dir", str(tmp_path)) == 0
    assert not read_results(tmp_path / RUNS / "sweeps" / path.stem)["settled"]
