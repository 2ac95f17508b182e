"""The command line: `main`, the top-level help, and how errors reach a user.

Nothing here imports torch: `--version` and `--help` answer at once. The commands themselves are in files of their own.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lit_mnist import __version__
from lit_mnist.cli import COMMANDS
from lit_mnist.cli.console import BAD_INPUT, complain, console
from lit_mnist.exact.console import number, shortened, shown

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

FAILED_TRAINING = 3
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
        from lit_mnist.cli.runs import list_runs

        return list_runs(args[1:])

    try:
        Path.cwd()
        from lit_mnist.exact.errors import Interrupted, ProcessLost, TrainingFailed, UserError
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:  # torch asks for the current folder while it is imported
        return complain(f"the current folder cannot be used: {error.strerror}", BAD_INPUT)

    try:
        start(args)
    except Interrupted as stop:
        name = signal.Signals(stop.signum).name
        resume = f"python -m lit_mnist fit --ckpt_path {shown(stop.checkpoint)}{stop.flags}" if stop.checkpoint else ""
        resume = f"; to resume: {resume}" if resume else "; there is no checkpoint yet, start again"
        return complain(f"stopped by {name}{resume}", 128 + stop.signum, everywhere=False)
    except KeyboardInterrupt:
        return complain("stopped by SIGINT", 128 + signal.SIGINT)
    except TrainingFailed as error:
        return complain(str(error), FAILED_TRAINING, everywhere=isinstance(error, ProcessLost))
    except UserError as error:
        # a machine's first process tells what only this machine may lack
        return complain(str(error), BAD_INPUT, everywhere=number("LOCAL_RANK", "SLURM_LOCALID") == 0)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # the input was right
        status = FAILED_TRAINING if full else BAD_INPUT
        return complain(f"{shortened(str(error.filename or 'a file'))}: {error.strerror or error}", status)
    except SystemExit as stop:  # --help and --print_config end the parser that way
        return stop.code if isinstance(stop.code, int) else BAD_INPUT if stop.code else 0
    return 0


def start(args: list[str]) -> None:
    """Run the command `args[0]` with the flags that follow; its file is imported now, and may need packages of its own.

    Raises:
        UserError: the input cannot be used.
        TrainingFailed: the training failed.
        SystemExit: from `--help` and `--print_config`.
    """
    if args[0] in ("predict", "export", "demo"):  # these need a network, and never import Lightning
        command = import_module(f"lit_mnist.cli.{args[0]}")
        getattr(command, args[0])(args[1:])
        return

    from lit_mnist.cli.cli import MNISTCLI, translate_errors
    from lit_mnist.exact.errors import UserError

    with translate_errors():
        if args[0] == "sweep":
            try:
                from lit_mnist.sweep.sweep import sweep
            except ModuleNotFoundError as error:
                raise UserError(f"sweep needs {error.name}: pip install 'lit_mnist[sweep]'") from error
            sweep(args[1:])
        else:
            MNISTCLI(args)


if __name__ == "__main__":
    sys.exit(main())
