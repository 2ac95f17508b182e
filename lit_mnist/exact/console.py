"""What a user meets: errors (any other is a bug, and shows its traceback), and words. Nothing here imports torch."""

import os
from pathlib import Path

PROGRAM = __name__.partition(".")[0]  # the package that this one lies in


class UserError(ValueError):
    """Input that cannot be used, in one line: what, its value, and what is allowed. Exit status 2."""


class TrainingFailed(RuntimeError):  # noqa: N818, it is an outcome
    """The training diverged, or a disk is full; earlier checkpoints are intact. Exit status 3."""


class ProcessLost(TrainingFailed):
    """Another process of this run ended or cannot be reached. Exit status 3."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """The training was stopped by a signal, whose number and the last checkpoint are given. Exit status 128 + it."""


def shortened(text: str, longest: int = 200) -> str:
    """Return a text for a message: on one line, and if it is long only its beginning and its end."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 4 :]}"


def shown(path: str | Path) -> str:
    """Return a path as a user would type it: relative if it lies below the current folder."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def number(*variables: str) -> int:
    """Return the first of these environment variables that is a number; else 0."""
    return next((int(value) for name in variables if (value := os.environ.get(name, "")).isdecimal()), 0)
