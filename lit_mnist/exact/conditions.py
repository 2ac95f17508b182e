"""What a figure depends on besides the code: versions, hardware, commit."""

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .console import PROGRAM


@cache  # the code that runs is that of the start
def commit() -> str | None:
    """Return the git commit of this code, with `-dirty` where it was changed since; None outside a checkout."""
    git = partial(subprocess.check_output, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True)
    with suppress(OSError, subprocess.SubprocessError):  # as where the checkout around it is another project's
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        return str(git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])).strip()
    return None


@cache
def conditions(device: torch.device) -> dict[str, Any]:
    """Return the versions, the hardware and the commit that a figure depends on."""
    versions = {"python": platform.python_version()}
    for name in (PROGRAM, "torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorboard"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    hardware = {"device": name, "processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": versions, "hardware": hardware, "commit": commit()}
