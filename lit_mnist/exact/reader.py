"""Finding and reading checkpoints; imports torch, never Lightning."""

from pathlib import Path
from typing import Any

import torch

from .console import PROGRAM, UserError, shortened
from .runs import newest, versions

FORMAT = 3  # goes up when a resumed run needs other entries
FORMAT_ENTRY = f"{PROGRAM}_format"
# what scoring reads
ENTRIES: dict[str, type] = {"state_dict": dict, "hyper_parameters": dict, "datamodule_hyper_parameters": dict}
ENTRIES |= {"epoch": int, "global_step": int, "pytorch-lightning_version": str}


def find_checkpoint(wanted: str, runs: Path, kind: str = "best") -> Path:
    """Return the file that a path, a run's folder, `best` or `last` (of the newest run that has one) means."""
    if wanted in ("best", "last"):
        for run in versions(runs):
            if found := newest(run, wanted):
                return found
        raise UserError(f"{wanted}: no run under {runs} has a {wanted} checkpoint")
    if (path := Path(wanted)).is_dir():
        path = newest(path, kind) or newest(path) or path
    if not path.is_file():  # a named pipe or a device would be waited for
        raise UserError(f"{shortened(wanted)}: no such file; allowed are best, last, a checkpoint, a run's folder")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which cannot run code or import a module; UserError if it is damaged or another project's."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a file that it has not written
        reason = shortened((str(error).strip().splitlines() or [type(error).__name__])[0], 120)
        raise UserError(f"{path}: that file is not an intact checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not {FORMAT_ENTRY, "datamodule_hyper_parameters"} & checkpoint.keys():
        raise UserError(f"{path}: that file is not a checkpoint of {PROGRAM}")
    # a Trainer without this package writes no format; those of 2 can be scored
    if (found := checkpoint.get(FORMAT_ENTRY)) not in (2, FORMAT, None):
        raise UserError(f"{path}: that checkpoint has the format {found!r:.40}, and this version reads 2 and {FORMAT}")
    checkpoint = {"hyper_parameters": {}, "datamodule_hyper_parameters": {}, **checkpoint}  # some modules save none
    for name, kind in ENTRIES.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: that file is not an intact checkpoint ({name} is missing or no {kind.__name__})")
    return checkpoint
