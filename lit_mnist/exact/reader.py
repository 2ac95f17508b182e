"""Reads checkpoints. Nothing here imports Lightning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from .console import PROGRAM, shortened
from .errors import UserError
from .runs import find_checkpoint, versions
from .state import ENTRIES, StateError, check_entries, fill, not_restorable

FORMAT = 2  # goes up when the versions before and this one cannot read each other's checkpoints
FORMAT_ENTRY = f"{PROGRAM}_format"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`: it can make the program neither run code nor import a module.

    Raises:
        UserError: the file is no intact checkpoint of this project, or of a newer format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the kinds of tensors that a hostile file may hold
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a file that is none of its own
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"--ckpt_path {path}: that file is no intact checkpoint ({reason})") from error
    # a Trainer without this package writes no format
    known = isinstance(checkpoint, dict) and {FORMAT_ENTRY, "datamodule_hyper_parameters"} & checkpoint.keys()
    if not known or "state_dict" not in checkpoint:
        raise UserError(f"--ckpt_path {path}: that file is no checkpoint of {PROGRAM}")
    version = checkpoint.get(FORMAT_ENTRY, FORMAT)
    fill({"hyper_parameters": {}, "datamodule_hyper_parameters": {}}, checkpoint)  # of those that have saved none
    if type(version) is not int or version != FORMAT:
        newer = type(version) is int and version > FORMAT
        raise UserError(
            f"--ckpt_path {path}: that checkpoint has the format {shortened(repr(version), 40)}, and this version reads"
            f" {FORMAT}; {'install a newer' if newer else 'use the'} {PROGRAM}{'' if newer else ' that wrote it'}"
        )
    try:
        check_entries(checkpoint, ENTRIES)
    except StateError as error:
        raise not_restorable(path, error) from error
    return checkpoint


def find_and_read(wanted: str, runs: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `best`, `last` or a path means, and what it holds.

    Raises:
        UserError: there is none, or it cannot be read; then with the newest intact one, where a name was given.
    """
    path = find_checkpoint(wanted, runs)
    try:
        return path, read_checkpoint(path)
    except UserError as error:
        intact = newest_intact(runs) if wanted in ("best", "last") else None
        raise UserError(f"{error}; the newest intact one is {intact}" if intact else str(error)) from error


def newest_intact(runs: Path) -> Path | None:
    """The newest checkpoint that can be read, of the newest run that has one."""
    for run in versions(runs):
        files = [path for path in run.glob("checkpoints/*.ckpt") if path.is_file()]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                read_checkpoint(path)
            except UserError:
                continue
            return path
    return None
