"""Many command lines and many malformed checkpoints, each in a sandbox: `python -m tests.fuzz --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # conftest is imported by this name, as under pytest
