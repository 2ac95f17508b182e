import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import RUN, TINY, Capsys, Command, Patch, fails, last_checkpoint, results, scalars

from lit_mnist import __version__
from lit_mnist.__main__ import main
from lit_mnist.cli.cli import Bar
from lit_mnist.exact.checkpoints import Run
from lit_mnist.exact.runs import find_checkpoint

RUNS = RUN.parent


def only(pattern: str) -> Path:
    (path,) = Path().glob(pattern)
    return path


def run_without(packages: list[str], flags: list[str], status: int) -> str:
    """Run a command in a new interpreter, which must not import these packages, and return its output."""
    code = f"import sys; from lit_mnist.__main__ import main; assert main({flags}) == {status}"
    code += f"; assert not set({packages}) & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def config() -> dict[str, Any]:
    return dict(yaml.safe_load((RUN / "config.yaml").read_text()))


def test_fit_then_validate_and_test(command: Command, capsys: Capsys) -> None:
    assert command("fit", *TINY) == 0
    out = capsys.readouterr().out
    lines = re.findall(r"^Epoch (\d): .*val accuracy (\d+\.\d\d) %", out, re.M)
    assert [epoch for epoch, _ in lines] == ["0", "1"]
    accuracies = [float(accuracy) / 100 for _, accuracy in lines]
    best, last = only(f"{RUN}/checkpoints/best-*.ckpt"), only(f"{RUN}/checkpoints/last-*.ckpt")
    assert re.fullmatch(rf"best-epoch=0[01]-accuracy={max(accuracies):.4f}\.ckpt", best.name)
    assert last.name == "last-epoch=01-step=000014.ckpt"
    fit = results()["fit"]
    assert (fit["epochs"], fit["steps"], fit["parameters"]) == (2, 14, 100 + 8 + 288 + 16 + 90)
    assert (fit["best"]["checkpoint"], fit["best"]["val/accuracy"]) == (best.name, pytest.approx(max(accuracies)))
    assert dict(scalars(RUN)["val/accuracy"]) == pytest.approx({6: accuracies[0], 13: accuracies[1]})
    assert [epoch for epoch, _ in scalars(RUN)["by_epoch/train/loss"]] == [0, 1]

    # another seed: the same held-out images, and the checkpoint's network without a flag
    assert command("validate", "--ckpt_path", "best", "--trainer.accelerator", "cpu", "--seed_everything", "3") == 0
    assert f"accuracy {round(50 * max(accuracies))}/50" in capsys.readouterr().out
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    tested = re.search(r"^Test set: average loss \d\.\d{4}, accuracy (\d+)/100 ", capsys.readouterr().out, re.M)
    assert tested
    test = results()["test"][-1]
    assert (test["test/accuracy"], test["checkpoint"]) == (int(tested[1]) / 100, last.name)
    assert dict(scalars(RUN)["test/accuracy"]) == pytest.approx({14: int(tested[1]) / 100})


def test_without_validation_there_is_a_last_checkpoint(command: Command, capsys: Capsys) -> None:
    assert command("fit", *TINY, "--data.val_size", "0") == 0
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["last-epoch=01-step=000016.ckpt"]
    assert "--ckpt_path best: " in fails(capsys, "test", "--ckpt_path", "best", run=command)
    assert "data.val_size" in fails(capsys, "validate", "--ckpt_path", "last", run=command)
    assert "test needs --ckpt_path" in fails(capsys, "test", run=command)


