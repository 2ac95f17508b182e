"""Durable writing and safe reading of checkpoints."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

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


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those written before are as they were."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that a kill at any moment leaves a whole one, and reads with `weights_only=True` alone.

    TorchCheckpointIO of Lightning 2.6 writes to a temporary folder, which may be on another file system, and copies
    from there without flushing: a kill in the middle leaves half a file.
    """

    def __init__(self, loaded: dict[str, dict[str, Any]] | None = None) -> None:
        self.loaded = loaded or {}  # by path: checkpoints that were read before
        self.readable: bool = False  # whether one that was written could be read again

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        content = io.BytesIO()  # in memory first: a full disk then is a plain OSError
        torch.save(checkpoint, content)
        if not self.readable:
            check_readable(checkpoint, content)
            self.readable = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too, is on the disk before an older checkpoint is removed
            finally:
                os.close(folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointWriteError(error.errno, error.strerror, str(path)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if str(path) in self.loaded:
            return dict(self.loaded[str(path)])
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


def check_readable(checkpoint: Mapping[str, Any], content: io.BytesIO) -> None:
    """Check that what is written can be loaded with `weights_only=True`.

    Raises:
        UserError: it holds something else than tensors and plain values; the message names the entry.
    """

    def problem(written: io.BytesIO) -> str:
        written.seek(0)
        try:
            torch.load(written, weights_only=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    if not problem(content):
        return
    for name, value in checkpoint.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            part = io.BytesIO()
            torch.save(inner, part)
            if reason := problem(part):
                kind = (re.findall(r"GLOBAL (\S+)|class (\S+)", reason) or [("", "")])[0]
                raise UserError(
                    f"a checkpoint could not be loaded again: in {name}/{key} there is something else than tensors,"
                    f" numbers, strings and booleans {shortened(' '.join(filter(None, kind)), 80)}".rstrip()
                )
