"""What is tried, and what came of it. Imports nothing heavy: the first process only hands these around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("commands", "checkpoints")


@dataclass
class Case:
    """A command line and what is prepared for it; a function of kind, seed and index alone."""

    args: list[str]
    expected: int | None = None  # the status, where it is known
    note: str = ""  # what was prepared, in words
    mode: str = ""  # what the process lacks: see runner.MODES
    prepare: list[Callable[[Path], None]] = field(default_factory=list)  # called with the sandbox


@dataclass
class Result:
    kind: str
    index: int
    args: list[str]
    note: str
    status: str
    problems: list[str]
    out: str
    err: str
    seconds: float
    sandbox: str = ""  # where it lies, if it was kept
