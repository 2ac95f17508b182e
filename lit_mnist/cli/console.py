"""What a command prints: one line for an error, and no advertisements. Nothing here imports torch."""

import argparse
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import NoReturn

from lit_mnist.exact.console import PROGRAM, number, shortened, shown

BAD_INPUT = 2  # exit status
MEANT = (  # warnings about what is meant here, or that a user can do nothing about
    "does not have many workers",  # batches come from memory
    "Checkpoint directory .* exists and is not empty|Previous log files in this directory will be deleted",  # both kept
    "callbacks used to create the checkpoint need to be provided",  # only fit writes checkpoints
    "Total length of `.*` across ranks is zero",  # data.val_size is 0
    "smaller than the logging interval|You requested to overfit but",  # every epoch has the order of the first
    "is supported for historical reasons|is not supported by the model summary",
    "isinstance.treespec, LeafSpec",  # Lightning 2.6 on torch 2.15
    "broadcast_buffers. is deprecated",  # in torch 2.15; torch 2.10 does not know the new name
    "on epoch level in distributed setting",  # the metrics are those of all processes when they are logged
)
NOISE = (  # in jsonargparse's list of reasons
    r"(?m)^ *(- (Expected a (<class|list|path|NoneType)|Not a valid sub|a class path|a dict)|Subclass types "
    r"|Given value type:|Given value: \W*\w*[(']).*$|^ *- "
)


def complain(message: str, status: int, everywhere: bool = True) -> int:
    """Print an error on stderr, on the first of several processes alone or on each with its number."""
    process = number("RANK", "SLURM_PROCID", "LOCAL_RANK")
    if process == 0 or everywhere:
        kind = "error: " if 0 < status < 128 else ""
        who = f"process {process}: " if process else ""
        print(f"{PROGRAM}: {kind}{who}{message}", file=sys.stderr)
    return status


def one_line(error: object) -> str:
    """Return an error's message on one line; of jsonargparse 4.53's only the setting and the reasons."""
    text = re.sub(NOISE, "", re.sub(r"(?s)Does not validate against any .*?Errors:", "", str(error)))
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(?:Run)?(\w+)'", r"\1", text)
    text = text.replace("Expected a dot import path string", "no such class")
    lines = dict.fromkeys(re.sub(r'Parser key "([\w.]+)":', r"\1:", text).splitlines())  # several types, one reason
    return shortened(" ".join(" ".join(lines).split()), 500)


def resume_command(checkpoint: Path | None) -> str:
    """Return what to do after a training that was stopped; config.yaml has all the settings."""
    command = f"to resume: python -m {PROGRAM} fit --ckpt_path {quote(shown(checkpoint))}" if checkpoint else ""
    return command or "there is no checkpoint yet, start again"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(message, BAD_INPUT))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep advertisements, and warnings about what is meant, off the console."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks", "profilers"):  # which print what a user asked for
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.INFO)
    threading.excepthook = writer_failed
    with warnings.catch_warnings():
        for message in MEANT:
            warnings.filterwarnings("ignore", f".*({message})")
        yield


def writer_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard 2.21 writes in a thread, which prints its failure; whoever writes next gets the same exception."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
