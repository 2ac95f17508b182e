"""The command line: its commands, its help, and how errors become exit statuses; imports torch for a command alone."""

import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from lit_mnist import __version__
from lit_mnist.cli.console import BAD_INPUT, complain, resume_command
from lit_mnist.exact.console import Interrupted, ProcessLost, TrainingFailed, UserError, number, shortened

COMMANDS = ("fit", "validate", "test", "predict", "demo", "export", "sweep", "runs")
HELP = f"""\
usage: python -m lit_mnist [-h] [--version] {{{",".join(COMMANDS)}}} ...

Train a small CNN on MNIST, look at it, test it, resume it.

commands:
  fit       train, with validation after each epoch
  validate  score a checkpoint on the held-out training images
  test      score a checkpoint on the 10,000 test images
  predict   write a checkpoint's answers for pictures, or for the test images
  demo      serve a page to draw digits on, with a checkpoint's answers
  export    write a checkpoint's network to an ONNX or PT2 file, or a page
  sweep     compare settings over several seeds, by a study file
  runs      list the runs under lightning_logs/

`python -m lit_mnist COMMAND --help` lists all settings of a command; `--print_config` prints them as YAML.
"""
SHORT = {"-h", "--help", "--print_config", "--worker"}  # which print for a program, or for another process
FAILED_TRAINING = 3
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, by default the one of `sys.argv`; return its exit status (docs/troubleshooting.md)."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        call_command(args)
        print(end="", flush=True)
    except BrokenPipeError:  # who closes a pipe early has read enough; Python would complain of the rest when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Interrupted as stop:
        signum, checkpoint = signal.Signals(stop.args[0]), stop.args[1]
        return complain(f"stopped by {signum.name}; {resume_command(checkpoint)}", 128 + signum, everywhere=False)
    except KeyboardInterrupt:
        return complain("stopped by SIGINT", 128 + signal.SIGINT)
    except TrainingFailed as error:
        return complain(str(error), FAILED_TRAINING, everywhere=isinstance(error, ProcessLost))
    except UserError as error:  # from each machine's first process: one machine alone may lack something
        return complain(str(error), BAD_INPUT, everywhere=number("LOCAL_RANK", "SLURM_LOCALID") == 0)
    except OSError as error:
        return complain(str(error), FAILED_TRAINING if error.errno in FULL else BAD_INPUT)
    except SystemExit as stop:  # from --help, --print_config and argparse's errors
        return stop.code if isinstance(stop.code, int) else BAD_INPUT if stop.code else 0
    return 0 if args else BAD_INPUT


def call_command(args: list[str]) -> None:
    """Call a command with the flags after its name; its file, and what that needs, is imported now."""
    command = args[0] if args else "--help"
    if command == "--version":
        print(f"lit_mnist {__version__}")
    elif command in ("-h", "--help"):
        print(HELP, end="")
    elif command in ("fit", "validate", "test", "sweep"):
        first = number("RANK", "SLURM_PROCID", "LOCAL_RANK") == 0 and "torch" not in sys.modules
        if first and SHORT.isdisjoint(arg.partition("=")[0] for arg in args):
            print("Loading PyTorch and Lightning ...", flush=True)  # which takes seconds
        from lit_mnist.cli.cli import MNISTCLI, quiet

        with quiet():
            if command == "sweep":
                call_function("sweep.sweep", args)
            else:
                MNISTCLI(args)
    elif command in COMMANDS:  # these never import Lightning
        call_function(f"cli.{command}", args)
    else:
        raise UserError(f"unknown command {shortened(repr(command))}, allowed are {', '.join(COMMANDS)}")


def call_function(module: str, args: list[str]) -> None:
    """Call the function of a command's name in its file, which may need packages of an extra."""
    try:
        function = getattr(import_module(f"lit_mnist.{module}"), args[0])
    except ModuleNotFoundError as error:
        if str(error.name).startswith("lit_mnist"):
            raise
        raise UserError(f"{args[0]} needs {error.name}: pip install 'lit_mnist[{args[0]}]'") from error
    function(args[1:])


if __name__ == "__main__":
    sys.exit(main())
