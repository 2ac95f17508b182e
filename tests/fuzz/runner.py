"""One case: a process of its own in a sandbox of its own, and what must hold of it afterwards."""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tensorboard  # noqa: F401  # imported here once, and not in every case
import torch
import torch.utils.tensorboard
from pytorch_lightning.strategies.launchers import multiprocessing as spawning
from pytorch_lightning.strategies.launchers import subprocess_script

from lit_mnist.__main__ import main
from lit_mnist.cli import export
from lit_mnist.data import datamodule, datasets, download
from lit_mnist.exact import results
from lit_mnist.module import LitMNIST

from . import sandbox
from .cases import Case, Result

# How a process may be worse off: its output or its files cannot be written, or it lacks what most have.
MODES = ("stdout closed", "stdout full", "stdout pipe", "stderr closed", "files 0", "files 3000", "no home", "no cwd")
LAUNCHED = 99  # it would start more processes, which would know nothing of the tiny data
MEMORY = 24 << 30  # of addresses: what asks for more is stopped, and not the machine
LONGEST_LINE = 400  # characters of an error, without those of the arguments
NEVER = ("Traceback (most recent", "Exception ignored", "Exception in thread", "Segmentation", "Fatal Python error")
# The other lines of an error about the data, which lists files and sources.
ABOUT_DATA = re.compile(
    r"  |Fetching |the package registry |Put these files |[oG](r g)?ive data\.root |.* set aside as "
)
DATA_ERROR = re.compile(r"MNIST (could not be fetched|is not complete)|data\.root: cannot write to")
# What a command may write in a run that is there.
WRITES = {
    "fit": r"results\.json|(config|hparams)\.yaml|metrics\.csv|events\.out\.tfevents\.[^/]*"
    r"|checkpoints(/(best|last)-[^/]*\.ckpt)?",
    "test": r"results\.json|hparams\.yaml|events\.out\.tfevents\.[^/]*\.test|projector_config\.pbtxt"
    r"|\d{5,}(/test(/[^/]*)?)?",
    "predict": r"(predictions|pictures)-[^/]*\.(csv|png)",
}
LEFT_BY_OTHERS = re.compile(r"home/\.cache(/Microsoft(/.*)?)?|tmp/\.ses")  # onnxruntime's numbers
RUN = re.compile(r"(?P<run>(?:.*/)?lightning_logs/version_(?P<number>\d+))(?:/(?P<file>.*))?")


class Outcome(NamedTuple):
    status: int | None  # negative for a signal, None where it was ended for taking too long
    out: str
    err: str
    seconds: float


def case_of(kind: str, seed: int, index: int, template: Path) -> Case:
    from . import checkpoints, commands

    draw = {"commands": commands.draw, "checkpoints": checkpoints.draw}[kind]
    return draw(random.Random(f"{kind} {seed} {index}"), template)


def run(kind: str, seed: int, index: int, template: Path, limit: float, keep: bool) -> Result:
    """Make the case, run it and judge it."""
    case = case_of(kind, seed, index, template)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{seed}-{index}-", dir=template.parent)) / "sandbox"
    sandbox.copy(template, folder)
    for prepare in case.prepare:
        prepare(folder)
    before = sandbox.snapshot(folder)
    outcome = in_child(lambda: main(case.args), case.args, folder, limit, case.mode)
    after = sandbox.snapshot(folder)
    found = problems(case, outcome, before, after) + wrong_results(case, outcome, folder, before, after)
    if not keep:
        shutil.rmtree(folder.parent)
    status = {None: "waits", LAUNCHED: "launched"}.get(outcome.status, str(outcome.status))
    note = "; ".join(filter(None, (case.note, case.mode)))
    return Result(kind, index, case.args, note, status, found, *outcome[1:], sandbox=str(folder) if keep else "")


def make_template(folder: Path) -> None:
    sandbox.lay_out(folder)

    def stopped() -> int:
        original = LitMNIST.training_step
        left = [sandbox.STOPPED_AT]

        def training_step(self: LitMNIST, batch: Any, batch_idx: int) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch, batch_idx)

        LitMNIST.training_step = training_step  # type: ignore[method-assign]
        return main(sandbox.STOPPED)

    for function, args, status in (
        (lambda: main(sandbox.FINISHED), sandbox.FINISHED, 0),
        (stopped, sandbox.STOPPED, -signal.SIGKILL),
    ):
        outcome = in_child(function, args, folder, 120)
        assert outcome.status == status, outcome
    sandbox.complete(folder)


