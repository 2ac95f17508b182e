import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import postgres
import pytest
import several
from conftest import REPOSITORY
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pytorch_lightning import Callback, Trainer

from lit_mnist.__main__ import main
from lit_mnist.data import datasets
from lit_mnist.exact.checkpoints import LastCheckpoint
from lit_mnist.sweep import comparison, sweep
from lit_mnist.sweep.comparison import Setting
from lit_mnist.sweep.storage import JournalLock
from lit_mnist.sweep.study import Check, Study

BASE = """\
trainer: {max_epochs: 2, log_every_n_steps: 1}
model: {layers: 8x5/2 16/2, activation: relu, schedule: cosine, ema_decay: 0.0}
data: {val_size: 100, batch_size: 25}
checkpoint: {every_n_steps: 1}
"""
STUDY = "base: base.yaml\nsettings:\n  model.lr: [0.05, 0.2]\nseeds: 2\n"
SWEEP = "sweep", "--config", "study.yaml"


@pytest.fixture
def study(command: Callable[..., int]) -> Callable[..., int]:
    """Sweep with a study file of this text, in the folder of `command`."""
    Path("base.yaml").write_text(BASE)

    def run(text: str = STUDY, *flags: str) -> int:
        Path("study.yaml").write_text(text)
        name, *rest = SWEEP
        return command(name, *rest, *flags)

    return run


