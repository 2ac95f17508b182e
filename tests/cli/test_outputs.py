import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import RUN, Capsys, Command, fails
from tensorboard.summary.writer.record_writer import RecordWriter

LONGER = ["--ckpt_path", "last", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "2"]
LONGER += ["--trainer.enable_model_summary", "false"]


def test_a_pipe_that_is_closed_early() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(0.2); from lit_mnist.__main__ import main; exit(main(['-h']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def test_a_full_disk(command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    original, left = RecordWriter.write, [12]

    def write(self: RecordWriter, data: bytes) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        error = fails(capsys, "fit", *LONGER, run=command, status=3)
    assert "training stopped: [Errno 28] No space left on device" in error
    assert not list(RUN.rglob("*.tmp"))
    assert command("fit", *LONGER) == 0


def test_unwritable_results(command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    original, before = Path.write_text, (RUN / "results.json").read_bytes()

    def write_text(self: Path, *arguments: Any, **keywords: Any) -> int:
        original(self, "half")
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        assert "results.json" in fails(capsys, "test", "--ckpt_path", "last", run=command, status=3)
    assert (RUN / "results.json").read_bytes() == before
    assert not list(RUN.rglob("*.tmp"))