def in_child(function: Callable[[], int], args: list[str], folder: Path, limit: float, mode: str = "") -> Outcome:
    """Call a function in a forked process as if it were a program's main."""
    started = time.monotonic()
    pipes = [os.pipe(), os.pipe()]
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(limit) + 10)  # where the fuzzer itself was killed, nobody else ends it
            _prepare(args, folder, mode, [end for _, end in pipes])
            _finish(function)
        finally:  # nothing of the fuzzer runs on in here
            os._exit(1)
    texts = [bytearray(), bytearray()]
    for reading, writing in pipes:
        os.close(writing)
        os.set_blocking(reading, False)
    ended = 0
    while not ended and time.monotonic() - started < limit:
        time.sleep(0.005)
        _read(pipes, texts)
        ended, code = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with whatever it has started
    if not ended:
        os.waitpid(child, 0)
    _read(pipes, texts)
    for reading, _ in pipes:
        os.close(reading)
    status = os.waitstatus_to_exitcode(code) if ended else None
    out, err = (text.decode(errors="replace") for text in texts)
    return Outcome(status, out, err, time.monotonic() - started)


def _read(pipes: list[tuple[int, int]], texts: list[bytearray]) -> None:
    for (reading, _), text in zip(pipes, texts, strict=True):
        with suppress(BlockingIOError):
            while chunk := os.read(reading, 1 << 16):
                text += chunk


