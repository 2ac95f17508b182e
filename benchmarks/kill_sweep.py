"""Kill a study with SIGKILL at random moments, go on with it, and compare it with the study that was never killed.

    python benchmarks/kill_sweep.py                        # one worker, two, and two with trials in PostgreSQL: minutes
    python benchmarks/kill_sweep.py --kills 3 --ways one

Two learning rates and two label smoothings with five seeds each on real MNIST, shortened. With several workers a kill
is of one of them, or of the process that started them. Compared are all rows of the table but the seconds, and for
each setting and seed every tensor of the last checkpoint. Ends with status 1 where anything differed; with
`--record` a line for each study is appended to results/kill_sweep.jsonl.
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
from time import monotonic, sleep
from typing import Any

import torch
from kill import ENVIRONMENT, REPOSITORY, same, tensors
from records import add_flag, append

from lit_mnist.data import datasets
from lit_mnist.exact.conditions import conditions

STUDY = """\
base: [{configs}/smoke.yaml, base.yaml]
settings:
  model.lr: [0.2, 0.4]
  model.label_smoothing: [0.0, 0.05]
seeds: 5
heartbeat: 1.0
"""
BASE = """\
trainer: {max_epochs: 4, limit_train_batches: 60, accelerator: cpu}
checkpoint: {every_seconds: 0.2}
"""
WAYS = {"one": 1, "two": 2, "postgresql": 2}


def start(folder: Path, root: str, workers: int, storage: str | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_mnist", "sweep", "--config", "study.yaml", "--data.root", root]
    command += ["--workers", str(workers), *(["--storage", storage] if storage else [])]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def trials_begun(folder: Path) -> int:
    return len(list(folder.glob("lightning_logs/version_*/trial.json")))


def outcome(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The rows of the table without the seconds, and all tensors of each setting and seed."""
    rows = json.loads((folder / "lightning_logs/sweeps/study/results.json").read_text())["settings_tried"]
    found: dict[str, torch.Tensor] = {}
    table = []
    for row in rows:
        setting = f"{row['model.lr']} {row['model.label_smoothing']}"
        for trial in row.pop("trials"):
            path = next((folder / "lightning_logs" / trial["run"] / "checkpoints").glob("last-*"))
            checkpoint = torch.load(path, weights_only=True)
            found |= {f"{setting}, seed {trial['seed']}{key}": tensor for key, tensor in tensors(checkpoint).items()}
        table.append({name: value for name, value in row.items() if name != "seconds"})
    return table, found


def killed(folder: Path, root: str, workers: int, storage: str | None, kills: int, moment: random.Random) -> int:
    """Run the study, killing it so often, and return how many kills came while a trial was in progress."""
    done = 0
    while done < kills:
        process = start(folder, root, workers, storage)
        before, begun = trials_begun(folder), monotonic()
        while trials_begun(folder) == before and process.poll() is None and monotonic() - begun < 60:
            sleep(0.01)
        sleep(moment.uniform(0, 8))
        if process.poll() is not None:
            break
        workers_left = children(process.pid)
        if workers_left and moment.random() < 0.5:  # a worker; the others go on
            os.kill(moment.choice(workers_left), signal.SIGKILL)
            done += 1
            sleep(moment.uniform(0, 4))
        if process.poll() is None:
            process.kill()
            done += 1
        process.wait()
        while any(Path(f"/proc/{child}").exists() for child in workers_left):
            sleep(0.1)  # they notice that their parent is gone
    process = start(folder, root, workers, storage)
    if process.wait():
        raise RuntimeError(f"sweep ended with status {process.returncode}")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="how the study is run (all)")
    parser.add_argument("--kills", type=int, default=10, help="so many each (10)")
    parser.add_argument("--storage", help="of the way postgresql: a database's URL; it must be empty")
    parser.add_argument("--root", default=str(REPOSITORY / "data"), help="folder of the data")
    add_flag(parser, "kill_sweep")
    options = parser.parse_args()
    root = str(Path(options.root).resolve())
    datasets.prepare(root)
    different = 0
    with tempfile.TemporaryDirectory() as name:
        for way in ["never killed", *options.ways]:
            folder = Path(name, way)
            folder.mkdir()
            (folder / "study.yaml").write_text(STUDY.format(configs=REPOSITORY / "configs"))
            (folder / "base.yaml").write_text(BASE)
            if way == "never killed":
                if start(folder, root, 1, None).wait():
                    return 1
                table, expected = outcome(folder)
                continue
            storage = options.storage if way == "postgresql" else None
            if way == "postgresql" and not storage:
                print("postgresql: no --storage given")
                continue
            kills = killed(folder, root, WAYS[way], storage, options.kills, random.Random(way))
            ours, found = outcome(folder)
            wrong = [key for key in expected.keys() | found.keys() if not same(expected, found, key)]
            wrong += ["table"] * (ours != table)
            different += bool(wrong)
            record = {"way": way, "kills": kills, "trials": sum(row["n"] for row in ours), "tensors": len(found)}
            print(f"{record}, different: {wrong[:5] or 'none'}", flush=True)
            where = conditions(torch.device("cpu"))
            where["hardware"]["threads"] = int(ENVIRONMENT["OMP_NUM_THREADS"])
            append(options, {**record, "different": wrong}, where)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
