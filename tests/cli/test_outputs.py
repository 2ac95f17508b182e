import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import RUN, TINY, Capsys, Command, at_call, fail, fails, results, scalars
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_mnist.__main__ import main

LONGER = ["--ckpt_path", "last", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "2"]
LONGER += ["--trainer.enable_model_summary", "false"]


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
