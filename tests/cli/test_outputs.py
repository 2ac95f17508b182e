import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers import RUN, TINY, Capsys, Command, at_call, fail, fails, results, scalars
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_mnist.__main__ import main

RESUME = ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
LONGER = [*RESUME, "--trainer.log_every_n_steps", "2", "--trainer.enable_model_summary", "false"]
PLAIN = {"checkpoints", "config.yaml", "results.json", ".lock"}  # of a run without TensorBoard


def test_a_pipe_that_is_closed_early() -> None:
    code = "import time; time.sleep(0.2); from lit_mnist.__main__ import main; exit(main(['-h']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def test_a_full_disk(command: Command, trained: Path, capsys: Capsys) -> None:
    before, full = (RUN / "results.json").read_bytes(), partial(fail, OSError(28, "No space left on device"))
    with at_call(1, full, Path, "write_text"):
        assert "results.json" in fails(capsys, "test", "--ckpt_path", "last", run=command, status=3)
    assert (RUN / "results.json").read_bytes() == before
    with at_call(12, full, RecordWriter, "write"):
        error = fails(capsys, "fit", *LONGER, run=command, status=3)
    assert "training stopped: [Errno 28] No space left on device" in error
    assert not list(RUN.rglob("*.tmp"))
    assert command("fit", *LONGER) == 0


def test_an_epoch_shows_only_what_it_computed(command: Command, capsys: Capsys) -> None:
    flags = [*TINY, "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"]
    assert command("fit", *flags, "--checkpoint.every_n_steps", "1") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert ["val loss" in line for line in lines] == [False, True, False]
    assert results()["fit"]["metrics"].keys() == {"train/loss", "train/accuracy"}
    assert next(RUN.glob("checkpoints/last-*")).name == "last-epoch=02-step=000021.ckpt"
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4") == 0
    assert "Epoch 3: train loss" in (out := capsys.readouterr().out)
    assert results()["fit"]["metrics"]["val/loss"] == pytest.approx(scalars(RUN)["val/loss"][-1][1], rel=1e-6)
    assert f"val loss {results()['fit']['metrics']['val/loss']:.4f}" in out


def test_the_best_is_named_beside_its_value(command: Command, capsys: Capsys) -> None:
    assert command("fit", *TINY, "--trainer.max_epochs", "4", "--trainer.val_check_interval", "3") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"Epoch \d:", line)]
    curves, shown = scalars(RUN), ["(best)" in line for line in lines]
    scores = [(a, -b) for (_, a), (_, b) in zip(curves["val/accuracy"], curves["val/loss"], strict=True)]
    # of the two validations of each epoch the latest
    assert shown == [scores[n] == max(scores[: n + 1]) for n in (1, 3, 5, 7)]
    assert shown[:2] == [False, True]


def test_printed_commands_can_be_copied(command: Command, capsys: Capsys) -> None:
    assert command("fit", *TINY, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "a folder") == 0
    out = re.findall(r"^(?:Look at|Test|Train).*: +(tensorboard|python) (.*)", capsys.readouterr().out, re.M)
    lines = [shlex.split(" ".join(line)) for line in out]
    assert lines[0] == ["tensorboard", "--logdir", "a folder/lightning_logs"]
    assert [main(line[3:]) for line in lines[1:]] == [0, 0]


def test_mlflow_continues_in_its_run(command: Command) -> None:
    mlflow = pytest.importorskip("mlflow")
    logger = '{"class_path": "MLFlowLogger", "init_args": {"tracking_uri": "sqlite:///ml.db"}}'
    assert command("fit", *TINY, "--board.every_n_epochs", "0", "--trainer.logger", logger) == 0
    assert command("fit", *RESUME, "--model.lr", "0.1") == 0
    client = mlflow.MlflowClient("sqlite:///ml.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val/loss")] == [6, 13, 20]
    assert (run.data.params["lr"], run.data.tags["lr"]) == ("0.05", "0.1")
    # config.yaml repeats the run, and does not continue its log
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["logger"]["init_args"]["run_id"] is None
    assert {path.name for path in RUN.iterdir()} == PLAIN


@pytest.mark.parametrize("named", ["WandbLogger: Requirement 'wandb", "MLFlowLogger: "])
def test_a_logger_that_cannot_be_made(command: Command, capsys: Capsys, named: str) -> None:
    error = fails(capsys, "fit", *TINY, "--trainer.logger", named.split(":")[0], run=command)
    assert f"trainer.logger: {named}" in error
    assert "pip install" in error or "sqlite:///" in error
    assert not Path("lightning_logs").exists()


def test_without_a_logger_or_checkpoints_nothing_else_is_written(command: Command) -> None:
    assert command("fit", *TINY, "--trainer.fast_dev_run", "true") == 0
    assert not Path("lightning_logs").exists()
    assert command("fit", *TINY, "--trainer.logger", "false") == 0
    assert command("fit", *RESUME) == 0  # still without
    assert {path.name for path in RUN.iterdir()} == PLAIN
    assert command("fit", *TINY, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false") == 0
    assert "finished" in Path("lightning_logs/version_1/results.json").read_text()
    assert [path.name for path in Path().iterdir()] == ["lightning_logs"]