def _prepare(args: list[str], folder: Path, mode: str, ends: list[int]) -> None:
    os.setsid()
    for number, end in enumerate(ends, 1):
        os.dup2(end, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable(2)
    os.chdir(folder / sandbox.WORK)
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"), COLUMNS="80")
    tempfile.tempdir = None
    sys.argv = ["lit_mnist", *args]
    sys.modules["__main__"].__spec__ = find_spec("lit_mnist.__main__")
    torch.set_num_threads(1)

    raw = folder / sandbox.WORK / "data" / "MNIST" / "raw"
    contents = {path.name: path.read_bytes() for path in raw.iterdir() if path.name not in sandbox.LOCKS}
    datasets.FILES = {name: datasets.IDXFile(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    datamodule.EVALUATION_BATCH_SIZE = 10
    download.mirrors = lambda folder: []
    download._pip_download = _no_network
    for module in (results, export):
        vars(module)["commit"] = lambda: None  # git would lock the developer's index
    vars(subprocess_script)["_basic_subprocess_cmd"] = vars(spawning)["_check_missing_main_guard"] = _launched

    stdout: int | None = 1
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if mode == "stdout full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif mode == "stdout pipe":
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
    elif mode == "stdout closed":
        os.close(1)
        stdout = None
    elif mode == "stderr closed":
        os.close(2)
    elif mode.startswith("files"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(mode.split()[1]),) * 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    elif mode == "no home":
        del os.environ["HOME"]
    elif mode == "no cwd":
        Path("gone").mkdir()
        os.chdir("gone")
        Path("../gone").rmdir()
    sys.stdout = _stream(stdout, "strict", line_buffering=False)
    sys.stderr = _stream(None if mode == "stderr closed" else 2, "backslashreplace", line_buffering=True)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    gc.freeze()


def _stream(number: int | None, errors: str, line_buffering: bool) -> Any:
    if number is None:
        return None  # as Python does where the descriptor is closed
    buffer = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=line_buffering)


def _finish(function: Callable[[], int]) -> NoReturn:
    """Run a program's main, and end as Python does."""
    try:
        status = function()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads
    _exit_function()
    gc.collect()
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError as error:
            print(f"Exception ignored in: <stdout>\n{error!r}", file=sys.stderr)
            status = 120
    with suppress(OSError, AttributeError):
        sys.stderr.flush()
    os._exit(status & 0xFF)


def _no_network(folder: str) -> NoReturn:
    raise download.FaultError("there is no network in tests")


def _launched(*_: object) -> NoReturn:
    os._exit(LAUNCHED)


# What must hold


def problems(case: Case, outcome: Outcome, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is wrong, a phrase each."""
    status, out, err, seconds = outcome
    found = []
    if status is None:
        found.append(f"waits: was ended after {seconds:.0f} s")
    elif status < 0:
        found.append(f"ended by {signal.Signals(-status).name}")
    elif status not in (0, 2, 3, LAUNCHED):
        found.append(f"status {status}")
    if case.expected not in (None, status):
        found.append(f"status {status} where {case.expected} is right")
    found += [f"says {word!r}" for word in NEVER if word in out + err]
    if not case.mode.startswith("std") and status in (0, 2, 3):
        found += _wrong_lines(status, err, case.args)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if status == 2 and not case.mode.startswith("stdout"):  # what was done may be told in vain
        wrong = [path for path in changed if not _of_data(path, case.args)]
    else:
        wrong = [path for path in changed if not _may_write(path, case.args, before, after)]
    how = {(True, True): "changed", (True, False): "removed", (False, True): "made"}
    found += [f"status {status}, and {how[path in before, path in after]}: {path!r}" for path in wrong[:4]]
    return found


def wrong_results(
    case: Case, outcome: Outcome, folder: Path, before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """What is wrong with the runs that a fit has made or trained on: their results.json must say how it ended."""
    if case.args[:1] != ["fit"] or outcome.status not in (0, 3) or case.mode.startswith("files"):
        return []
    made = [path for path in after.keys() - before.keys() if (match := RUN.fullmatch(path)) and not match["file"]]
    found = [f"a run without results: {run!r}" for run in made if f"{run}/results.json" not in after]
    if any('"save_dir"' in arg for arg in case.args):  # a logger's own folder
        found = []
    expected = {0: "finished", 3: "failed"}[outcome.status]
    for path in after:
        if path.endswith("/results.json") and before.get(path) != after[path]:
            state = json.loads((folder / path).read_text())["fit"]["state"]
            found += [f"status {outcome.status}, and {path!r} says {state}"] if state != expected else []
    return found


def _wrong_lines(status: int, err: str, args: list[str]) -> list[str]:
    lines = err.split("\n")[:-1] if err.endswith("\n") else err.split("\n") if err else []
    told = [line for line in lines if line.startswith("lit_mnist: error")]
    if status == 0:
        return [f"status 0, and an error: {line!r}" for line in told]
    if len(told) != 1:
        return [f"{len(told)} lines 'lit_mnist: error: '"]
    shorter = told[0]
    for value in sorted((part for arg in args for part in (arg, arg.partition("=")[2])), key=len, reverse=True):
        shorter = shorter.replace(value, "") if len(value) > 3 else shorter
    found = [f"an error of {len(shorter)} characters"] if len(shorter) > LONGEST_LINE else []
    if status == 2:
        about_data = DATA_ERROR.search(told[0])
        others = [line for line in lines if line != told[0] and not (about_data and ABOUT_DATA.match(line))]
        found += [f"beside the error: {line[:200]!r}" for line in others[:3]]
    return found


def _values(args: list[str], flag: str) -> list[str]:
    """All that is given for a flag, in either form, and where its name is cut short."""
    behind = [args[i + 1] for i, arg in enumerate(args[:-1]) if len(arg) > 4 and flag.startswith(arg)]
    return behind + [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]


def _place(value: str) -> str:
    """Where a path that was given lies in the sandbox."""
    home = re.sub("^~", "../home", value)
    return os.path.normpath(os.path.join(sandbox.WORK, home))  # noqa: PTH118  # pathlib does not resolve ..


def _of_data(path: str, args: list[str]) -> bool:
    """Whether it belongs to a folder of data that the user named, which MNIST would have been fetched into."""
    return any(f"{_place(root)}/MNIST/raw/".startswith(f"{path}/") for root in _values(args, "--data.root"))


def _may_write(path: str, args: list[str], before: dict[str, Any], after: dict[str, Any]) -> bool:
    if ".tmp" in path:
        return False
    if path not in before and after[path][0] == "folder":
        inside = [other for other in after if other.startswith(f"{path}/") and other not in before]
        if inside:
            return all(_may_write(other, args, before, after) for other in inside)
    command = args[0] if args else ""
    if LEFT_BY_OTHERS.fullmatch(path) or _of_data(path, args) or path in map(_place, _values(args, "--output")):
        return True
    if path.endswith(".pt.trace.json") and "pytorch" in args:  # of the profiler that was asked for
        return True
    if command == "predict" and re.fullmatch(rf"elsewhere/{WRITES['predict']}", path):
        return "../elsewhere/x.ckpt" in args
    if not (match := RUN.fullmatch(path)):
        return False
    if match["run"] not in before:
        return command == "fit"
    named = {number for arg in args for number in re.findall(r"version_(\d+)", arg)}
    for name in {"best", "last"} & {*args, *_values(args, "--ckpt_path")}:
        with_one = (
            RUN.fullmatch(p) for p, (kind, *_) in before.items() if f"/checkpoints/{name}-" in p and kind == "file"
        )
        named.add(str(max(int(other["number"]) for other in with_one if other)))
    return match["number"] in named and bool(re.fullmatch(WRITES.get(command, "(?!)"), match["file"] or ""))


def signature(result: Result) -> str:
    """What failures of one cause have in common."""
    frames = re.findall(r'File "[^"]*?((?:lit_mnist|site-packages)/[^"]+)", line \d+, in (\S+)', result.err)
    own = [frame for frame in frames if frame[0].startswith("lit_mnist")]
    errors = re.findall(r"^([A-Za-z_.]*(?:Error|Exception|Interrupt|Expired)\b.*)$", result.err, re.M)
    if not errors or "Traceback" not in result.err:
        return re.sub(r"\d+|'.*'", "_", result.problems[0])
    where = f"{own[-1][0]}:{own[-1][1]}" if own else ""
    deepest = (
        f" < {frames[-1][0].removeprefix('site-packages/')}:{frames[-1][1]}" if frames and frames[-1] not in own else ""
    )
    return f"{errors[-1][:70]} in {where}{deepest}"
