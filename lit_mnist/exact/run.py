"""A run: the folder it writes to, and the state it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ddp import is_first
from .errors import UserError
from .reader import check_resumable
from .runs import claim_version, discard, newest, run_folder


@dataclass
class Run:
    """Where a fit writes, and what it begins with; both ways to make one raise UserError where they cannot."""

    folder: Path | None = None  # of its files; None on all processes but the first until it starts
    checkpoint: Path | None = None  # what it begins with
    loaded: Mapping[str, Any] = field(default_factory=dict)  # the content of that checkpoint
    origin: Path | None = None  # the run that the checkpoint belongs to; None where it lies in no run's folder
    unchanged: bool = True  # whether it has the settings that it had; then one that a callback had stopped stays so
    made: Path | None = None  # the last folder above `folder` that existed before; None where `folder` itself did
    started: bool = False

    @classmethod
    def new(cls, runs: Path, checkpoint: Path | None = None, loaded: Mapping[str, Any] | None = None) -> Run:
        """Make a run in a new folder `version_N`, which only the first process does."""
        run = cls.resumed(checkpoint, loaded or {}) if checkpoint else cls()
        run.folder = None
        if is_first():
            runs = runs.absolute()
            run.made = next(folder for folder in (runs, *runs.parents) if folder.exists())
            try:
                run.folder = claim_version(runs)
            except OSError as error:
                raise UserError(f"no run can be written to {runs} ({error.strerror})") from error
        return run

    @classmethod
    def resumed(cls, checkpoint: Path, loaded: Mapping[str, Any], unchanged: bool = True) -> Run:
        """Return the run that a checkpoint belongs to, in its own folder."""
        check_resumable(checkpoint, loaded)
        folder = run_folder(checkpoint)
        return cls(folder, checkpoint, loaded, folder, unchanged)

    @property
    def continues(self) -> bool:
        """Whether it continues in the folder of its checkpoint."""
        return self.origin is not None and self.made is None and self.folder == self.origin

    @property
    def parent(self) -> str | None:
        """The checkpoint of another run that this one begins with."""
        return f"{self.origin.name}/{self.checkpoint.name}" if self.checkpoint and self.origin and self.made else None

    def discard_unused(self) -> None:
        """Remove the folder that was made for a run which never started."""
        if self.folder and self.made and not self.started:
            discard(self.folder, self.made)
            self.folder = None


def is_newest(checkpoint: Path) -> bool:
    """Say whether a checkpoint is the newest state of the run that it belongs to."""
    folder = run_folder(checkpoint)
    last = newest(folder) if folder else None
    return last is not None and last.resolve() == checkpoint.resolve()
