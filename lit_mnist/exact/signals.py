"""Signals that stop a training in good order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .checkpoints import LastCheckpoint
from .errors import Interrupted


@contextmanager
def stop_on_signals(last: LastCheckpoint | None) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the training after the step at hand; a second Ctrl-C ends it at once.

    Raises:
        Interrupted: the training was ended so.
    """
    if last is None:
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def stop(signum: int, frame: FrameType | None) -> None:
        last.stop_signal = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def install() -> None:
        for signum in before:
            signal.signal(signum, stop)

    install()
    last.on_start = install  # again: Lightning 2.6 puts its own before them, which would end a validation with status 0
    try:
        yield
    except SystemExit as exit_:
        # Lightning 2.6 turns KeyboardInterrupt into exit status 1
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise Interrupted(signal.SIGINT, last.path) from None
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
