"""The command line: `main`, the top-level help, and how errors reach a user.

Nothing here imports torch: `--version` and `--help` answer at once. The commands themselves are in `commands`.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lit_mnist import __version__
from lit_mnist.runs import shortened

COMMANDS = {
    "fit": "train, with validation after each epoch",
    "validate": "score a checkpoint on the held-out training images",
    "test": "score a checkpoint on the 10,000 test images",
    "predict": "write a checkpoint's answers for the test images to a CSV",
    "export": "write a checkpoint's network to an ONNX or PT2 file",
    "runs": "list the runs under lightning_logs/",
}

HELP = f"""\
usage: python -m lit_mnist [-h] [--version] {{{",".join(COMMANDS)}}} ...

Train a small CNN on MNIST, look at it, test it, resume it.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

examples:
  python -m lit_mnist fit
  python -m lit_mnist fit --config configs/seed.yaml --trainer.max_epochs 5
  python -m lit_mnist test --ckpt_path best
  python -m lit_mnist fit --ckpt_path last --trainer.max_epochs 20

`python -m lit_mnist COMMAND --help` lists all settings of a command; `--print_config` prints them as YAML.
"""

BAD_INPUT, FAILED_TRAINING = 2, 3
OUTPUT_FLAGS = ("-h", "--help", "--version", "--print")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: what would stand on the command line; None takes `sys.argv`.

    Returns:
        The exit status: 0, 2 for input that cannot be used, 3 for a training that failed, 128 + the signal's number
        for one that a signal stopped. The reason is one message on stderr.
    """
    args = list(sys.argv[1:] if args is None else args)
    with console() as streams:
        status = run_command(args)
        sys.stdout.flush()
        fault = streams[0].fault
        if fault and fault.errno != errno.EPIPE:  # whoever closes a pipe early has seen enough
            # those that have written files have not failed; of others the output is the result
            prints = args[:1] in ([], ["runs"], ["validate"]) or any(arg.startswith(OUTPUT_FLAGS) for arg in args)
            status = complain(f"standard output: {fault.strerror}", status or (BAD_INPUT if prints else 0))
        return status


def run_command(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        print(f"lit_mnist {__version__}")
        return 0
    if args[:1] in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0 if args else BAD_INPUT
    if args[0] not in COMMANDS:
        return complain(f"unknown command {shortened(repr(args[0]))}, allowed are {', '.join(COMMANDS)}", BAD_INPUT)

    if args[0] == "runs":
        return list_runs(args[1:])

    try:
        Path.cwd()
        from lit_mnist.commands import CommandError, Interrupted, ProcessLost, TrainingError, run
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # torch asks for the current folder while it is imported
        return complain(f"the current folder cannot be used: {error.strerror}", BAD_INPUT)

    try:
        run(args)
    except Interrupted as stop:
        name = signal.Signals(stop.signum).name
        resume = f"python -m lit_mnist fit --ckpt_path {stop.checkpoint}{stop.flags}"
        go_on = resume if stop.checkpoint else "start again"
        return complain(f"stopped by {name}; to go on: {go_on}", 128 + stop.signum, everywhere=False)
    except KeyboardInterrupt:
        return complain("stopped by SIGINT", 128 + signal.SIGINT)
    except TrainingError as error:
        return complain(str(error), FAILED_TRAINING, everywhere=isinstance(error, ProcessLost))
    except CommandError as error:
        # a machine's first process tells what only this machine may lack
        return complain(str(error), BAD_INPUT, everywhere=number("LOCAL_RANK", "SLURM_LOCALID") == 0)
    except SystemExit as stop:  # --help and --print_config end the parser that way
        return stop.code if isinstance(stop.code, int) else BAD_INPUT if stop.code else 0
    return 0


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


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(message, BAD_INPUT))


RUN_COLUMNS = ("run", "recipe", "parameters", "epochs", "val_accuracy", "test_accuracy", "seconds", "state")


def list_runs(args: Sequence[str]) -> int:
    from lit_mnist.runs import summaries

    parser = OneLineParser(prog="python -m lit_mnist runs", description="List the runs under lightning_logs/.")
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    parser.add_argument("--sort", choices=RUN_COLUMNS, help="by a column, the best or largest number last")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    try:
        options = parser.parse_args(args)
    except SystemExit as stop:  # from --help and from an error, which was told
        return stop.code if isinstance(stop.code, int) else 0
    folder = options.root_dir / "lightning_logs"
    try:
        if not folder.is_dir():
            raise OSError(errno.ENOENT, "there is no folder lightning_logs in it")
        rows = summaries(folder)
    except OSError as error:
        return complain(f"--root_dir {shortened(str(options.root_dir))}: {error.strerror}", BAD_INPUT)
    if options.sort and options.sort != "run":
        # None first; numbers and words do not meet in one column
        rows.sort(key=lambda row: (row[options.sort] is not None, row[options.sort] or 0))
    if options.format == "json":
        print(json.dumps(rows, indent=2))
    elif options.format == "csv":
        writer = csv.DictWriter(sys.stdout, RUN_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_table(rows)
    return 0


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    forms = {"parameters": "{:,}", "val_accuracy": "{:.2%}", "test_accuracy": "{:.2%}", "seconds": "{:.1f}"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in RUN_COLUMNS:
        words = column in ("run", "recipe", "state")
        heading = column.replace("_", "\n")  # so that a table is 80 columns wide
        table.add_column(heading, justify="left" if words else "right", no_wrap=column != "recipe", overflow="fold")
    for row in rows:
        cells = ("-" if row[column] is None else forms.get(column, "{}").format(row[column]) for column in RUN_COLUMNS)
        table.add_row(*cells)
    # a pipe has no width, and rich would cut the lines
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def complain(message: str, status: int, everywhere: bool = True) -> int:
    """Say it on stderr: on the first of several processes alone, or on each with its number."""
    process = number("RANK", "SLURM_PROCID", "LOCAL_RANK")
    if process == 0 or everywhere:
        kind = "error: " if 0 < status < 128 else ""
        who = f"process {process}: " if process else ""
        print(f"lit_mnist: {kind}{who}{message}", file=sys.stderr)
    return status


def number(*variables: str) -> int:
    """The first of these environment variables that is a number; else 0."""
    return next((int(value) for name in variables if (value := os.environ.get(name, "")).isdecimal()), 0)
