"""Durable writing of checkpoints, and one error for those that cannot be restored."""

import io
import os
import pickle
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from .console import Interrupted, UserError, shortened
from .ddp import lost
from .runs import replaced

# whatever these functions of Lightning 2.6 and of ExactResume raise, they raise about the checkpoint
RESTORING = {"_restore_modules_and_callbacks", "restore_training_state", "_load_combined_loader_states", "restore_rest"}


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that a kill leaves whole, which Lightning 2.6 does not, and reads with `weights_only=True`."""

    def __init__(self, loaded: dict[str, dict[str, Any]] | None = None) -> None:
        self.loaded = loaded or {}  # checkpoints that were read before, by path
        self._readable = False  # whether one that was written could be read again

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        content = io.BytesIO()  # in memory first: torch's writer aborts the process on a full disk
        torch.save(checkpoint, content)
        if not self._readable:
            content.seek(0)
            try:
                torch.load(content, weights_only=True)
            except pickle.UnpicklingError as error:
                (kind, *_) = re.findall(r"GLOBAL (\S+)", str(error)) or ["Python object"]
                raise UserError(f"checkpoints may hold tensors, numbers, strings and booleans, not a {kind}") from error
            self._readable = True
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial, partial.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, is on the disk before an older checkpoint is removed
        os.close(folder)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        known = self.loaded.get(str(path))
        return dict(known) if known else torch.load(path, map_location=map_location or "cpu", weights_only=True)


@contextmanager
def translate_restoring(checkpoint: Path | None) -> Iterator[None]:
    """Turn whatever fails while a checkpoint is restored into a UserError; bugs elsewhere keep their traceback."""
    try:
        yield
    except Exception as error:
        # no checkpoint's fault
        other = isinstance(error, (Interrupted, UserError, NameError, ImportError, torch.OutOfMemoryError))
        functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if not checkpoint or other or functions.isdisjoint(RESTORING) or lost(error):
            raise
        reason = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
        raise UserError(f"{checkpoint}: that checkpoint's state cannot be restored ({reason})") from error
