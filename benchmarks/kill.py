"""Kill real programs with SIGKILL at random moments, resume them, and compare with runs that were never killed.

Each trial trains a shortened recipe on real MNIST, or a project of tests/foreign.py, is killed at random (seeded)
moments up to four times, is resumed and left to end; of several processes one is killed, and the others have to end.
Every tensor of the checkpoints and every scalar but the timings is compared; the exit status is 1 where any differs.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from records import REPOSITORY, append, children, make_parser, scalars
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from lit_mnist.data import datasets

SHORT = ["--trainer.max_epochs", "3", "--trainer.limit_train_batches", "40", "--trainer.log_every_n_steps", "3"]
SHORT += ["--trainer.enable_model_summary", "false", "--data.val_size", "1000", "--checkpoint.every_seconds", "0.2"]
SHORT += ["--trainer.accelerator", "cpu", "--trainer.devices"]  # last, as resumes get it again
FIT = ["-m", "lit_mnist", "fit"]
RECIPES: dict[str, list[str]] = {
    **{name: [*FIT, *SHORT, devices] for name, devices in (("default", "1"), ("processes", "2"))},
    **{x: [*FIT, "--config", f"{REPOSITORY}/configs/{x}.yaml", *SHORT, "1"] for x in ("seed", "smoke", "fast")},
    # lit_mnist/exact in other projects, under another name, on one process or two
    **{f"{x}-{n}": ["foreign.py", x, "lightning_logs", n] for x in ("autoencoder", "gan", "text") for n in "12"},
}
# one thread a process: sums come out in one order
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
Outcome = dict[str, bytes | list[tuple[int, float]]]


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    shutil.copytree(REPOSITORY / "lit_mnist" / "exact", folder / "machinery", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "tests" / "foreign.py", folder)
    with (folder / "output").open("ab") as file:
        keywords: Any = {"cwd": folder, "env": ENVIRONMENT, "stdout": file, "stderr": file, "start_new_session": True}
        return subprocess.Popen([sys.executable, *arguments], **keywords)


def wait(folder: Path, process: subprocess.Popen[bytes]) -> float:
    """Wait until a run makes another file, or ends, and return that moment: before an event file none can be lost."""
    before = set(folder.glob("lightning_logs/version_0/events.out.*"))
    while set(folder.glob("lightning_logs/version_0/events.out.*")) == before and process.poll() is None:
        sleep(0.005)
    return monotonic()


def finish(folder: Path, arguments: list[str]) -> float:
    """Let a run end, and return the seconds that it trained."""
    process = start(folder, arguments)
    opened = wait(folder, process)
    if process.wait():
        raise RuntimeError(f"fit ended with status {process.returncode}:\n{(folder / 'output').read_text()[-2000:]}")
    return monotonic() - opened


def kill_somewhere(folder: Path, arguments: list[str], seconds: float, moment: random.Random) -> bool:
    """Start a run and kill a process of it, one time in eight in its start; False where it ended before."""
    process, in_start = start(folder, arguments), moment.random() < 1 / 8
    end = monotonic() + moment.uniform(2, 8) if in_start else wait(folder, process) + moment.uniform(0, seconds)
    while monotonic() < end and process.poll() is None:
        sleep(0.002)
    if process.poll() is not None:
        return False
    victim = process.pid if in_start else moment.choice([process.pid, *children(process)])
    # torch 2.15 waits 30 minutes for a first process that died before they were connected
    (os.killpg if in_start else os.kill)(victim, signal.SIGKILL)
    process.wait()
    for _ in range(1200):  # the other process has to notice
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        sleep(0.1)
    raise RuntimeError("a process waits for one that was killed")


def outcome(folder: Path) -> Outcome:
    """Return the bytes of all tensors of the checkpoints, and the scalars of each tag."""
    run, found = folder / "lightning_logs" / "version_0", dict[str, bytes]()
    for path in run.glob("checkpoints/*"):
        leaves, _ = tree_flatten_with_path(torch.load(path, weights_only=True))
        found |= {f"{path.name}{keystr(k)}": leaf.numpy().tobytes() for k, leaf in leaves if isinstance(leaf, Tensor)}
    return {**found, **{tag: values for tag, values in scalars(run).items() if tag != "train/samples_per_second"}}


def trial(recipe: str, arguments: list[str], expected: Outcome, seconds: float, number: int) -> dict[str, Any]:
    moment, kills, resume = random.Random(f"{recipe} {number}"), 0, arguments
    with tempfile.TemporaryDirectory() as name:
        folder, killed = Path(name), True
        for _ in range(moment.randint(1, 4)):
            killed = killed and kill_somewhere(folder, resume, seconds, moment)
            if list(folder.glob("lightning_logs/version_0/checkpoints/last-*.ckpt")):
                resume = [*FIT, "--ckpt_path", "last", *arguments[-4:]] if "lit_mnist" in arguments else arguments
                kills += killed
            else:
                shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
        finish(folder, resume)
        ours = outcome(folder)
    different = sorted(key for key in expected.keys() | ours.keys() if expected.get(key) != ours.get(key))
    lengths = [len(value) for value in ours.values() if isinstance(value, list)]
    return {"kills": kills, "tensors": len(ours) - len(lengths), "scalars": sum(lengths), "different": different}


def main() -> int:
    parser = make_parser(__doc__, "kill")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)} (all)")
    parser.add_argument("--kills", type=int, default=60, help="at least so many with a checkpoint to resume (60)")
    options = parser.parse_args()
    datasets.prepare(options.root)
    torch.set_num_threads(1)  # as in the runs
    failed = 0
    for recipe in options.recipes:
        arguments = RECIPES[recipe] + ["--data.root", str(options.root)] * ("lit_mnist" in RECIPES[recipe])
        with tempfile.TemporaryDirectory() as name:
            seconds, expected = finish(Path(name), arguments), outcome(Path(name))
        done: list[dict[str, Any]] = []
        with ThreadPoolExecutor(2) as pool:
            while (kills := sum(one["kills"] for one in done)) * len(options.recipes) < options.kills:
                numbers = range(len(done), len(done) + 2)
                done += pool.map(partial(trial, recipe, arguments, expected, seconds), numbers)
        for one in done:
            append(options, {"recipe": recipe, **one})
        different = [one["different"] for one in done if one["different"]]
        failed += len(different)
        print(f"{recipe}: {len(done)} runs, {kills} kills, {len(different)} runs differ", *different, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
