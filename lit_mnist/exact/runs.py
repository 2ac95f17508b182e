"""The folders of runs: holding one, finding one, reading its checkpoints and its results."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .console import PROGRAM, UserError, shortened

# of the checkpoints that a run keeps (older versions put a score behind the step); a user's own may lie beside them
OURS = {"best": r"best-epoch=\d{2,}-[^=]+=-?\d+\.\d{4}\.ckpt", "last": r"last-epoch=\d{2,}-step=\d{6,}(-.+)?\.ckpt"}
LOCK = ".lock"  # in a run's folder: held by the process that trains it
FORMAT = 3  # goes up when a resumed run needs other entries
FORMAT_ENTRY = f"{PROGRAM}_format"


def is_run(folder: Path) -> bool:
    """Say whether a run lies here: it may have been renamed or copied, so its files decide."""
    return any((folder / name).exists() for name in ("results.json", "config.yaml", "checkpoints"))


def versions(runs: Path) -> list[Path]:
    """Return the folders of all runs, the newest first: by the time in results.json, as a copied file has another."""
    made = {run: section(read_results(run), "fit").get("created") or 0.0 for run in filter(is_run, runs.glob("*"))}
    # where no time is known, version_10 is newer than version_9
    return sorted(made, key=lambda run: (made[run], len(run.name), run.name), reverse=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its place on success and is removed on failure."""
    partial = path.with_name(f".{path.stem[:200]}.{os.getpid()}.tmp")  # TensorBoard reads whatever has tfevents in it
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which only `open` knows
        raise
    finally:
        partial.unlink(missing_ok=True)


def only_process(run: Path) -> AbstractContextManager[object]:
    """Hold a run's folder for this process, as a context; where another has it, raise UserError."""
    try:
        return FileLock(run / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run}: another process is training this run") from None


def being_trained(run: Path) -> bool:
    """Say whether a living process trains this run."""
    try:
        with only_process(run) if (run / LOCK).exists() else nullcontext():
            return False
    except (UserError, OSError) as error:
        return isinstance(error, UserError)  # else it is another user's folder


def read_results(run: Path) -> dict[str, Any]:
    """Read a run's results.json; empty where it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((run / "results.json").read_text()))
    return {}


def section(results: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping within a mapping, empty where there is none."""
    return results.get(name) or {}


def own_checkpoints(run: Path, kind: str) -> list[Path]:
    """Return the files that a run keeps as its `best` or `last`."""
    return [path for path in run.glob("checkpoints/*") if re.fullmatch(OURS[kind], path.name) and path.is_file()]


def newest(run: Path, kind: str = "last") -> Path | None:
    """Return the newest of a run's own checkpoints of this kind."""
    return max(own_checkpoints(run, kind), key=lambda path: path.stat().st_mtime_ns, default=None)


def run_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None where it lies somewhere else."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and is_run(folder.parent) else None


def find_checkpoint(wanted: str, runs: Path, kind: str = "best") -> Path:
    """Return the file that a path, a run's folder, `best` or `last` (of the newest run that has one) means."""
    if wanted in ("best", "last"):
        for run in versions(runs):
            if found := newest(run, wanted):
                return found
        raise UserError(f"{wanted}: no run under {runs} has a {wanted} checkpoint")
    if (path := Path(wanted)).is_dir():
        path = newest(path, kind) or newest(path) or path
    if not path.is_file():  # a named pipe or a device would be waited for
        raise UserError(f"{shortened(wanted)}: no such file; allowed are best, last, a checkpoint, a run's folder")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which cannot run code or import a module; UserError if it is damaged or another project's."""
    import torch  # here, for `runs` does without it

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a file that it has not written
        reason = shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 120)
        raise UserError(f"{path}: that file is not an intact checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not {FORMAT_ENTRY, "datamodule_hyper_parameters"} & checkpoint.keys():
        raise UserError(f"{path}: that file is not a checkpoint of {PROGRAM}")
    # a Trainer without this package writes no format; those of 2 can be scored
    if (found := checkpoint.get(FORMAT_ENTRY)) not in (2, FORMAT, None):
        raise UserError(f"{path}: that checkpoint has the format {found!r:.40}, and this version reads 2 and {FORMAT}")
    return {"hyper_parameters": {}, "datamodule_hyper_parameters": {}, **checkpoint}  # some modules save none


def evaluations(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what results.json has of `test`: one for each checkpoint, data and number of samples, the latest last."""
    return [one for one in results.get("test", []) if isinstance(one, dict)]


def own_tests(results: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the evaluations of a run on all of its own test set, by step the latest."""
    of = {"test_set": section(results, "fit").get("test_set"), "whole": True}
    return {test["step"]: test for test in evaluations(results) if of.items() <= test.items()}


def test_score(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluation of the best state of a run, or the last if none is, on all of its own test set; or {}."""
    fit = section(results, "fit")
    return own_tests(results).get(section(fit, "best").get("step", fit.get("steps")), {})


def checkpoint_lines(wanted: str, path: Path, runs: Path) -> list[str]:
    """Return what is printed of a checkpoint: of `best` its accuracy too, and any run's that is higher on its data."""
    found: dict[Path, Any] = {}
    for run in versions(runs) if wanted == "best" else []:
        fit, best = section(read_results(run), "fit"), newest(run, "best")
        if best and isinstance(accuracy := section(fit, "best").get("val/accuracy"), float):
            found[best] = fit.get("test_set"), accuracy
    if path not in found:
        return [f"Checkpoint: {path}"]
    best = max((one for one in found if found[one][0] == found[path][0]), key=lambda one: float(found[one][1]))
    shown = {"Checkpoint": path, **({"More accurate": best} if found[best] > found[path] else {})}
    return [f"{title}: {one} (val accuracy {100 * found[one][1]:.2f} %)" for title, one in shown.items()]
