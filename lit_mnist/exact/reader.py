"""Finding and reading checkpoints; imports torch, never Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .console import PROGRAM, shortened
from .errors import UserError
from .runs import newest, versions

FORMAT = 3  # goes up when a resumed run needs other entries
FORMAT_ENTRY = f"{PROGRAM}_format"
SCORED = (2, FORMAT, None)  # whose weights can be scored; a Trainer without this package writes no format
# what scoring reads, and its types
ENTRIES: dict[str, type] = {"state_dict": dict, "hyper_parameters": dict, "datamodule_hyper_parameters": dict}
ENTRIES |= {"epoch": int, "global_step": int, "pytorch-lightning_version": str}


def find_checkpoint(wanted: str, runs: Path) -> Path:
    """Return the file that `best`, `last` or a path means.

    `best` and `last` mean the newest run that has one: the best checkpoint by the validation score, and the last one
    written.

    Raises:
        UserError: there is none.
    """
    if wanted in ("best", "last"):
        found = next(filter(None, (newest(run, wanted) for run in versions(runs))), None)
        if not found:
            hint = "" if wanted == "last" else " (a run without validation has only a last one)"
            raise UserError(f"{wanted}: no run under {runs} has a {wanted} checkpoint{hint}")
        return found
    path, named = Path(wanted), shortened(wanted)
    if "://" in wanted:
        raise UserError(f"{named}: only local files are loaded; download it first, then pass its path")
    try:
        if path.is_file():  # a named pipe or a device would be waited for
            return path
        what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', error)})"
    raise UserError(f"{named}: that file {what}; allowed are best, last and the path of a checkpoint")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`: it can make the program neither run code nor import a module.

    Raises:
        UserError: the file is no intact checkpoint of this project, or of another format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the kinds of tensors that a hostile file may hold
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a file that it has not written
        reason = shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 120)
        raise UserError(f"{path}: that file is no intact checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not {FORMAT_ENTRY, "datamodule_hyper_parameters"} & checkpoint.keys():
        raise UserError(f"{path}: that file is no checkpoint of {PROGRAM}")
    if (version := checkpoint.get(FORMAT_ENTRY)) not in SCORED:
        version = shortened(repr(version), 40)
        raise UserError(f"{path}: that checkpoint has the format {version}, and this version reads 2 and {FORMAT}")
    for name in ("hyper_parameters", "datamodule_hyper_parameters"):
        checkpoint.setdefault(name, {})  # of a module that has saved none
    for name, kind in ENTRIES.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: that file is no intact checkpoint ({name} is missing or no {kind.__name__})")
    return checkpoint


def find_and_read(wanted: str, runs: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that `best`, `last` or a path means, and its contents.

    Raises:
        UserError: there is none, or it cannot be read; where a name was given, with the newest intact one.
    """
    path = find_checkpoint(wanted, runs)
    try:
        return path, read_checkpoint(path)
    except UserError as error:
        others = (newest(run, kind) for run in versions(runs) for kind in ("last", "best"))
        for other in filter(None, others) if wanted in ("best", "last") else ():
            try:
                read_checkpoint(other)
            except UserError:
                continue
            raise UserError(f"{error}; the newest intact one is {other}") from error
        raise


def check_resumable(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Check that a training can be resumed from a checkpoint, as far as can be said before there is a trainer.

    Raises:
        UserError: it is of an older format, or holds weights alone.
    """
    if not {"loops", "callbacks", "optimizer_states", "lr_schedulers", "processes"} <= checkpoint.keys():
        raise UserError(f"{path}: it holds weights alone, no state to resume")
    if (version := checkpoint.get(FORMAT_ENTRY)) != FORMAT:
        raise UserError(
            f"{path}: that checkpoint has the format {version}: this version scores it, and the {PROGRAM} that wrote it"
            " resumes it"
        )