def test_a_run_is_resumed_with_its_config_under_the_flags(command: Command, trained: Path, capsys: Capsys) -> None:
    edited = config() | {"trainer": config()["trainer"] | {"max_epochs": 4, "callbacks": [{"class_path": "Timer"}]}}
    edited["model"] |= {"momentum": 0.8, "mixup": 0.2}
    (RUN / "config.yaml").write_text(yaml.safe_dump(edited))
    assert command("fit", "--ckpt_path", "last", "--model.lr", "0.1", "--trainer.max_epochs", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    changes = {"model.momentum: 0.9 -> 0.8", "model.lr: 0.4 -> 0.1", "trainer.max_epochs: 4 -> 3"}
    assert changes | {"model.mixup: 0.2 -> no longer a setting"} <= set(lines)
    assert last_checkpoint(RUN)["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.8
    assert config()["trainer"]["callbacks"][0]["class_path"] == "pytorch_lightning.callbacks.Timer"
    assert [step for step, _ in scalars(RUN)["val/loss"]] == [17, 35, 53]
    assert command("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", "--trainer.max_epochs", "4") == 0
    assert config()["trainer"]["callbacks"] is None
    (RUN / "config.yaml").unlink()  # then the checkpoint gives its settings
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "5", "--trainer.accelerator", "cpu") == 0
    assert "no config.yaml" in capsys.readouterr().out
    assert (config()["data"]["batch_size"], last_checkpoint(RUN)["global_step"]) == (20, 90)


OTHER = ["fit --model.network mlp", "fit --model.optimizer adamw", "fit --model.dropout 0.1", "fit --model.ema_decay 0"]
OTHER += ["fit --data.name kmnist", "fit --data.val_size 50", "fit --seed_everything 2", "validate --data.split_seed 7"]
OTHER += ["fit --model.activation relu", "fit --model.layers 8/2", "test --model.layers 8/2", "fit --data.split_seed 7"]


@pytest.mark.parametrize("line", OTHER)
def test_what_would_be_another_run_is_refused(command: Command, trained: Path, capsys: Capsys, line: str) -> None:
    before = {path: path.read_bytes() for path in RUN.rglob("*.*") if path.is_file()}
    args = line.split()
    assert re.search(f"{args[1][2:]} was .*{args[2]}", fails(capsys, *args, "--ckpt_path", "last", run=command))
    assert {path: path.read_bytes() for path in RUN.rglob("*.*") if path.is_file()} == before


def test_precision_auto_stays_the_runs(command: Command, capsys: Capsys, monkeypatch: Patch) -> None:
    auto, longer = ("--trainer.precision", "auto"), ("--ckpt_path", "last", "--trainer.max_epochs", "3")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert command("fit", *TINY, *auto) == 0
    assert "Precision: bf16-mixed" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert command("fit", *longer) == 0
    assert "recision: " not in capsys.readouterr().out
    assert config()["trainer"]["precision"] == results()["fit"]["settings"]["trainer.precision"] == "bf16-mixed"
    assert command("fit", *longer, "--trainer.precision", "32-true", "--trainer.max_epochs", "4") == 0
    assert "trainer.precision: bf16-mixed -> 32-true" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)  # a user's bar is the only one
    assert command("fit", *TINY, "--trainer.callbacks", "TQDMProgressBar", "--trainer.fast_dev_run", "true") == 0
    assert "max_epochs=1" in fails(capsys, "fit", *longer, "--trainer.fast_dev_run", "true", run=command)


BAD = """\
--model.lr -1 --model.warmup 3                | model.lr.* -1.0.*model.warmup.* 3.0
--trainer.max_epochs -1                       | trainer.max_epochs.*model.schedule.*-1
--trainer.val_check_interval 00:00:01:00      | trainer.val_check_interval.*00:00:01:00
--trainer.callbacks LearningRateFinder        | LearningRateFinder.*the learning rate
--trainer.callbacks LearningRateMonitor --trainer.logger false | LearningRateMonitor
--trainer.val_check_interval 99               | val_check_interval.*99
--data.shares [1,0.5] --trainer.val_check_interval 5 | data.shares: 4 batches.*val_check_interval
--trainer.strategy ddp_notebook               | trainer.strategy.*auto or ddp.*ddp_notebook
--trainer.limit_train_batches 0               | limit_train_batches
--trainer.callbacks EarlyStoping              | trainer.callbacks: no such class: EarlyStoping
--config typo.yaml                            | lrr.*typo.yaml
"""


@pytest.mark.parametrize("line", BAD.splitlines())
def test_bad_input_costs_nothing(command: Command, capsys: Capsys, line: str) -> None:
    flags, said = line.split(" | ")
    Path("typo.yaml").write_text("model:\n  lrr: 0.1\n")
    assert re.search(f"^lit_mnist: error: .*{said}", fails(capsys, "fit", *TINY, *flags.split(), run=command))
    assert not RUNS.exists()


def test_a_training_that_fails(command: Command, capsys: Capsys) -> None:
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "x"]
    for flags, said in ((stopping, "metric `x`"), (["--model.lr", "1e30"], "train/loss_step is nan")):
        assert said in fails(capsys, "fit", *TINY, *flags, run=command, status=3)


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [(["--version"], 0, __version__), (["runs", "--help"], 0, "--sort"), (["train"], 2, "'train'")],
)
def test_some_answers_do_without_torch(flags: list[str], status: int, said: str) -> None:
    assert said in run_without(["torch", "pandas"], flags, status)


def test_the_first_line_comes_before_torch() -> None:
    code = "import sys; from lit_mnist.__main__ import main; sys.modules['lit_mnist.cli.cli'] = None; main(['fit'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout[:7] == b"Loading"


