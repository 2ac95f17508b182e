"""The folders of runs: claiming one for a new run, finding an old one, its checkpoints and its results."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .console import shortened
from .errors import UserError

VERSION = re.compile(r"version_(\d+)")
# of the checkpoints that a run keeps; a user's own may lie beside them
OURS = {"best": r"best-epoch=\d{2,}-[^=]+=-?\d+\.\d{4}\.ckpt", "last": r"last-epoch=\d{2,}-step=\d{6,}(-.+)?\.ckpt"}


def expanded(path: str | Path, setting: str) -> Path:
    """A path with `~` replaced by the home folder.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{setting} {shortened(str(path))}: there is no such home folder; give the whole path"
        ) from None


def versions(runs: Path) -> list[Path]:
    """The folders of all runs, the newest (highest number) first."""
    numbered = [
        (int(match[1]), folder)
        for folder in (runs.iterdir() if runs.is_dir() else ())
        if (match := VERSION.fullmatch(folder.name)) and folder.is_dir()
    ]
    return [folder for _, folder in sorted(numbered, reverse=True)]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when all went well and is gone when not."""
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which only `open` knows
        raise
    finally:
        partial.unlink(missing_ok=True)


def claim_version(runs: Path) -> int:
    """Make a new folder `version_N` that no other process has, and return N."""
    latest = next(iter(versions(runs)), None)
    number = int(latest.name.removeprefix("version_")) + 1 if latest else 0
    while True:
        try:
            (runs / f"version_{number}").mkdir(parents=True)
            return number
        except FileExistsError:
            if not (runs / f"version_{number}").is_dir():
                raise
            number += 1  # another program that started at the same time was quicker


def discard(run: Path, existed: Path) -> None:
    """Take back the folder of a run that could not start, and the empty ones above it up to one that was there."""
    shutil.rmtree(run, ignore_errors=True)
    with suppress(OSError):  # another process may have made a run beside it
        while (run := run.parent) != existed:
            run.rmdir()


LOCK = ".lock"  # in a run's folder: held by the process that trains it


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the system lets go of it however the process ends.

    Raises:
        UserError: another process has it.
    """
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run}: another process is training this run") from None
    try:
        yield
    finally:
        lock.release()


def being_trained(run: Path) -> bool:
    """Whether a living process trains this run."""
    try:
        return (run / LOCK).exists() and held(run / LOCK)
    except OSError:  # a folder of somebody else's
        return False


def held(path: Path) -> bool:
    """Whether a process holds this lock; the file is made where there is none."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def read_results(run: Path) -> dict[str, Any]:
    """What a run's results.json holds; nothing where it is not there or damaged."""
    path = run / "results.json"
    try:
        # a named pipe would let the reader wait for ever
        results = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        results = None
    return results if isinstance(results, dict) else {}


def text(results: Mapping[str, Any], name: str) -> str | None:
    value = results.get(name)
    return value if isinstance(value, str) and value else None


def number(results: Mapping[str, Any], name: str) -> int | float | None:
    value = results.get(name)
    return value if isinstance(value, (int, float)) and type(value) is not bool and abs(value) < 1e18 else None


def section(results: Any, name: str) -> Mapping[str, Any]:
    """A mapping within a mapping, empty where there is none."""
    found = results.get(name) if isinstance(results, dict) else None
    return found if isinstance(found, dict) else {}


def find_checkpoint(wanted: str, runs: Path) -> Path:
    """The file that `best`, `last` or a path means.

    `best` and `last` mean the newest run that has one: with validation the best checkpoint by `val/accuracy`, and
    the last one written.

    Raises:
        UserError: there is none.
    """
    if wanted in ("best", "last"):
        for run in versions(runs):
            if found := newest(run, wanted):
                return found
        hint = "" if wanted == "last" else " (a run that holds out no validation images has only a last one)"
        raise UserError(f"--ckpt_path {wanted}: no run under {runs} has a {wanted} checkpoint{hint}")
    if "://" in wanted:
        raise UserError(
            f"--ckpt_path {shortened(wanted)}: only local files are loaded; download it first, then pass its path"
        )
    path = Path(wanted)
    try:
        if path.is_file():
            return path
        what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', error)})"
    raise UserError(
        f"--ckpt_path {shortened(wanted)}: that file {what}; allowed are best, last and the path of a checkpoint"
    )


def own_checkpoints(run: Path, kind: str) -> list[Path]:
    """Those that a run keeps as its `best` or `last`."""
    found = (run / "checkpoints").glob(f"{kind}-*.ckpt")
    return [path for path in found if re.fullmatch(OURS[kind], path.name) and path.is_file()]


def newest(run: Path, kind: str = "last") -> Path | None:
    """The newest of a run's own checkpoints of this kind."""
    return max(own_checkpoints(run, kind), key=lambda path: path.stat().st_mtime_ns, default=None)


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, or None where it lies somewhere else."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and VERSION.fullmatch(folder.parent.name) else None
