"""A PostgreSQL server of Debian's packages for the length of a test."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from several import free_port


def program(name: str) -> str:
    """Its path; Debian keeps them out of PATH.

    Raises:
        Skipped: PostgreSQL is not installed.
    """
    found = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    if not found:
        pytest.skip(f"there is no PostgreSQL here ({name}); Debian's package is postgresql")
    return found


@contextmanager
def server() -> Iterator[str]:
    """Start one with an empty database, and give its URL."""
    initdb, pg_ctl, port = program("initdb"), program("pg_ctl"), free_port()
    user = None
    if os.getuid() == 0:  # as which PostgreSQL does not run
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are root's alone
    try:
        if user:
            shutil.chown(folder, user)
        data, log = str(folder / "data"), str(folder / "log")

        def run(*command: str) -> None:
            subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

        run(initdb, "-D", data, "-A", "trust", "-U", "digits", "--no-sync")
        run(pg_ctl, "-D", data, "-l", log, "-w", "-o", f"-p {port} -h 127.0.0.1 -k {folder}", "start")
        try:
            yield f"postgresql+psycopg://digits@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
