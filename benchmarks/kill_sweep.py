"""Kill a study with SIGKILL at random moments, continue it, and compare it with the study that was never killed.

Two learning rates with three seeds each on real MNIST, shortened, with one worker and with two, of which one is killed
or the process that started them: minutes. Compared are all rows of the table but times and places, and every tensor of
each run's last checkpoint. Ends with status 1 if anything differs.
"""

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

from kill import ENVIRONMENT, tensors_of, wait
from records import REPOSITORY, append, children, make_parser

STUDY = "base: [{configs}/smoke.yaml, base.yaml]\nsettings: {{model.lr: [0.2, 0.4]}}\nseeds: 3\nheartbeat: 2\n"
BASE = "trainer: {max_epochs: 4, limit_train_batches: 60, accelerator: cpu}\ncheckpoint: {every_seconds: 0.2}\n"


def start(folder: Path, root: Path, workers: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(STUDY.format(configs=REPOSITORY / "configs"))
    (folder / "base.yaml").write_text(BASE)
    flags = ["sweep", "--config=study.yaml", f"--data.root={root}", f"--workers={workers}"]
    command = [sys.executable, "-m", "lit_mnist", *flags]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def outcome(folder: Path) -> tuple[Any, dict[str, bytes]]:
    """Return the rows of the table, and the bytes of all tensors of the last checkpoint of each run."""
    rows = json.loads((folder / "lightning_logs/sweeps/study/results.json").read_text())["settings_tried"]
    found: dict[str, bytes] = {}
    for row in rows:
        del row["seconds"]
        for run in row["trials"]:
            path = next((folder / "lightning_logs" / run["run"] / "checkpoints").glob("last-*"))
            found |= tensors_of(path, f"lr {row['model.lr']}, seed {run['seed']}")
            del run["run"], run["seconds"]
    return rows, found


def kill(folder: Path, process: subprocess.Popen[bytes], moment: random.Random) -> bool:
    """Kill the command or one of its workers some seconds after it has begun a run; False if it ended before."""
    wait(folder, process, "version_*")
    sleep(moment.uniform(0, 6))
    if process.poll() is not None:
        return False
    workers = children(process)
    if workers and moment.random() < 0.5:  # the others continue
        os.kill(moment.choice(workers), signal.SIGKILL)
        sleep(moment.uniform(0, 6))
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they stop after their run
        sleep(0.1)
    return True


def main() -> int:
    parser = make_parser(__doc__, "kill_sweep")
    parser.add_argument("--kills", type=int, default=5, help="so often with one worker, and with two (5)")
    options, different = parser.parse_args(), False
    with tempfile.TemporaryDirectory() as name:
        start(whole := Path(name, "whole"), options.root, 1).wait()
        expected = outcome(whole)
        for workers in (1, 2):
            folder, moment = Path(name, str(workers)), random.Random(workers)
            kills = sum(kill(folder, start(folder, options.root, workers), moment) for _ in range(options.kills))
            start(folder, options.root, workers).wait()
            ours = outcome(folder)
            runs = len(list(folder.glob("lightning_logs/version_*")))
            record = {"workers": workers, "kills": kills, "runs": runs, "tensors": len(ours[1])}
            print(record := record | {"same": ours == expected}, flush=True)
            append(options, record)
            different |= ours != expected
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
