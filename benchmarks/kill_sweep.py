"""Kill a study with SIGKILL at random moments, continue it, and compare it with the study that was never killed.

    python benchmarks/kill_sweep.py                        # one worker and two: minutes
    python benchmarks/kill_sweep.py --kills 3 --workers 2 --storage postgresql+psycopg://user@host/empty_database

Two learning rates with three seeds each on real MNIST, shortened. With several workers a kill is of one of them, or of
the process that started them. Compared are all rows of the table but times and places, and every tensor of each run's
last checkpoint. Ends with status 1 where anything differed; `--record` appends to results/kill_sweep.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep
from typing import Any

import torch
from kill import ENVIRONMENT, REPOSITORY, tensors_of
from records import add_flag, append

STUDY = "base: [{configs}/smoke.yaml, base.yaml]\nsettings: {{model.lr: [0.2, 0.4]}}\nseeds: 3\nheartbeat: 2\n"
BASE = "trainer: {max_epochs: 4, limit_train_batches: 60, accelerator: cpu}\ncheckpoint: {every_seconds: 0.2}\n"


def start(folder: Path, options: argparse.Namespace, workers: int, storage: str | None) -> subprocess.Popen[bytes]:
    (folder / "study.yaml").write_text(STUDY.format(configs=REPOSITORY / "configs"))
    (folder / "base.yaml").write_text(BASE)
    command = [sys.executable, "-m", "lit_mnist", "sweep", "--config", "study.yaml", "--workers", str(workers)]
    command += ["--data.root", str(Path(options.root).resolve()), *(["--storage", storage] if storage else [])]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def outcome(folder: Path) -> tuple[Any, dict[str, bytes]]:
    """Return the rows of the table, and the bytes of all tensors of the last checkpoint of each run."""
    rows = json.loads((folder / "lightning_logs/sweeps/study/results.json").read_text())["settings_tried"]
    found: dict[str, bytes] = {}
    for row in rows:
        for run in row["trials"]:
            path = next((folder / "lightning_logs" / run["run"] / "checkpoints").glob("last-*"))
            name = f"lr {row['model.lr']}, seed {run['seed']}"
            found |= tensors_of(torch.load(path, weights_only=True), name)
            for key in ("run", "seconds"):
                del run[key]
        del row["seconds"]
    return rows, found


def kill(folder: Path, process: subprocess.Popen[bytes], moment: random.Random) -> bool:
    """Kill the command or one of its workers some seconds after it has begun a run; False if it ended before."""
    before = set(folder.glob("lightning_logs/version_*"))
    while set(folder.glob("lightning_logs/version_*")) == before and process.poll() is None:
        sleep(0.01)
    sleep(moment.uniform(0, 6))
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    workers = [int(pid) for pid in listed.split()]
    if process.poll() is not None:
        return False
    if workers and moment.random() < 0.5:  # the others continue
        os.kill(moment.choice(workers), signal.SIGKILL)
        sleep(moment.uniform(0, 6))
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        sleep(0.1)  # they stop after their run
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="so many workers (1 and 2)")
    parser.add_argument("--kills", type=int, default=5, help="so often each (5)")
    parser.add_argument("--storage", help="a database's URL; it must be empty")
    parser.add_argument("--root", default=str(REPOSITORY / "data"), help="folder of the data")
    add_flag(parser, "kill_sweep")
    options = parser.parse_args()
    different = False
    with tempfile.TemporaryDirectory() as name:
        (whole := Path(name, "whole")).mkdir()
        if start(whole, options, 1, None).wait():
            return 1
        table, expected = outcome(whole)
        for workers in options.workers:
            (folder := Path(name, str(workers))).mkdir()
            moment = random.Random(workers)
            kills = sum(
                kill(folder, start(folder, options, workers, options.storage), moment) for _ in range(options.kills)
            )
            if start(folder, options, workers, options.storage).wait():
                return 1
            ours, found = outcome(folder)
            same = ours == table and found == expected
            record = {"workers": workers, "storage": (options.storage or "sqlite").partition(":")[0], "kills": kills}
            record |= {"runs": len(list(folder.glob("lightning_logs/version_*"))), "tensors": len(found), "same": same}
            print(record, flush=True)
            append(options, record)
            different |= not same
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
