"""Durable writing and safe reading of checkpoints."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from .console import shortened
from .errors import UserError
from .reader import FORMAT, FORMAT_ENTRY, find_and_read, newest_intact, read_checkpoint

__all__ = ["FORMAT", "FORMAT_ENTRY", "DurableCheckpointIO", "find_and_read", "newest_intact", "read_checkpoint"]


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
