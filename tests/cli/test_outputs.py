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
def test_the_console_is_lost_and_nothing_else(
    command: Command, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    def lost(*arguments: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", OUTPUTS[output]())
            status = command(*arguments) if arguments[0] in ("fit", "test", "predict", "validate") else main(arguments)
        return status, capsys.readouterr().err

    full = "standard output: No space left on device\n" if output == "full" else ""
    printed_only = (2, f"lit_mnist: error: {full}") if full else (0, "")
    written = (0, f"lit_mnist: {full}" if full else "")
    assert lost("fit", *TINY) == written  # the training went on
    assert list(Path("lightning_logs/version_0/checkpoints").glob("last-epoch=01-*"))
    assert lost("test", "--ckpt_path", "last") == written
    assert "test/accuracy" in Path("lightning_logs/version_0/results.json").read_text()
    assert lost("predict", "--ckpt_path", "last") == written
    assert list(Path("lightning_logs/version_0").glob("predictions-*"))
    for arguments in (
        ["validate", "--ckpt_path", "last"],
        ["runs"],
        ["runs", "--format", "json"],
        ["--help"],
        ["--version"],
    ):
        assert lost(*arguments) == printed_only
    assert lost("fit", "--print_config")[0] == printed_only[0]


def test_a_real_console_that_is_closed_or_full() -> None:
    for redirection, status, error in ((">&-", 0, b""), (">/dev/full", 2, b"No space left on device\n")):
        shell = ["sh", "-c", f'"{sys.executable}" -m lit_mnist --version {redirection}']
        done = subprocess.run(shell, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (status, b"")
        assert done.stderr.endswith(error)
        assert done.stderr.count(b"\n") == (1 if error else 0)


def test_a_disk_that_fills_up_with_events(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = RecordWriter.write
    left = [12]

    def write(self: RecordWriter, data: bytes) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        assert command("fit", *TINY) == 3
    error = capsys.readouterr().err
    assert error == (
        "lit_mnist: error: training stopped: the files for TensorBoard: No space left on device; checkpoints written"
        " before are as they were\n"
    )
    assert not list(Path("lightning_logs").rglob("*.tmp"))
    assert command("fit", "--ckpt_path", "last") == 0


def test_results_that_cannot_be_written(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", *TINY) == 0
    original = Path.write_text

    def write_text(self: Path, *arguments: Any, **keywords: Any) -> int:
        original(self, "half")
        raise OSError(28, "No space left on device", str(self))

    before = Path("lightning_logs/version_0/results.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        assert command("test", "--ckpt_path", "last") == 3
    error = capsys.readouterr().err
    assert "results.json" in error
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert Path("lightning_logs/version_0/results.json").read_bytes() == before
    assert not list(Path("lightning_logs").rglob("*.tmp"))


def test_a_current_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["fit"]) == 2
    error = "lit_mnist: error: the current folder cannot be used: No such file or directory\n"
    assert capsys.readouterr().err == error
