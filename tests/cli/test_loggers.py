import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import RUN, TINY, Capsys, Command, fails
from pytorch_lightning.loggers import Logger

LONGER = ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
PLAIN = {"checkpoints", "config.yaml", "results.json", ".lock"}  # of a run without TensorBoard


class Remote(Logger):
    """Logs to a run of its own elsewhere, as WandbLogger does, and has no folder."""

    name: Any = "remote"
    version: Any = None

    def __init__(self, version: str | None = None) -> None:
        super().__init__()
        self.version = version or uuid.uuid4().hex[:8]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with Path(f"remote-{self.version}.txt").open("a") as file:
            file.writelines(f"{name} {step}\n" for name in metrics if name == "val/loss")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_remote_logger(command: Command) -> None:
    assert command("fit", *TINY, "--board.every_n_epochs", "0", "--trainer.logger", f"{__name__}.Remote") == 0
    assert command("fit", *LONGER) == 0
    (log,) = Path().glob("remote-*.txt")
    assert log.read_text() == "val/loss 6\nval/loss 13\nval/loss 20\n"
    assert {path.name for path in RUN.iterdir()} == PLAIN
    # config.yaml repeats the run, and does not continue its log
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["logger"]["init_args"]["version"] is None


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


@pytest.mark.parametrize("named", ["WandbLogger: Requirement 'wandb", "MLFlowLogger: "])
def test_a_logger_that_cannot_be_made(command: Command, capsys: Capsys, named: str) -> None:
    error = fails(capsys, "fit", *TINY, "--trainer.logger", named.split(":")[0], run=command)
    assert f"trainer.logger: {named}" in error
    assert "pip install" in error or "sqlite:///" in error
    assert not Path("lightning_logs").exists()


def test_several_loggers_and_the_board(command: Command) -> None:
    both = """[{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "."}},
               {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}]"""
    assert command("fit", *TINY, "--trainer.logger", both, "--board.every_n_epochs", "1") == 0
    assert command("fit", *LONGER) == 0
    assert list(RUN.glob("events.out.tfevents.*"))
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    (table,) = Path("elsewhere").rglob("metrics.csv")
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    assert [row[header.index("step")] for row in rows if row[header.index("val/loss")]] == ["6", "13", "20"]


def test_without_a_logger_or_checkpoints_nothing_else_is_written(command: Command) -> None:
    for name in ("config.yaml", "results.json"):
        Path(name).write_text("mine")
    assert command("fit", *TINY, "--trainer.fast_dev_run", "true") == 0
    assert not Path("lightning_logs").exists()
    assert command("fit", *TINY, "--trainer.logger", "false") == 0
    assert command("fit", *LONGER) == 0  # still without
    assert {path.name for path in RUN.iterdir()} == PLAIN
    assert command("fit", *TINY, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false") == 0
    assert "finished" in Path("lightning_logs/version_1/results.json").read_text()
    assert Path("config.yaml").read_text() == Path("results.json").read_text() == "mine"
