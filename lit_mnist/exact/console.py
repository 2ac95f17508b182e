"""Words for a terminal. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

PROGRAM = __name__.partition(".")[0]  # the package that this one lies in


def shortened(text: str, longest: int = 200) -> str:
    """A value in a message: on one line, and where it is long its beginning and its end alone."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 4 :]}"


def shown(path: str | Path) -> str:
    """A path as a user would type it: relative where it lies below the current folder."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def print_table(table: Any) -> None:
    """Print a table of rich's; in a pipe, which has no width, without cutting its lines."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def number(*variables: str) -> int:
    """The first of these environment variables that is a number; else 0."""
    return next((int(value) for name in variables if (value := os.environ.get(name, "")).isdecimal()), 0)
