"""A console that is closed, full or a broken pipe, and a disk that fills up."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_mnist.__main__ import main

TINY = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"]
TINY += ["--model.layers", "4x5/2", "--data.batch_size", "50", "--data.val_size", "50", "--board.every_n_epochs", "0"]
TINY += ["--trainer.enable_model_summary", "false"]
RUN = Path("lightning_logs/version_0")
Command = Callable[..., int]


def broken_pipe() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


OUTPUTS: dict[str, Callable[[], Any]] = {
    "closed": lambda: None,
    "full": lambda: Path("/dev/full").open("w"),  # noqa: SIM115
    "broken pipe": broken_pipe,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_only_what_is_printed_is_lost(command: Command, capsys: pytest.CaptureFixture[str], output: str) -> None:
    def lost(*arguments: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", OUTPUTS[output]())
            status = command(*arguments) if arguments[0] in ("fit", "test", "validate") else main(arguments)
        return status, capsys.readouterr().err

    full = "standard output: No space left on device\n" if output == "full" else ""
    printed_only = (2, f"lit_mnist: error: {full}") if full else (0, "")
    written = (0, f"lit_mnist: {full}" if full else "")
    assert lost("fit", *TINY) == written  # the training continued
    assert list(RUN.glob("checkpoints/last-epoch=01-*"))
    assert lost("test", "--ckpt_path", "last") == written
    assert "test/accuracy" in (RUN / "results.json").read_text()
    for arguments in (["validate", "--ckpt_path", "last"], ["runs"], ["runs", "--format", "json"], ["--version"]):
        assert lost(*arguments) == printed_only


@pytest.mark.parametrize(("redirection", "status"), [(">&-", 0), (">/dev/full", 2)])
def test_a_real_console_that_is_closed_or_full(redirection: str, status: int) -> None:
    shell = ["sh", "-c", f'"{sys.executable}" -m lit_mnist --version {redirection}']
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1 if status else 0)


def test_a_disk_that_fills_up_with_events(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, left = RecordWriter.write, [12]

    def write(self: RecordWriter, data: bytes) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        original(self, data)

    longer = ["--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        assert command("fit", "--ckpt_path", "last", "--trainer.enable_model_summary", "false", *longer) == 3
    error = capsys.readouterr().err
    assert "training stopped: [Errno 28] No space left on device" in error
    assert error.count("\n") == 1
    assert not list(RUN.rglob("*.tmp"))
    assert command("fit", "--ckpt_path", "last", *longer) == 0


def test_results_that_cannot_be_written(
    command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, before = Path.write_text, (RUN / "results.json").read_bytes()

    def write_text(self: Path, *arguments: Any, **keywords: Any) -> int:
        original(self, "half")
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        assert command("test", "--ckpt_path", "last") == 3
    error = capsys.readouterr().err
    assert "results.json" in error
    assert error.count("\n") == 1
    assert (RUN / "results.json").read_bytes() == before
    assert not list(RUN.rglob("*.tmp"))
