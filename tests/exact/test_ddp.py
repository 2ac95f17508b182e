import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, RUN, TINY, Command, Death, assert_alike, in_processes, last_checkpoint, run_on
from helpers import scalars as curve
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning import LightningModule, Trainer
from torch import nn

from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.exact.ddp import ExactDDP
from lit_mnist.exact.runs import read_results

# 350 images to train on: 4 batches of 87 and one of 2, of which one of three processes, or two of four, have none
SETTINGS = [*TINY, "--trainer.log_every_n_steps", "1", "--model.ema_decay", "0.5", "--data.batch_size", "87"]
SETTINGS += ["--data.shares", "[1, 0.8]"]  # 4 batches in the second epoch
SETTINGS += ["--checkpoint.every_n_steps", "1", "--trainer.enable_model_summary", "false"]
EXACT = [*SETTINGS, "--trainer.precision", "64-true", "--data.rotation", "8", "--model.label_smoothing", "0.1"]
DROPOUT = [*SETTINGS, "--model.dropout", "0.1"]
JOB = dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"), "2")
JOB |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_NAME": "digits"}
# the environments of two processes as srun sets them
SLURM = [{**JOB, "SLURM_JOB_ID": "1234", "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
Run = Callable[..., list[Any]]


@pytest.fixture
def run(command: Command, tiny_root: Path) -> Run:
    def run(processes: int, name: str, *flags: str, **kwargs: Any) -> list[Any]:
        flags = name, "--data.root", str(tiny_root), *flags
        return run_on(processes, flags, Path.cwd(), datasets.FILES, **kwargs)

    return run


def trained(run: Run, processes: int, *flags: str) -> Path:
    assert {outcome.status for outcome in run(processes, "fit", *flags)} == {0}
    return Path(shutil.move("lightning_logs/version_0", "uninterrupted"))


def losses(run: Path) -> dict[str, list[float]]:
    chosen = "train/loss", "train/accuracy", "val/", "norm/", "answers/"
    return {tag: [value for _, value in points] for tag, points in curve(run).items() if tag.startswith(chosen)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_curve_is_that_of_one_process(run: Run, processes: int) -> None:
    assert run(1, "fit", *EXACT)[0].status == 0
    outcomes = run(processes, "fit", *EXACT, variables=SLURM if processes == 2 else None)
    assert [outcome.status for outcome in outcomes] == [0] * processes
    assert "Epoch 1: train loss" in outcomes[0].out
    assert outcomes[0].err + "".join(outcome.out + outcome.err for outcome in outcomes[1:]) == ""
    run(processes, "fit", *EXACT, death=Death(processes - 1, 4))
    resumed = run(processes - 1, "fit", "--ckpt_path", "last")[0].out
    assert f"processes: {processes} -> {processes - 1} (the same batches, but the last bits may differ)" in resumed
    theirs, ours, other = (Path(f"lightning_logs/version_{version}") for version in range(3))
    expected = losses(theirs)
    assert len(expected["train/loss_step"]) == 9
    for tag, values in [*losses(ours).items(), *losses(other).items()]:  # events hold 32 bits
        assert values == pytest.approx(expected[tag], rel=3e-7), tag
    # every picture of the board and the PR curves, drawn from the answers of all processes
    assert curve(ours).keys() == curve(theirs).keys()
    weights = [last_checkpoint(path)["state_dict"] for path in (ours, theirs)]
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-11)
    assert [read_results(path)["fit"]["processes"] for path in (ours, theirs)] == [processes, 1]
    assert len(list(Path("lightning_logs").iterdir())) == 3
    # every image is scored once
    best = "--ckpt_path", str(next(theirs.glob("checkpoints/best-*")))
    assert run(1, "test", *best)[0].status == 0
    one = read_results(theirs)["test"][-1]
    assert "/100 (" in run(processes, "test", *best)[0].out
    score = one | {"processes": processes, "test/loss": pytest.approx(one["test/loss"], rel=1e-6)}
    assert read_results(theirs)["test"][-1] == score
    assert "/50 (" in run(processes, "validate", *best)[0].out


KILLS = [(2, 0, 1), (2, 1, 4), (2, 0, 5), (3, 2, 5), (3, 1, 8), (4, 1, 4), (4, 3, 6), (4, 0, 9)]


@pytest.mark.parametrize(
    ("processes", "rank", "step"), [(2, 1, 6), *(pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS)]
)
def test_resume_is_exact(run: Run, processes: int, rank: int, step: int) -> None:
    uninterrupted = trained(run, processes, *DROPOUT)
    outcomes = run(processes, "fit", *DROPOUT, death=Death(rank, step), longest=60)
    assert outcomes.pop(rank).status == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.status == 3
        assert re.search("process of this run was lost .* fit --ckpt_path lightning_logs/version_0/", outcome.err)
    if rank:  # the first could say so
        assert read_results(RUN)["fit"]["state"] == "interrupted"
    resumed = run(processes, "fit", "--ckpt_path", "last")
    assert {outcome.status for outcome in resumed} == {0}
    assert "processes:" not in resumed[0].out
    assert_alike(RUN, uninterrupted)
    own, other = (process["random"]["torch"] for process in last_checkpoint()["processes"][:2])
    assert not torch.equal(own, other)  # for dropout
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


class Adversarial(LightningModule):
    """Two networks that are trained by hand, each without the other, of which one step has two backward passes."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.critic = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.ranks = nn.Buffer(torch.zeros(()))  # broadcast like running statistics

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ranks.add_(self.global_rank)
        optimizers: Any = self.optimizers()
        self.toggle_optimizer(optimizers[1])
        optimizers[1].zero_grad()
        self.manual_backward(self.critic(batch[1]).square().mean())
        self.manual_backward((self.critic(self.answers(batch[0])) - 1).square().mean())
        self.clip_gradients(optimizers[1], 0.1, "norm")
        optimizers[1].step()
        self.untoggle_optimizer(optimizers[1])
        optimizers[0].zero_grad()  # with the critic's gradients, which its next step leaves out
        self.manual_backward(self.critic(self.answers(batch[0])).square().mean())
        optimizers[0].step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.05) for part in (self.answers, self.critic)]


class Thawing(Adversarial):
    """One network, whose layers are unfrozen and frozen between epochs."""

    automatic_optimization = True

    def on_train_epoch_start(self) -> None:
        self.critic[0].requires_grad_(self.current_epoch > 0)
        self.answers.requires_grad_(self.current_epoch < 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ranks.add_(self.global_rank)
        return self.critic(self.answers(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def train_by_hand(kind: Callable[[], Adversarial], processes: int, rank: int) -> int:
    torch.manual_seed(0)
    inputs, real = torch.randn(2, 17, 4).unbind()  # batches of 5, 5, 5 and 2: less than three processes
    quiet = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    options: Any = dict.fromkeys(quiet, False)
    options |= {"strategy": ExactDDP(60, False)} if processes > 1 else {}
    trainer = Trainer(accelerator="cpu", devices=processes, precision="64-true", max_epochs=3, **options)
    loader = TensorBatches(inputs[:, 1:], real, 5, seed=0, rank=rank, processes=processes)
    trainer.fit(module := kind(), loader)
    torch.save([*module.parameters()], f"{processes}.pt")
    return int(module.ranks)  # of this process alone, in its last step


@pytest.mark.parametrize("kind", [Adversarial, Thawing])
@pytest.mark.parametrize("processes", [2, 3])
def test_steps_are_those_of_one_process(tmp_path: Path, processes: int, kind: Callable[[], Adversarial]) -> None:
    for number in (1, processes):
        outcomes = in_processes(tmp_path, train_by_hand, *((kind, number, rank) for rank in range(number)))
        assert [outcome.status for outcome in outcomes] == [*range(number)], outcomes[-1].err
    ours, theirs = (torch.load(tmp_path / f"{number}.pt") for number in (processes, 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_signal_to_one_stops_all(run: Run) -> None:
    flags = [*DROPOUT, "--trainer.max_epochs", "8", "--checkpoint.every_n_steps", "0"]
    uninterrupted = trained(run, 2, *flags)
    first, second = run(2, "fit", *flags, death=Death(1, 6, signal.SIGTERM))
    assert (first.status, second.status, second.err) == (128 + signal.SIGTERM, 128 + signal.SIGTERM, "")
    assert "stopped by SIGTERM; to resume: python -m lit_mnist fit --ckpt_path lightning_logs" in first.err
    assert {outcome.status for outcome in run(2, "fit", "--ckpt_path", "last")} == {0}
    assert_alike(RUN, uninterrupted)


@pytest.mark.slow
def test_waiting_for_a_silent_one_ends(run: Run) -> None:
    first, second = run(2, "fit", *SETTINGS, "--processes.timeout", "4", death=Death(1, 5, signal.SIGSTOP), longest=30)
    assert (first.status, second.status) == (3, -signal.SIGKILL)  # the second by this test, at last
    assert "another process of this run was lost" in first.err
    assert run(1, "fit", "--ckpt_path", "last")[0].status == 0


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
    first, second = run(2, "fit", *SETTINGS, *flags, variables=SLURM if "--trainer.devices" in flags else None)
    assert (first.status, second.status, second.err) == (2, 2, "")
    assert re.fullmatch(f".*{message}.*\n", first.err)
    assert not Path("lightning_logs").exists()


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