def test_flags_win_wherever_they_stand(command: Command, capsys: Capsys) -> None:
    def printed(*args: str) -> dict[str, Any]:
        assert main([*args, "--print_config"]) == 0
        return dict(yaml.safe_load(capsys.readouterr().out))

    Path("one.yaml").write_text("trainer: {max_epochs: 9}\nmodel: {lr: 0.3, momentum: 5e-1}\nbest: {mode: max}\n")
    Path("two.yaml").write_text("model: {lr: 0.2}\nseed_everything: 5\n")
    flags = ["--trainer.max_epochs=1", "--config", "one.yaml", "--model.warmup", "0.5", "-ctwo.yaml"]
    for name in ("fit", "test"):
        found = printed(name, *flags, "--trainer.callbacks+", "Timer")
        assert (found["trainer"]["max_epochs"], found["seed_everything"]) == (1, 5)
        assert [found["model"][key] for key in ("lr", "momentum", "warmup")] == [0.2, 0.5, 0.5]
        assert found["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    Path("study.yaml").write_text("seeds: 3\nsettings: {model.lr: [0.1, 0.2]}\n")
    assert printed("sweep", "--seeds", "1", "--config=study.yaml")["seeds"] == 1


def test_a_run_is_known_by_its_files(command: Command, trained: Path, capsys: Capsys) -> None:
    other, renamed = shutil.copytree(RUN, "copies/of it"), Path(shutil.move(RUN, RUNS / "renamed"))
    for run in (renamed, other):
        assert command("fit", "--ckpt_path", str(run), "--trainer.max_epochs", "3") == 0
        assert last_checkpoint(Path(run))["global_step"] == 54
    assert command("test", "--config", f"{renamed}/config.yaml", "--ckpt_path", str(renamed)) == 0
    assert results(renamed)["test"][-1]["checkpoint"].startswith("best-")

    assert command("fit", *TINY, "--trainer.max_epochs", "1", "--name", "zero") == 0
    assert command("fit", *TINY, "--trainer.max_epochs", "1", "--name", "a new one") == 0
    assert find_checkpoint("last", RUNS).parent.parent.name == "a new one"
    for flags in (["zero"], ["../x"], ["x", "--ckpt_path", "last"]):
        assert flags[0] in fails(capsys, "fit", *TINY, "--name", *flags, run=command)
    assert main(["runs", "--columns", "run", "--format", "csv"]) == 0
    assert capsys.readouterr().out.split("\n")[1:] == ["renamed", "zero", "a new one", ""]
    assert Run().claim(RUNS).folder == RUNS.absolute() / "version_0"


def test_what_fit_shows(command: Command, capsys: Capsys, monkeypatch: Patch) -> None:
    shown, get_metrics = list[dict[str, Any]](), Bar.get_metrics

    def spy(*args: Any) -> dict[str, Any]:
        shown.append(get_metrics(*args))
        return shown[-1]

    monkeypatch.setattr(Bar, "get_metrics", spy)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command("fit", *TINY) == 0
    start = capsys.readouterr().out.partition("Epoch 0:")[0]
    for line in ("350 to train on, 50 held out", f" {RUN}\n", f"tensorboard --logdir {RUNS}\n", " 502 parameters"):
        assert line in start
    assert "FLOPs" not in start
    assert [*shown[0]][:2] == ["loss", "time left"]
    assert float(shown[1]["loss"]) == pytest.approx(scalars(RUN)["train/loss_step"][0][1])
    assert shown[-1]["time left"] == "0:00:00"


def test_help_begins_with_what_people_use(capsys: Capsys) -> None:
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(text.index, ("--ckpt_path", "--name", "--data.root"))) < text.index("--trainer.precision")
    assert [word for word in ("known", "EarlyStopping", "hpc") if word in text] == []


TIMER = "--trainer.max_epochs 9999 --trainer.callbacks Timer --trainer.callbacks.duration"
STOPPING = "--trainer.max_epochs 9 --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss"


@pytest.mark.parametrize(
    ("flags", "stopped"),
    [
        ("--trainer.max_epochs 9999 --trainer.max_time 00:00:00:01", "trainer.max_time is used up"),
        (f"{TIMER} 00:00:00:01", "the Timer is"),
        (f"{STOPPING} --trainer.callbacks.min_delta 9 --trainer.callbacks.patience 1", "val/loss did not"),
        ("--trainer.max_steps 14", ""),
    ],
)
def test_what_ended_a_run(command: Command, capsys: Capsys, flags: str, stopped: str) -> None:
    assert command("fit", *TINY, *flags.split()) == 0
    for _ in range(2):  # the second time there is nothing to train
        out = capsys.readouterr().out
        assert [stopped in line for line in out.splitlines() if line.startswith("stopped: ")] == [True] * bool(stopped)
        file, gone = RUN / "config.yaml", "board:\n  histograms: false\n"  # a setting of an earlier version
        file.write_text(file.read_text().replace("board:\n", gone))
        assert command("fit", "--ckpt_path", "last") == 0
    steps, longer = results()["fit"]["steps"], shlex.split(re.findall("python -m lit_mnist (fit .+)", out)[-1])
    assert command(*longer) == 0
    assert results()["fit"]["steps"] > steps
