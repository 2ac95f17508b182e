"""Signals that stop a training in good order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .checkpoints import CheckpointKeeper
from .errors import Interrupted


@contextmanager
def stop_on_signals(keeper: CheckpointKeeper) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the training after the current step, with Interrupted; a second Ctrl-C at once."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def stop(signum: int, frame: FrameType | None) -> None:
        keeper.stop_signal = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def install() -> None:
        for signum in before:
            signal.signal(signum, stop)

    install()
    keeper.on_start = install  # again: Lightning 2.6 puts its own before them, which end a validation with status 0
    try:
        yield
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning 2.6 turns it into exit status 1
            raise Interrupted(signal.SIGINT, keeper.last_path) from None
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
