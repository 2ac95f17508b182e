"""The errors that a user meets. Whatever else is raised is a bug, and shows its traceback."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """Input that cannot be used, in one line: what, its value, and what is allowed. Exit status 2."""


class TrainingFailed(RuntimeError):  # noqa: N818, it is an outcome
    """The training diverged, or a disk is full; earlier checkpoints are intact. Exit status 3."""


class ProcessLost(TrainingFailed):
    """Another process of this run ended or cannot be reached. Exit status 3."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """The training was stopped by a signal, and can be resumed from a checkpoint. Exit status 128 + signum."""

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(signum, checkpoint)
        self.signum = signum
        self.checkpoint = checkpoint
        self.flags = ""  # that the command to resume needs besides
