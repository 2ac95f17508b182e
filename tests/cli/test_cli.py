import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist import __version__
from lit_mnist.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"]
TINY += ["--model.layers", "4x5/2 8/2", "--model.lr", "0.05", "--data.batch_size", "50", "--data.val_size", "50"]
Command = Callable[..., int]


def only(pattern: str) -> Path:
    (path,) = Path().glob(pattern)
    return path


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_then_validate_test_predict(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    out = capsys.readouterr().out
    line = r"^Epoch (\d): train loss \d\.\d{4}, val loss \d\.\d{4}, val accuracy (\d+\.\d\d) %, \d+\.\d s"
    lines = re.findall(line, out, re.M)
    assert [epoch for epoch, _ in lines] == ["0", "1"]
    best_accuracy = max(float(accuracy) / 100 for _, accuracy in lines)
    assert "tensorboard --logdir lightning_logs" in out

    run = Path("lightning_logs/version_0")
    best = only(f"{run}/checkpoints/best-*.ckpt")
    last = only(f"{run}/checkpoints/last-*.ckpt")
    assert re.fullmatch(rf"best-epoch=0[01]-accuracy={best_accuracy:.4f}\.ckpt", best.name)
    assert re.fullmatch(rf"last-epoch=01-step=000014-accuracy={float(lines[1][1]) / 100:.4f}\.ckpt", last.name)
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 1
    results = json.loads((run / "results.json").read_text())["fit"]
    assert (results["epochs"], results["steps"]) == (2, 14)
    assert results["parameters"] == 100 + 8 + 288 + 16 + 90
    assert results["best"] == {"checkpoint": best.name, "val/accuracy": pytest.approx(best_accuracy)}
    assert results["samples_per_second"] == pytest.approx(700 / results["train_seconds"], rel=0.01)
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0]

    board = scalars(run)
    assert [step for step, _ in board["train/loss_step"]] == [1, 3, 5, 7, 9, 11, 13]
    assert [step for step, _ in board["val/loss"]] == [6, 13]
    assert [epoch for epoch, _ in board["by_epoch/val/accuracy"]] == [0, 1]
    assert [epoch for epoch, _ in board["by_epoch/train/loss"]] == [0, 1]
    assert [value for _, value in board["val/accuracy"]] == pytest.approx(
        [float(accuracy) / 100 for _, accuracy in lines]
    )
    assert {"train/loss", "train/accuracy", "train/learning_rate", "train/samples_per_second"} <= board.keys()

    # another batch size, another seed: the same held-out images, and the checkpoint's network without saying so
    assert command("validate", "--ckpt_path", "best", "--trainer.accelerator", "cpu", "--seed_everything", "3") == 0
    out = capsys.readouterr().out
    assert f"Checkpoint: {best}" in out
    assert f"accuracy {round(50 * best_accuracy)}/50" in out

    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    out = capsys.readouterr().out
    assert f"Checkpoint: {last}" in out
    tested = re.search(r"^Test set: average loss (\d\.\d{4}), accuracy (\d+)/100 \((\d+\.00) %\)$", out, re.M)
    assert tested
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["test/accuracy"] == int(tested[2]) / 100
    assert results["test"]["checkpoint"] == last.name
    assert results["fit"]["epochs"] == 2
    ((step, value),) = scalars(run)["test/accuracy"]
    assert step == 14
    assert value == pytest.approx(int(tested[2]) / 100)

    assert command("predict", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    with only(f"{run}/predictions-last-*.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(100))
    probabilities = torch.tensor([[float(row[f"p{digit}"]) for digit in range(10)] for row in rows])
    assert torch.allclose(probabilities.sum(1), torch.ones(100), atol=1e-4)
    assert probabilities.argmax(1).tolist() == [int(row["digit"]) for row in rows]
    assert sum(int(row["digit"]) == index % 10 for index, row in enumerate(rows)) == int(tested[2])
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


def test_without_validation_there_is_a_last_checkpoint(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY, "--data.val_size", "0") == 0
    assert "validation loss" not in capsys.readouterr().out
    assert [path.name for path in Path("lightning_logs/version_0/checkpoints").iterdir()] == [
        "last-epoch=01-step=000016.ckpt"
    ]
    assert command("test", "--ckpt_path", "best") == 2
    assert "--ckpt_path best: no run under lightning_logs has a best checkpoint" in capsys.readouterr().err
    assert command("validate", "--ckpt_path", "last") == 2
    assert "data.val_size is 0" in capsys.readouterr().err


def test_equal_runs_are_equal_and_seeds_matter(command: Command) -> None:
    for seed in ("1", "1", "2"):
        assert command("fit", *TINY, "--seed_everything", seed) == 0
    weights = [
        torch.load(only(f"lightning_logs/version_{run}/checkpoints/last-*"), weights_only=True)["state_dict"]
        for run in range(3)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["network.head.weight"], weights[2]["network.head.weight"])
    assert yaml.safe_load(Path("lightning_logs/version_2/config.yaml").read_text())["seed_everything"] == 2


def test_fit_goes_on_in_the_same_run(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    assert command("fit", "--ckpt_path", "last") == 0
    assert "this run has finished (2 epochs, 14 steps)" in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert re.search(r"^Epoch 2: ", capsys.readouterr().out, re.M)
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]
    run = Path("lightning_logs/version_0")
    assert only(f"{run}/checkpoints/last-*").name.startswith("last-epoch=02")
    assert [step for step, _ in scalars(run)["val/loss"]] == [6, 13, 20]
    results = json.loads((run / "results.json").read_text())["fit"]
    assert (results["epochs"], results["data"]["batch_size"]) == (3, 50)
    accuracies = [value for _, value in scalars(run)["val/accuracy"]]
    assert results["best"]["val/accuracy"] == pytest.approx(max(accuracies))


def test_a_setting_that_is_gone_is_not_dropped_in_silence(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    last = only("lightning_logs/version_0/checkpoints/last-*")
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["hyper_parameters"]["mixup"] = 0.2
    torch.save(checkpoint, last)
    capsys.readouterr()
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.mixup: 0.2 -> no longer a setting" in lines
    assert not [line for line in lines if "no longer" in line and "mixup" not in line]


def test_the_precision_is_what_the_processor_has_and_stays_that_of_the_run(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = "--trainer.precision", "auto"
    run = Path("lightning_logs/version_0")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert command("fit", *TINY, *auto) == 0
    assert "Precision: bf16-mixed, as the processor has AMX\n" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", *auto) == 0
    out = capsys.readouterr().out
    assert "Precision: bf16-mixed, as the run has it\n" in out
    assert "trainer.precision" not in out
    assert json.loads((run / "results.json").read_text())["fit"]["settings"]["trainer.precision"] == "bf16-mixed"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    assert command("fit", *TINY, *auto) == 0
    assert "Precision: 32-true, as the processor has no AMX\n" in capsys.readouterr().out
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", "--trainer.precision", "bf16-mixed") == 0
    assert "trainer.precision: 32-true -> bf16-mixed" in capsys.readouterr().out


def test_a_time_limit_on_a_resumed_run(command: Command) -> None:
    assert command("fit", *TINY, "--trainer.max_time", "00:00:10:00") == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", "--trainer.max_time", "00:00:10:00") == 0
    assert only("lightning_logs/version_0/checkpoints/last-*").name.startswith("last-epoch=02")
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", "--trainer.max_time", "00:00:00:00") == 0


def test_config_yaml_repeats_a_run(command: Command) -> None:
    assert command("fit", *TINY, "--trainer.max_epochs", "1") == 0
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert command("fit", "--config", "lightning_logs/version_0/config.yaml") == 0
    resumed, repeated = (
        torch.load(only(f"lightning_logs/version_{run}/checkpoints/last-*"), weights_only=True) for run in range(2)
    )
    assert resumed["global_step"] == repeated["global_step"] == 14
    assert resumed["hyper_parameters"] == repeated["hyper_parameters"]
    assert resumed["datamodule_hyper_parameters"] == repeated["datamodule_hyper_parameters"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--foo", "3"], "unrecognized arguments: --foo 3"),
        (["--data.val_size", "60000"], "data.val_size must be in 0..59999, got 60000"),
        (["--data.val_size", "many"], "data.val_size: expected int, got many"),
        (
            ["--model.lr", "-1", "--model.warmup", "3"],
            "model.lr must be in (0, 1e30], got -1.0; model.warmup must",
        ),
        (["--model.optimizer", "adam"], "model.optimizer: expected 'sgd', 'adamw', got adam"),
        (
            ["--model.layers", "16 x"],
            "model.layers must be words such as 16, 16x5, 16x5v, 16x5d+, 16/2, pool, crop2 or again, got 'x' in '16 x'",
        ),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs: expected int or null, got x"),
        (["--seed_everything", "true"], "seed_everything"),
        (["--seed_everything", "-1"], "seed_everything"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "typo.yaml"], "model.lrr' (in typo.yaml or a flag)"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--ckpt_path", "last"], "--ckpt_path last: no run under lightning_logs has a last checkpoint"),
        (["--ckpt_path", "typo.yaml"], "--ckpt_path typo.yaml: that file is no intact checkpoint"),
        (["--trainer.default_root_dir", "typo.yaml"], "trainer.default_root_dir: no run can be written to "),
        (["--config", "latin.yaml"], "latin.yaml"),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs must be a positive number"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs must be a number from 1 or -1, got 0"),
        (["--trainer.max_epochs", "null"], "trainer.max_epochs must be a positive number"),
        (["--trainer.max_steps", "0"], "trainer.max_steps must be a number from 1 or -1, got 0"),
        (["--trainer.check_val_every_n_epoch", "0"], "check_val_every_n_epoch must be a number from 1, got 0"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches must be a number from 1, got 0"),
        (["--trainer.accumulate_grad_batches", str(2**64)], f"accumulate_grad_batches must be less than {2**31}"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval must be a share of an epoch or at least"),
        (["--trainer.callbacks", "LearningRateFinder"], "trainer.callbacks must have no LearningRateFinder"),
        (["--config", "pipe"], "--config pipe: that file is a named pipe"),
        (["--trainer.strategy", "ddp_notebook"], "trainer.strategy must be auto or ddp, got ddp_notebook"),
        (["--trainer.accelerator", "tpu"], "torch_xla"),
        (["--trainer.precision", "transformer-engine"], "transformer_engine"),
        (["--trainer.profiler", "xla"], "trainer.profiler must be simple, advanced, pytorch or a class, got xla"),
        (["--model.weight_decay", "1e300"], "model.weight_decay must be in [0, 1e6], got 1e+300"),
        (["--config", "n" * 300], "n" * 300),
        (["--ckpt_path", "n" * 300], "that file cannot be read (File name too long)"),
        (["--data.root", "~nobody-here/x"], "data.root ~nobody-here/x: there is no such home folder"),
        (["--trainer.default_root_dir", "~nobody-here/x"], "trainer.default_root_dir ~nobody-here/x: there is no such"),
    ],
)
def test_bad_input_is_one_line_and_costs_nothing(
    command: Command, capsys: pytest.CaptureFixture[str], flags: Sequence[str], said: str
) -> None:
    Path("typo.yaml").write_text("model:\n  lrr: 0.1\n")
    Path("broken.yaml").write_text("model: [1, 2\n")
    Path("latin.yaml").write_bytes(b"model: \xe9\n")
    os.mkfifo("pipe")
    assert command("fit", *flags) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("lit_mnist: error: ")
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_evaluation_needs_a_checkpoint(command: Command, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert command(name) == 2
    assert f"{name} needs --ckpt_path best, last or the path of a checkpoint" in capsys.readouterr().err


def test_a_callback_that_asks_for_what_there_is_not(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "x"}}]'
    assert command("fit", *TINY, "--trainer.callbacks", stopping) == 3
    error = capsys.readouterr().err
    assert "training stopped: Early stopping conditioned on metric `x` which is not available" in error
    assert error.count("\n") == 1


def test_a_loss_that_is_not_finite(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    kept = {path: path.read_bytes() for path in Path("lightning_logs").rglob("*.ckpt")}
    assert command("fit", *TINY, "--model.lr", "1e30") == 3
    assert "training failed at step 2 of epoch 0: train/loss_step is nan" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept


def test_no_data_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--data.root", "nowhere", "--data.download", "false"]) == 2
    assert "data.download: false" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations(command: Command, path: Path) -> None:
    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
    assert command("fit", "--config", str(path), *quick, "--data.val_size", "50") == 0
    assert only("lightning_logs/version_0/checkpoints/last-*.ckpt").is_file()


def test_version_and_help_do_without_torch() -> None:
    for flag, expected in (("--version", f"lit_mnist {__version__}\n"), ("--help", "usage: python -m lit_mnist")):
        code = f"import sys; from lit_mnist.__main__ import main; main([{flag!r}]); assert 'torch' not in sys.modules"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed.startswith(expected)


def test_validate_does_not_score_training_images(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    assert command("validate", "--ckpt_path", "last", "--data.split_seed", "7") == 2
    assert "data.split_seed was 0 in this run" in capsys.readouterr().err


def test_weights_alone_are_not_gone_on_from(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    last = only("lightning_logs/version_0/checkpoints/last-*")
    loaded = torch.load(last, weights_only=True)
    torch.save({key: value for key, value in loaded.items() if key not in ("loops", "optimizer_states")}, last)
    assert command("fit", "--ckpt_path", "last") == 2
    assert "it holds weights alone" in capsys.readouterr().err


def test_another_network_than_the_checkpoints(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    assert command("test", "--ckpt_path", "last", "--model.layers", "8/2") == 2
    error = capsys.readouterr().err
    assert "its weights do not fit the network of model.layers: 8/2" in error
    assert error.count("\n") == 1


def test_without_a_logger_nothing_of_the_users_is_overwritten(command: Command) -> None:
    Path("config.yaml").write_text("mine")
    Path("results.json").write_text("mine")
    assert command("fit", *TINY, "--trainer.fast_dev_run", "true") == 0
    assert not Path("lightning_logs").exists()
    assert command("fit", *TINY, "--trainer.logger", "false") == 0
    assert Path("config.yaml").read_text() == Path("results.json").read_text() == "mine"
    run = Path("lightning_logs/version_0")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "results.json", ".lock"}
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0  # still without
    assert not list(run.glob("events*"))


def test_a_run_without_checkpoints_stays(command: Command) -> None:
    assert command("fit", *TINY, "--trainer.enable_checkpointing", "false") == 0
    assert json.loads(Path("lightning_logs/version_0/results.json").read_text())["fit"]["state"] == "finished"


def test_nothing_to_train_is_told(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY, "--trainer.limit_train_batches", "0") == 2
    assert "nothing to train: " in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_a_loggers_folder_with_a_config_of_the_users(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hparams.yaml").write_text("mine")
    here = '{"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "", "version": ""}}'
    assert command("fit", *TINY, "--trainer.logger", here) == 2
    assert "hparams.yaml: that file exists; give trainer.logger another place" in capsys.readouterr().err
    assert Path("hparams.yaml").read_text() == "mine"
    assert not Path("lightning_logs").exists()


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "unknown command 'train', allowed are fit, validate, test, predict" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out
    assert main(["fit", "--help"]) == 0
    assert "--model.label_smoothing" in capsys.readouterr().out
