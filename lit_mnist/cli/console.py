"""What a user reads and hears: one line for an error, streams that may be closed, and no advertisements.

Nothing here imports torch: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from lit_mnist.exact.console import PROGRAM, number

BAD_INPUT = 2  # exit status
# callbacks that a user has asked for speak; Lightning itself advertises
LEVELS = {
    "pytorch_lightning": logging.WARNING,
    "lightning_fabric": logging.WARNING,
    "pytorch_lightning.callbacks": logging.INFO,
}


def complain(message: str, status: int, everywhere: bool = True) -> int:
    """Say it on stderr: on the first of several processes alone, or on each with its number."""
    process = number("RANK", "SLURM_PROCID", "LOCAL_RANK")
    if process == 0 or everywhere:
        kind = "error: " if 0 < status < 128 else ""
        who = f"process {process}: " if process else ""
        print(f"{PROGRAM}: {kind}{who}{message}", file=sys.stderr)
    return status


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(message, BAD_INPUT))


class Stream:
    """Standard output or error that may be closed, full or a broken pipe: then what is written is dropped.

    Args:
        stream: None where the file was closed before the program started.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: PTH123, SIM115
        self.fault: OSError | None = None  # the first

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # file names may hold any bytes
            self.write(text.encode(self.stream.encoding or "ascii", "backslashreplace").decode())
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if not self.fault:
            self.fault = error
            # what is still buffered goes nowhere, or Python would complain of it when it exits
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def console() -> Iterator[tuple[Stream, Stream]]:
    """Let a command go on, and end in good order, where nobody can read what it prints."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # or the next file that is opened would be what libraries take for the console
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    streams = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a user can do nothing about off the console: advertisements, and warnings about what is meant."""
    levels = {logging.getLogger(name): level for name, level in LEVELS.items()}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    hook, threading.excepthook = threading.excepthook, writer_failed
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # batches come from memory
            ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
            ".*smaller than the logging interval.*",
            ".*Previous log files in this directory will be deleted.*",  # they are kept
            ".*callbacks used to create the checkpoint need to be provided.*",  # only fit writes checkpoints
            ".*Total length of `.*` across ranks is zero.*",  # data.val_size is 0, or no picture shows a digit
            ".*You requested to overfit but.*",
            ".*is supported for historical reasons.*",
            ".*is not supported by the model summary.*",
            ".*infer the batch indices.*",  # predictions come in the order of the test set
            ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.15
            ".*broadcast_buffers. is deprecated.*",  # in torch 2.15; the new name is unknown to 2.10
            ".*on epoch level in distributed setting.*",  # the metrics are of all processes when they are logged
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in before.items():
                logger.setLevel(level)
            threading.excepthook = hook


def writer_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard 2.21 writes in a thread, which prints its failure; whoever writes next gets the same exception."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
