"""What a command prints of an error: one line. Nothing here imports torch."""

import argparse
import re
import sys
from pathlib import Path
from shlex import quote
from typing import NoReturn

from lit_mnist.exact.console import PROGRAM, UserError, number, shortened, shown

BAD_INPUT = 2  # exit status
NOISE = (  # in jsonargparse's list of reasons
    r"(?m)^ *(- (Expected a (Iterable\n *- Expected a bool|list|path|NoneType)|Not a valid sub|a class path|a dict)"
    r"|Subclass types |Given value type:|Given value: \W*\w*[(']).*$|^ *- "
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
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", str(error))
    text = re.sub(NOISE, "", re.sub(r"(?s)Does not validate against any .*?Errors:", "", text))
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(?:Run)?(\w+)'", r"\1", text)
    text = text.replace("Expected a dot import path string", "no such class")
    lines = dict.fromkeys(re.sub(r'Parser key "([\w.]+)":', r"\1:", text).splitlines())  # several types, one reason
    return shortened(" ".join(" ".join(lines).split()), 500)


def resume_command(checkpoint: Path | None) -> str:
    """Return what to do after a training that was stopped; config.yaml has all the settings."""
    return f"to resume: python -m {PROGRAM} fit --ckpt_path {quote(shown(checkpoint))}" if checkpoint else "start again"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)
