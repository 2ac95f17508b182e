"""A few of the kills that benchmarks/kill.py does by the dozen: real processes, real data, SIGKILL."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY


@pytest.mark.slow
def test_killed_and_resumed_processes_end_as_if_nothing_had_been(real_root: Path) -> None:
    command = [sys.executable, "benchmarks/kill.py", "smoke", "--kills", "3", "--root", str(real_root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 runs differ" in done.stdout
