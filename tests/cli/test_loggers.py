from pathlib import Path

import pytest
import yaml
from helpers import RUN, TINY, Capsys, Command, fails

LONGER = ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
PLAIN = {"checkpoints", "config.yaml", "results.json", ".lock"}  # of a run without TensorBoard


def test_mlflow_continues_in_its_run(command: Command) -> None:
    mlflow = pytest.importorskip("mlflow")
    logger = '{"class_path": "MLFlowLogger", "init_args": {"tracking_uri": "sqlite:///ml.db"}}'
    assert command("fit", *TINY, "--board.every_n_epochs", "0", "--trainer.logger", logger) == 0
    assert command("fit", *LONGER, "--model.lr", "0.1") == 0
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
    assert command("fit", *LONGER) == 0  # still without
    assert {path.name for path in RUN.iterdir()} == PLAIN
    assert command("fit", *TINY, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false") == 0
    assert "finished" in Path("lightning_logs/version_1/results.json").read_text()
    assert [path.name for path in Path().iterdir()] == ["lightning_logs"]
