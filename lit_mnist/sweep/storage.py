"""Where a study's trials are kept, and which of its workers live."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import expanded

LOOK_SECONDS = 1.0  # so often a worker looks whether its parent lives, and one without work whether there is some


class JournalLock(JournalFileOpenLock):
    """Lets one process write the journal, and cuts off the half line that a killed one may have left.

    Optuna 4.9's own locks outlast a killed process, and with half a line in its midst no journal can be read again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(f"{path}.held")  # .lock is the name of Optuna's

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.path.open("rb+") as file:
            written = file.seek(0, os.SEEK_END)
            file.seek(max(0, written - 1))
            if written and file.read(1) != b"\n":
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def opened(storage: str | None, folder: Path) -> BaseStorage:
    """The storage of a study's trials.

    Raises:
        UserError: it cannot be used.
    """
    if storage and "://" in storage:
        try:
            from sqlalchemy.engine import make_url

            hidden = make_url(storage).render_as_string(hide_password=True)
        except Exception:
            hidden = storage.partition("://")[0] + "://..."
        for patience in (True, True, True, False):
            try:
                return RDBStorage(storage, engine_kwargs={"pool_pre_ping": True})
            except Exception as error:  # SQLAlchemy's, a driver's, or an import's
                reason = shortened(" ".join(str(error.__cause__ or error).split()), 200)
                if patience and ("already exists" in reason or "duplicate" in reason):
                    sleep(LOOK_SECONDS)  # another worker makes the tables at this moment
                    continue
                raise UserError(f"--storage {hidden}: that database cannot be used ({reason})") from error
    path = expanded(storage, "--storage") if storage else folder / "journal.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("rb") as file:
            if file.read(10) not in (b"", b'{"op_code"'):  # of which it would be a pity
                raise ValueError("it begins in another way")
        return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
    except OSError as error:
        raise UserError(f"--storage {path}: {error.strerror}") from error
    except Exception as error:  # whatever Optuna makes of a line that is none of its own
        reason = shortened(str(error) or type(error).__name__, 120)
        raise UserError(f"--storage {path}: that file is no journal of trials ({reason})") from error


class Pulse(threading.Thread):
    """Shows other machines that this worker lives, and stops it where its parent is gone.

    Args:
        heartbeat: seconds between two signs of life.
        parent: process that has started this one; 0 or None for none that matters.
    """

    def __init__(self, heartbeat: float, parent: int | None) -> None:
        super().__init__(daemon=True)
        self.heartbeat = heartbeat
        self.parent = parent
        self.trial: optuna.Trial | None = None  # the one in hand
        self.ended = threading.Event()

    def __enter__(self) -> Pulse:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()

    def run(self) -> None:
        beats, beaten = 0, monotonic()
        while not self.ended.wait(min(LOOK_SECONDS, self.heartbeat)):
            if self.parent and os.getppid() != self.parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            trial = self.trial
            if trial and monotonic() - beaten >= self.heartbeat:
                beats, beaten = beats + 1, monotonic()
                with suppress(Exception):  # a database that is away for a while may be back at the next one
                    trial.set_user_attr("beat", beats)
