import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import several
import torch
from helpers import REPOSITORY, RUN, Command, Outcome, Patch, assert_same
from helpers import scalars as curve
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from several import Death
from test_resume import state

from lit_mnist.data import datamodule, datasets
from lit_mnist.exact.runs import read_results

# 350 images to train on: 4 batches of 87 and one of 2, of which one of three processes, or two of four, have none
SETTINGS = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
SETTINGS += ["--model.layers", "4x5/2 8/2", "--model.lr", "0.05", "--model.ema_decay", "0.5", "--data.batch_size", "87"]
SETTINGS += ["--data.val_size", "50", "--checkpoint.every_n_steps", "1", "--trainer.enable_model_summary", "false"]
EXACT = [*SETTINGS, "--trainer.precision", "64-true", "--data.rotation", "8", "--model.label_smoothing", "0.1"]
DROPOUT = [*SETTINGS, "--model.dropout", "0.1"]
JOB = dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"), "2")
JOB |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_NAME": "digits"}
# the environments of two processes as srun sets them
SLURM = [{**JOB, "SLURM_JOB_ID": "1234", "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
Run = Callable[..., list[Outcome]]


@pytest.fixture
def alone(command: Command, monkeypatch: Patch) -> Command:
    monkeypatch.setattr(datamodule, "EVALUATION_BATCH_SIZE", 11)
    return command


@pytest.fixture
def run(command: Command, tiny_root: Path) -> Run:
    def run(processes: int, name: str, *flags: str, **kwargs: Any) -> list[Outcome]:
        flags = name, "--data.root", str(tiny_root), *flags
        return several.run(processes, flags, Path.cwd(), datasets.FILES, **kwargs)

    return run


def trained(run: Run, processes: int, *flags: str) -> Path:
    assert {outcome.status for outcome in run(processes, "fit", *flags)} == {0}
    return Path(shutil.move("lightning_logs/version_0", "uninterrupted"))


def losses(run: Path) -> dict[str, list[float]]:
    chosen = "train/loss", "train/accuracy", "val/", "norm/", "answers/"
    return {tag: [value for _, value in points] for tag, points in curve(run).items() if tag.startswith(chosen)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_curve_is_that_of_one_process(run: Run, alone: Command, processes: int) -> None:
    assert alone("fit", *EXACT) == 0
    outcomes = run(processes, "fit", *EXACT, environment=SLURM if processes == 2 else None)
    assert [outcome.status for outcome in outcomes] == [0] * processes
    assert "Epoch 1: train loss" in outcomes[0].out
    assert outcomes[0].err + "".join(outcome.out + outcome.err for outcome in outcomes[1:]) == ""
    ours, theirs = (Path(f"lightning_logs/version_{version}") for version in (1, 0))
    expected = losses(theirs)
    assert len(expected["train/loss_step"]) == 10
    for tag, values in losses(ours).items():  # events hold 32 bits
        assert values == pytest.approx(expected[tag], rel=3e-7), tag
    # every picture of the board and the PR curves, drawn from the answers of all processes
    assert curve(ours).keys() == curve(theirs).keys()
    torch.testing.assert_close(state(ours)["state_dict"], state(theirs)["state_dict"], rtol=1e-9, atol=1e-11)
    assert [read_results(path)["fit"]["processes"] for path in (ours, theirs)] == [processes, 1]
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == ["version_0", "version_1"]


@pytest.mark.slow
def test_every_image_is_scored_once(run: Run, alone: Command) -> None:
    assert alone("fit", *SETTINGS) == 0
    scores, losses = set(), []
    for processes in (1, 2, 3, 4):
        (first, *others) = run(processes, "test", "--ckpt_path", "best")
        assert first.status == 0
        assert f"/{100} (" in first.out
        assert [other.out for other in others] == [""] * (processes - 1)
        test = read_results(RUN)["test"][-1]
        assert (test["processes"], test["samples"]) == (processes, 100)
        scores.add((test["test/accuracy"], first.out, run(processes, "validate", "--ckpt_path", "best")[0].out))
        losses.append(test["test/loss"])
    ((*_, validated),) = scores
    assert "/50 (" in validated
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


KILLS = [(2, 0, 1), (2, 1, 4), (2, 0, 5), (3, 2, 5), (3, 1, 8), (4, 1, 4), (4, 3, 6), (4, 0, 9)]


@pytest.mark.parametrize(
    ("processes", "rank", "step"), [(2, 1, 6), *(pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS)]
)
def test_resume_is_exact(run: Run, processes: int, rank: int, step: int) -> None:
    uninterrupted = trained(run, processes, *DROPOUT)
    started = monotonic()
    outcomes = run(processes, "fit", *DROPOUT, death=Death(rank, step))
    assert monotonic() - started < 60
    resume = "to resume: python -m lit_mnist fit --ckpt_path lightning_logs/version_0/checkpoints/last"
    assert outcomes.pop(rank).status == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.status == 3
        assert "another process of this run was lost" in outcome.err
        assert resume in outcome.err
    if rank:  # the first could say so
        assert read_results(RUN)["fit"]["state"] == "interrupted"
    resumed = run(processes, "fit", "--ckpt_path", "last")
    assert {outcome.status for outcome in resumed} == {0}
    assert "processes:" not in resumed[0].out
    ours = state(RUN)
    assert_same(ours, state(uninterrupted))
    own, other = (process["random"]["torch"] for process in ours["processes"][:2])
    assert not torch.equal(own, other)  # for dropout
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (4, 2)])
def test_resume_on_another_number(run: Run, alone: Command, before: int, after: int) -> None:
    assert alone("fit", *EXACT) == 0
    run(before, "fit", *EXACT, death=Death(before - 1, 4))
    first = run(after, "fit", "--ckpt_path", "last")[0]
    assert first.status == 0
    assert f"processes: {before} -> {after} (the same batches, but the last bits may differ)" in first.out
    ours, theirs = (losses(Path(f"lightning_logs/version_{version}")) for version in (1, 0))
    for tag, values in ours.items():
        assert values == pytest.approx(theirs[tag], rel=3e-7), tag


def test_a_signal_to_one_stops_all(run: Run) -> None:
    flags = [*DROPOUT, "--trainer.max_epochs", "8", "--checkpoint.every_n_steps", "0"]
    uninterrupted = trained(run, 2, *flags)
    first, second = run(2, "fit", *flags, death=Death(1, 6, signal.SIGTERM))
    assert first.status == second.status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; to resume: python -m lit_mnist fit --ckpt_path lightning_logs" in first.err
    assert second.err == ""
    assert {outcome.status for outcome in run(2, "fit", "--ckpt_path", "last")} == {0}
    assert_same(state(RUN), state(uninterrupted))


@pytest.mark.slow
def test_waiting_for_a_silent_one_ends(run: Run, alone: Command) -> None:
    started = monotonic()
    first, second = run(2, "fit", *SETTINGS, "--processes.timeout", "4", death=Death(1, 5, signal.SIGSTOP), longest=30)
    assert monotonic() - started < 60
    assert first.status == 3
    assert "another process of this run was lost" in first.err
    assert second.status == -signal.SIGKILL  # by this test, at last
    assert alone("fit", "--ckpt_path", "last") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.batch_size", "1"], "data.batch_size .* got 1"),
        (["--trainer.strategy", "ddp_spawn"], "trainer.strategy .* ddp_spawn"),
        (["--processes.timeout", "0"], "processes.timeout"),
        (["--data.batch_size=349", "--trainer.sync_batchnorm=false"], "trainer.sync_batchnorm .* trainer.precision"),
        (["--trainer.devices", "1"], "1 processes in all, but 2 on each of 1 machines were started"),
    ],
)
def test_bad_input(run: Run, flags: list[str], message: str) -> None:
    first, second = run(2, "fit", *SETTINGS, *flags, environment=SLURM if "--trainer.devices" in flags else None)
    assert (first.status, second.status) == (2, 2)
    (line,) = first.err.splitlines()
    assert re.search(message, line)
    assert second.err == ""
    assert not Path("lightning_logs").exists()


def test_a_launch_leaves_nothing_in_the_environment(alone: Command, monkeypatch: Patch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    names = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"}
    assert alone("fit", *SETTINGS, "--trainer.strategy", "ddp") == 0
    assert names & os.environ.keys() == {"MASTER_ADDR"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_real_launchers(real_root: Path, command: Command, launcher: str) -> None:
    flags = ["-m", "lit_mnist", "fit", "--data.root", str(real_root.resolve()), "--trainer.accelerator", "cpu"]
    flags += [f"--config={REPOSITORY}/configs/{name}.yaml" for name in ("smoke", "ddp")]
    flags += ["--trainer.limit_train_batches", "4"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(find_free_network_port())]
    flags = [*torchrun, *flags] if launcher == "torchrun" else [*flags, "--trainer.devices", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    done = subprocess.run([sys.executable, *flags], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Epoch 1: train loss") == 1
    assert read_results(RUN)["fit"]["processes"] == 2