def results(name: str = "study", folder: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        ((folder or Path()) / "lightning_logs" / "sweeps" / name / "results.json").read_text()
    )
    return found


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table without times and places: what must not depend on kills and workers."""
    unlike = "seconds", "run", "id", "host", "hardware", "commit"
    table = []
    for row in found["settings_tried"]:
        trials = [{name: value for name, value in trial.items() if name not in unlike} for trial in row["trials"]]
        table.append({name: value for name, value in row.items() if name != "seconds"} | {"trials": trials})
    return table


def runs() -> list[str]:
    return sorted(path.name for path in Path("lightning_logs").glob("version_*"))


def test_each_trial_is_a_run_and_the_table_is_of_their_results(
    study: Callable[..., int], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert study() == 0
    out = capsys.readouterr().out
    assert re.search(r"\[4/4\] lr 0\.2, seed 2: val/accuracy \d+\.\d\d % in \d+\.\d s; best so far lr", out)
    assert runs() == ["version_0", "version_1", "version_2", "version_3"]
    values: dict[float, dict[int, float]] = {0.05: {}, 0.2: {}}
    for run in runs():
        fit = json.loads(Path("lightning_logs", run, "results.json").read_text())["fit"]
        assert fit["state"] == "finished"
        values[fit["model"]["lr"]][fit["data"]["seed"]] = fit["best"]["val/accuracy"]
    found = results()
    for row in found["settings_tried"]:
        expected = values[row["model.lr"]]
        assert {trial["seed"]: trial["value"] for trial in row["trials"]} == expected
        assert row["n"] == 2
        assert row["mean"] == statistics.mean(expected.values())
        assert row["std"] == statistics.stdev(expected.values())
        assert (row["best"], row["worst"]) == (max(expected.values()), min(expected.values()))
        assert row["parameters"] == 8 * 25 + 16 + 16 * 72 + 32 + 170
    means = [row["mean"] for row in found["settings_tried"]]
    assert means == sorted(means, reverse=True)
    folder = Path("lightning_logs", "sweeps", "study")
    with (folder / "settings.csv").open(newline="") as file:
        assert [float(row["mean"]) for row in csv.DictReader(file)] == means
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("settings", "seconds"))
    assert f"Best: lr {found['settings_tried'][0]['model.lr']}" in out

    assert study() == 0
    assert "4 of 4 trials are there already" in capsys.readouterr().out
    assert len(runs()) == 4
    assert main(["runs", "--columns", "run,model.lr,val_accuracy", "--format", "json"]) == 0
    assert {row["model.lr"] for row in json.loads(capsys.readouterr().out)} == {0.05, 0.2}
    assert command("test", "--ckpt_path", "best") == 0


def test_a_killed_study_goes_on_and_ends_as_one_that_was_not(
    study: Callable[..., int], tiny_root: Path, tmp_path: Path
) -> None:
    assert study(STUDY, "--workers", "0") == 0
    assert killed(tmp_path / "whole", tiny_root, 1)[0].status == 0
    for steps in (5, 20, 30):  # a trial has 24 steps
        assert killed(tmp_path / "killed", tiny_root, 1, steps)[0].status == -signal.SIGKILL
    assert killed(tmp_path / "killed", tiny_root, 1)[0].status == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert len(list((tmp_path / "killed" / "lightning_logs").glob("version_*"))) == 4  # each went on in its own run


def outcome(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """The table of a study in this folder."""
    assert main([*SWEEP, "--workers", "0", "--root_dir", str(folder), *flags]) == 0
    found = rows(results(folder=folder))
    assert all(row["n"] == row["trials"][-1]["seed"] for row in found)  # of all seeds
    return found


def killed(
    folder: Path, root: Path, workers: int, step: int | None = None, storage: str | None = None
) -> list[several.Outcome]:
    """Workers of the study in this folder; the last is killed before its training step of this number."""
    folder.mkdir(exist_ok=True)
    for name in ("base.yaml", "study.yaml"):
        (folder / name).write_bytes(Path(name).read_bytes())
    flags = [*SWEEP, "--data.root", str(root), "--worker", "0", *(["--storage", storage] if storage else [])]
    death = several.Death(workers - 1, step) if step else None
    return several.run(workers, flags, folder, datasets.FILES, death, environment=[{}] * workers)


def test_another_worker_takes_up_the_trial_of_a_killed_one(
    study: Callable[..., int], tiny_root: Path, tmp_path: Path
) -> None:
    assert study(STUDY, "--workers", "0") == 0
    assert killed(tmp_path / "one", tiny_root, 1)[0].status == 0
    ended = killed(tmp_path / "two", tiny_root, 2, step=5)
    assert [one.status for one in ended] == [0, -signal.SIGKILL]
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert len(list((tmp_path / "two" / "lightning_logs").glob("version_*"))) == 4


def test_workers_share_a_database(study: Callable[..., int], tiny_root: Path, tmp_path: Path) -> None:
    text = STUDY.replace("seeds: 2", "seeds: 3\nheartbeat: 0.5")
    with postgres.server() as url:
        assert study(text, "--workers", "0") == 0
        assert killed(tmp_path / "one", tiny_root, 1)[0].status == 0
        ended = killed(tmp_path / "three", tiny_root, 3, step=5, storage=url)
        assert [one.status for one in ended] == [0, 0, -signal.SIGKILL]
        assert outcome(tmp_path / "three", "--storage", url) == outcome(tmp_path / "one")
    assert len(list((tmp_path / "three" / "lightning_logs").glob("version_*"))) == 6


def test_a_queue_that_another_worker_has_just_emptied(
    study: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = optuna.Study.ask, []

    def second(self: optuna.Study, fixed_distributions: Any) -> optuna.Trial:
        asked.append(1)
        if len(asked) == 1:
            self.tell(ask(self, fixed_distributions), state=TrialState.FAIL)
        return ask(self, fixed_distributions)

    monkeypatch.setattr(optuna.Study, "ask", second)
    assert study(STUDY.replace("seeds: 2", "seeds: 1")) == 0
    assert [row["n"] for row in results()["settings_tried"]] == [1, 1]
    assert len(asked) == 3


def test_a_worker_on_another_machine_is_given_up_after_its_heartbeat(study: Callable[..., int]) -> None:
    assert study(STUDY + "heartbeat: 0.2\n") == 0
    folder = Path("lightning_logs", "sweeps", "study")
    going = optuna.load_study(
        study_name="study",
        storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"), JournalLock(folder / "journal.log"))),
    )
    attributes = {"sample": 0, "seed": 3, "worker": "far", "host": "elsewhere", "run": "version_9", "id": "unknown"}
    one = going.get_trials()[0]
    going.add_trial(
        optuna.create_trial(
            state=TrialState.RUNNING, params=one.params, distributions=one.distributions, user_attrs=attributes
        )
    )
    assert study(STUDY.replace("seeds: 2", "seeds: 3") + "heartbeat: 0.2\n") == 0
    assert [trial.state.name for trial in going.get_trials()[4:]] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert runs() == [f"version_{number}" for number in range(6)]


def test_several_workers_are_started_and_one_that_fails_is_told(
    study: Callable[..., int], tiny_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tiny_root / "MNIST" / "raw"
    base = BASE.replace("data: {", "data: {name: idx, ")  # processes of their own know nothing of the tiny set
    Path("base.yaml").write_text(base)
    assert study(STUDY, "--workers", "2", "--data.root", str(raw)) == 0
    found = results()
    assert [row["n"] for row in found["settings_tried"]] == [2, 2]
    assert len(runs()) == 4
    out = capsys.readouterr().out
    assert out.count("val/accuracy") == 4 + 1
    broken = Path("broken")
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken.absolute()))
    assert study(STUDY.replace("seeds: 2", "seeds: 3"), "--workers", "2", "--data.root", str(raw)) == 3
    captured = capsys.readouterr()
    assert "worker 1 ended with status 7: it is broken" in captured.out
    assert "the study has not come to its end" in captured.err


def test_what_is_drawn_does_not_depend_on_kills(study: Callable[..., int], tiny_root: Path, tmp_path: Path) -> None:
    ranges = "{model.lr: {low: 0.01, high: 0.5, log: true}, data.batch_size: {low: 40, high: 60}}"
    text = f"base: base.yaml\nsettings: {ranges}\nseeds: 2\nsampler: tpe\nsamples: 3\n"
    assert study(text, "--workers", "0") == 0
    assert killed(tmp_path / "whole", tiny_root, 1)[0].status == 0
    assert killed(tmp_path / "killed", tiny_root, 1, 9)[0].status == -signal.SIGKILL
    assert killed(tmp_path / "killed", tiny_root, 1, 45)[0].status == -signal.SIGKILL
    assert killed(tmp_path / "killed", tiny_root, 1)[0].status == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    drawn = [(row["model.lr"], row["data.batch_size"]) for row in outcome(tmp_path / "whole")]
    assert len(set(drawn)) == 3
    assert all(0.01 <= lr <= 0.5 and 40 <= size <= 60 for lr, size in drawn)


def test_a_setting_that_is_drawn_again_is_not_trained_again(study: Callable[..., int]) -> None:
    text = "base: base.yaml\nsettings: {model.lr: [0.1, 0.2]}\nseeds: 1\nsampler: random\nsamples: 8\n"
    assert study(text) == 0
    assert len(runs()) == 2
    assert sorted(str(row["given_up"]) for row in results()["settings_tried"]) == ["None"] * 2 + ["drawn before"] * 6


def test_poor_settings_are_given_up(study: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    lrs = [0.1, 0.12, 0.14, 0.16, 0.18, 1e-6, 1e20]
    text = f"base: base.yaml\nsettings:\n  model.lr: {lrs}\n  model.layers: [8x5/2, 64x5/2]\n"
    text += "seeds: 2\npruner: median\nmax_parameters: 1000\nkeep: best\n"
    assert study(text) == 0
    found = {(row["model.lr"], row["model.layers"]): row for row in results()["settings_tried"]}
    assert {key[0] for key, row in found.items() if row["n"] == 2} <= set(lrs[:5])
    assert found[1e-6, "8x5/2"]["given_up"].startswith("pruned in epoch ")
    assert "training failed at step" in found[1e20, "8x5/2"]["given_up"]
    assert found[0.1, "64x5/2"]["given_up"] == "2,378 parameters are more than 1,000"
    assert all(row["n"] == 0 for row in found.values() if row["given_up"])
    best = results()["settings_tried"][0]
    kept = {path.parents[1].name for path in Path("lightning_logs").glob("*/checkpoints/*.ckpt")}
    assert kept == {trial["run"] for trial in best["trials"]}
    out = capsys.readouterr().out
    assert "given up (pruned in epoch " in out
    stopped = {json.loads(path.read_text())["fit"]["state"] for path in Path().glob("lightning_logs/*/results.json")}
    assert stopped == {"finished", "interrupted", "failed"}


def test_a_trial_that_takes_too_long_is_given_up_until_it_is_tried_again(
    study: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(STUDY + "max_seconds: 1.0e-9\n") == 3
    assert {row["given_up"] for row in results()["settings_tried"]} == {"took more than 1e-09 s"}
    assert results()["in_words"] == ["No setting came to an end."]
    assert "no setting came to an end; --retry tries again" in capsys.readouterr().err
    monkeypatch.setattr(sweep, "Watch", lambda *_: Callback())
    assert study(STUDY + "max_seconds: 1.0e-9\n", "--retry") == 0
    assert [row["n"] for row in results()["settings_tried"]] == [2, 2]


def test_the_test_set_is_scored_for_the_chosen_setting_alone(
    study: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert study() == 0
    assert not any("test" in json.loads(path.read_text()) for path in Path().glob("lightning_logs/*/results.json"))
    assert study(STUDY, "--test", "--output", "figures") == 0
    table = json.loads(Path("figures", "results.json").read_text())["settings_tried"]
    tested = {
        path.parent.name: json.loads(path.read_text())["test"]["test/accuracy"]
        for path in Path().glob("lightning_logs/*/results.json")
        if "test" in json.loads(path.read_text())
    }
    assert {trial["run"]: trial["test/accuracy"] for trial in table[0]["trials"]} == tested
    assert table[0]["test/accuracy"] == statistics.mean(tested.values())
    assert "test/accuracy" not in table[1]
    assert "Test set, test/accuracy: " in capsys.readouterr().out


def test_what_cannot_be_tested_is_told(study: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    text = "base: base.yaml\nseeds: 2\n"
    assert study(text) == 0
    for path in Path("lightning_logs", "version_1", "checkpoints").iterdir():
        path.unlink()
    assert study(text, "--test") == 3
    captured = capsys.readouterr()
    assert re.search(r"could not score all: version_1 \(seed 2\) has no best-.*ckpt any more\n$", captured.err)
    assert "n = 1" in captured.out


def test_recipes_are_compared_as_well(study: Callable[..., int]) -> None:
    Path("other.yaml").write_text(BASE.replace("8x5", "4x5"))
    text = "settings: {config: [base.yaml, other.yaml], model.lr: 0.1}\nseeds: 1\ncompare: val/loss\nof: last\n"
    assert study(text) == 0
    table = results()["settings_tried"]
    assert {row["config"]: row["parameters"] for row in table} == {"base.yaml": 1570, "other.yaml": 886}
    losses = [row["mean"] for row in table]
    assert losses == sorted(losses)
    for row in table:
        fit = json.loads(Path("lightning_logs", row["trials"][0]["run"], "results.json").read_text())["fit"]
        assert (fit["model"]["lr"], fit["metrics"]["val/loss"]) == (0.1, row["mean"])


def test_a_study_may_grow_and_not_change(study: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert study() == 0
    before = rows(results())
    for text, reason in (
        (STUDY.replace("0.2", "0.3"), "settings was {'model.lr': [0.05, 0.2]} when this study began and is"),
        (STUDY.replace("seeds: 2", "seeds: 1"), "seeds was 2"),
        (STUDY + "compare: val/loss\n", "compare was val/accuracy"),
    ):
        assert study(text) == 2
        assert reason in capsys.readouterr().err
    Path("base.yaml").write_text(BASE.replace("max_epochs: 2", "max_epochs: 3"))
    assert study() == 2
    assert capsys.readouterr().err.startswith("lit_mnist: error: --config study.yaml: base.yaml was another recipe")
    assert len(runs()) == 4
    Path("base.yaml").write_text("# a comment is no change\n" + BASE)
    assert study(STUDY.replace("seeds: 2", "seeds: 3")) == 0
    assert len(runs()) == 6
    for row in rows(results()):
        assert row["n"] == 3
        earlier = next(old for old in before if old["model.lr"] == row["model.lr"])
        assert row["trials"][:2] == earlier["trials"]


def test_a_study_of_which_nothing_has_ended_may_change(study: Callable[..., int]) -> None:
    assert study(STUDY + "max_parameters: 3\n") == 3
    assert study(STUDY) == 0
    assert [row["n"] for row in results()["settings_tried"]] == [2, 2]


def test_a_signal_between_two_trainings_costs_nothing(
    study: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, calls = Check.made, []

    def signalled(self: Check, flags: list[str]) -> Any:
        calls.append(flags)
        if len(calls) == 5:  # three are for the study itself
            os.kill(os.getpid(), signal.SIGTERM)
        return made(self, flags)

    monkeypatch.setattr(Check, "made", signalled)
    assert study() == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "lit_mnist: stopped by SIGTERM; the same line goes on with it\n"
    assert len(runs()) == 1
    assert study() == 0
    assert [(row["n"], row["given_up"]) for row in results()["settings_tried"]] == [(2, None), (2, None)]
    assert len(runs()) == 4


def test_recipes_are_those_of_the_study(study: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    train = sweep.Sweep.train

    def edited(self: sweep.Sweep, trial: optuna.Trial) -> None:
        train(self, trial)
        Path("base.yaml").unlink(missing_ok=True)

    monkeypatch.setattr(sweep.Sweep, "train", edited)
    assert study() == 0
    assert {row["n"] for row in results()["settings_tried"]} == {2}


def test_a_run_that_its_user_trained_on_is_left_to_him(study: Callable[..., int], command: Callable[..., int]) -> None:
    assert study() == 0
    expected = rows(results())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.Watch, "on_train_batch_end", stop_in(step=8))
        assert study(STUDY, "--name", "again") == 128 + signal.SIGINT
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert study(STUDY, "--name", "again") == 0
    assert rows(results("again")) == expected
    assert len(runs()) == 4 + 1 + 4
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0  # the last trial, of lr 0.2
    assert study(STUDY, "--name", "again", "--test") == 3


def stop_in(step: int) -> Callable[..., None]:
    def stop(self: sweep.Watch, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


def test_a_run_that_was_killed_before_its_last_checkpoint_is_resumed(
    study: Callable[..., int],
) -> None:
    def kill(self: LastCheckpoint, *_: Any) -> None:
        raise KeyboardInterrupt

    base = BASE.replace("val_size: 100", "val_size: 0").replace("every_n_steps: 1", "every_n_steps: 5")
    Path("base.yaml").write_text(base)
    text = STUDY.replace("seeds: 2", "seeds: 1\ncompare: train/loss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_end", kill)
        assert study(text) == 128 + signal.SIGINT
    assert study(text) == 0
    assert len(runs()) == 2
    assert (
        sorted(path.name for path in Path().glob("lightning_logs/*/checkpoints/last*"))
        == ["last-epoch=01-step=000032.ckpt"] * 2
    )


def test_a_setting_that_only_the_trainer_refuses_is_given_up(study: Callable[..., int]) -> None:
    text = "base: base.yaml\nsettings: {trainer.val_check_interval: [2, 1000]}\nseeds: 1\n"
    assert study(text) == 0
    found = {row["trainer.val_check_interval"]: row for row in results()["settings_tried"]}
    assert found[2]["n"] == 1
    assert "val_check_interval" in found[1000]["given_up"]
    assert study("base: base.yaml\nseeds: 1\ncompare: val/f1\nmode: max\nof: last\n", "--name", "f1") == 3
    assert results("f1")["settings_tried"][0]["given_up"].startswith("it did not log val/f1, but ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("settings: {modle.lr: [1]}", "settings.modle.lr: there is no such setting"),
        ("settings: {model.rate: [1]}", "settings.model.rate: there is no such setting"),
        ("settings: {seed_everything: [1, 2]}", "settings.seed_everything: seeds are given by `seeds`"),
        ("settings: {data.root: [a, b]}", "settings.data.root: it is given by the flag --data.root"),
        ("settings: {model.lr: [0.1, fast]}", "settings.model.lr: model.lr: expected float, got fast"),
        ("settings: {model.lr: [0.1, -1.0]}", "settings.model.lr: model.lr must be in (0, 1e30], got -1.0"),
        ("settings: {model.lr: []}", "settings.model.lr: a list must hold"),
        ("settings: {model.lr: [0.1, 0.1]}", "settings.model.lr: a list must not hold a value twice"),
        ("settings: {model.lr: {low: 0.1}}", "settings.model.lr: a range has low, high, and log: true or a step"),
        ("settings: {model.lr: {low: 0.1, high: 1.0}}", "settings.model.lr: in a grid a range needs a step"),
        ("settings: {model.layers: {low: 1, high: 2, step: 1}}", "settings.model.layers: a range is for a number"),
        ("settings: {data.batch_size: {low: 1.5, high: 2, step: 1}}", "must be whole numbers"),
        ("settings: {model.lr: {low: 2, high: 1, step: 1}}", "settings.model.lr: low must not be above high"),
        (
            "sampler: random\nsamples: 2\nsettings: {model.dropout: {low: 0, high: 0.5, log: true}}",
            "`low > 0` must hold",
        ),
        (
            "settings: {config: [nowhere.yaml]}",
            "base nowhere.yaml: that recipe cannot be read",
        ),
        ("base: nowhere.yaml", "base nowhere.yaml: that recipe cannot be read (No such file"),
        ("seeds: 0", "seeds must be a number in 1..100000 or a list of different seeds, got 0"),
        ("seeds: [1, 1]", "seeds must be a number in 1..100000 or a list of different seeds, got [1, 1]"),
        ("samples: 3", "samples is for random and tpe"),
        ("sampler: tpe", "samples must be how many settings tpe draws, from 1, got 0"),
        ("sampler: best", "sampler: expected"),
        ("compare: test/accuracy", "compare must be a metric such as val/accuracy"),
        ("compare: val/f1", "mode must be min or max for val/f1"),
        ("heartbeat: 0", "heartbeat must be seconds in"),
        ("max_seconds: -1", "max_seconds must be a number from 0"),
        ("settings: {data.val_size: 0}", "needs held-out images, and data.val_size is 0"),
        ("nonsense: 3", "--config study.yaml: "),
        ("settings: null", "settings must not be null"),
        ("settings: {1: [1, 2]}", "settings must be named"),
        ("settings: {config: [1, 2]}", "settings.config must be a list of recipe files"),
        ("settings: {best.mode: [min, max]}", "settings.best.mode: it is what `mode` says"),
        ("settings: {data.batch_size: {low: 8, high: 64, step: 0}}", "step must be above 0"),
        ("settings: {model.lr: {low: 0.1, high: 1.0, step: 1.0e-9}}", "the grid has more than 100000 combinations"),
        ("seeds: 99999999999999999999999", "seeds must be a number in 1..100000"),
        ("compare: val", "compare must be a metric such as"),
        ("compare: train/loss\npruner: median", "pruner needs a metric of held-out images"),
        ("max_seconds: .inf", "max_seconds must be a number from 0"),
        ("settings: {trainer.fast_dev_run: true}", "settings.trainer.fast_dev_run: a trial is a whole run"),
        ("base: quick.yaml", "the recipe has trainer.fast_dev_run: true, but a trial is a whole run"),
        ("settings: {trainer.devices: [2]}", "settings.trainer.devices: a trial is trained on one device"),
    ],
)
def test_bad_studies(text: str, reason: str, study: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Path("quick.yaml").write_text("trainer: {fast_dev_run: true}")
    assert study(text) == 2
    err = capsys.readouterr().err
    assert err.startswith("lit_mnist: error: ")
    assert err.count("\n") == 1
    assert reason in err
    assert not runs()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--workers", "-1"], "--workers must be a number in 0..1000, got -1"),
        (["--name", "../up"], "--name must be letters"),
        (["--storage", "mysql+nothing://user:secret@host/db"], "that database cannot be used"),
        (["--output", "base.yaml"], "--output base.yaml: File exists"),
        (["--storage", "base.yaml"], "--storage base.yaml: that file is no journal of trials"),
        (["--storage", "/proc/journal"], "--storage /proc/journal: "),
    ],
)
def test_bad_flags(
    flags: list[str], reason: str, study: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(STUDY, *flags) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert "secret" not in err
    assert not runs()


def test_half_a_line_in_a_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.touch()

    def opened() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
        return optuna.create_study(study_name="study", storage=storage, load_if_exists=True)

    opened().set_user_attr("number", 1)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 3].rstrip(b"\n"))
    opened().set_user_attr("number", 2)
    assert opened().user_attrs == {"number": 2}
    assert path.read_bytes().startswith(whole)


def settings(*values: Mapping[int, float]) -> list[Setting]:
    return [
        Setting(number, {"model.lr": number}, dict(value), dict.fromkeys(value, 1.0))
        for number, value in enumerate(values)
    ]


def test_the_difference_is_paired() -> None:
    first, second = settings({1: 0.991, 2: 0.993, 3: 0.995, 9: 0.5}, {1: 0.990, 2: 0.991, 3: 0.992})
    found = comparison.difference(Study(), first, second)
    # differences 1, 2, 3 thousandths: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    half = 4.302653 / math.sqrt(3)
    assert found["seeds"] == [1, 2, 3]
    assert found["mean"] == pytest.approx(0.002)
    assert found["low"] == pytest.approx(0.001 * (2 - half), abs=1e-9)
    assert found["high"] == pytest.approx(0.001 * (2 + half), abs=1e-9)


def test_a_difference_in_words() -> None:
    plan = Study()
    seen = comparison.in_words(plan, settings({1: 0.99, 2: 0.991, 3: 0.992}, {1: 0.98, 2: 0.9815, 3: 0.982}))
    assert seen == [
        "Best: lr 0",
        "It is better than the second, lr 1: +0.98 points (95 % confidence interval +0.91 to +1.06, paired over 3"
        " common seeds).",
    ]
    unseen = comparison.in_words(plan, settings({1: 0.99, 2: 0.97}, {1: 0.98, 2: 0.975}, {1: 0.9, 2: 0.9}))
    assert unseen[1].endswith("no difference can be seen with 2 seeds.")
    assert unseen[2] == "It was chosen among 3 settings by these values, so they flatter it a little."
    assert "one seed, which tells nothing" in comparison.in_words(plan, settings({1: 0.99}, {1: 0.98}))[1]
    losses = comparison.in_words(Study(compare="val/loss"), settings({1: 0.1, 2: 0.2}, {1: 0.3, 2: 0.42}))
    assert losses[1].startswith(
        "It is better than the second, lr 1: -0.2100 (95 % confidence interval -0.3371 to -0.0829"
    )
    alike = comparison.in_words(plan, settings({1: 0.991, 2: 0.992}, {1: 0.990, 2: 0.991}))
    assert alike[1] == "Against the second, lr 1: +0.10 points with each of 2 seeds, which tells nothing of the spread."
    apart = comparison.in_words(plan, settings({1: 0.99}, {2: 0.98}))
    assert apart[1] == "The second, lr 1, has no seed in common with it yet."
    assert comparison.as_row(plan, settings({1: 0.99})[0])["std"] is None


def test_help_and_a_missing_package(study: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--workers" in out
    assert "recipe, a file or a list of them" in out
    code = "import sys; sys.modules['optuna'] = None; from lit_mnist.__main__ import main; sys.exit(main(['sweep']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "lit_mnist: error: sweep needs optuna: pip install 'lit_mnist[sweep]'\n",
    )


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "sweeps").iterdir()), ids=lambda path: path.stem)
def test_the_studies_of_this_repository(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["sweep", "--config", str(path), "--workers", "0", "--root_dir", str(tmp_path)]) == 0
    assert f"{path.stem}: " in capsys.readouterr().out
