"""Kill the real program with SIGKILL at random moments, resume it, and compare with the run that was never killed.

    python benchmarks/kill.py            # 60 kills over four recipes and a foreign project (tests/foreign.py): minutes
    python benchmarks/kill.py --kills 3 smoke

Each trial trains a shortened recipe on real MNIST, is killed at a random (seeded) moment of its training, or now and
then of its start, resumed with `--ckpt_path last`, killed again up to three times, and then left to end; of two
processes one is killed, and the other has to end by itself. A kill counts where it left a checkpoint to resume; else
the run starts from scratch. Every tensor of the checkpoints and every scalar of the curve but the timings is compared
with the uninterrupted run's. Prints a table; the exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from records import add_flag, append
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.data import datasets
from lit_mnist.exact.conditions import conditions

REPOSITORY = Path(__file__).resolve().parent.parent
SHORT = ["--trainer.max_epochs", "3", "--trainer.limit_train_batches", "40", "--trainer.log_every_n_steps", "3"]
SHORT += ["--trainer.enable_model_summary", "false", "--data.val_size", "1000", "--checkpoint.every_seconds", "0.2"]
SHORT += ["--trainer.accelerator", "cpu"]
RECIPES: dict[str, list[str]] = {
    "default": [*SHORT, "--trainer.devices", "1"],
    "seed": ["--config", str(REPOSITORY / "configs" / "seed.yaml"), *SHORT, "--trainer.devices", "1"],
    "smoke": ["--config", str(REPOSITORY / "configs" / "smoke.yaml"), *SHORT, "--trainer.devices", "1"],
    "processes": [*SHORT, "--trainer.devices", "2"],
    "foreign": [],  # lit_mnist/exact in another project, under another name
}
# one thread a process: sums come out in one order
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
Outcome = tuple[dict[str, torch.Tensor], dict[str, list[tuple[int, float]]], list[str]]


def start(folder: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lit_mnist", "fit", *flags]
    if not flags:
        shutil.copytree(REPOSITORY / "lit_mnist" / "exact", folder / "machinery", dirs_exist_ok=True)
        shutil.copy(REPOSITORY / "tests" / "foreign.py", folder)
        command = [sys.executable, "-c", "from foreign import fit; fit('lightning_logs')"]
    with (folder / "output").open("ab") as file:
        return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)


def wait(folder: Path, process: subprocess.Popen[bytes]) -> float:
    """Wait until a run opens an event file or ends, and return that moment: nothing can be lost before."""
    before = event_files(folder)
    while event_files(folder) == before and process.poll() is None:
        sleep(0.005)
    return monotonic()


def finish(folder: Path, flags: list[str]) -> float:
    """Let a run end, and return the seconds that it trained."""
    process = start(folder, flags)
    opened = wait(folder, process)
    if process.wait():
        raise RuntimeError(f"fit ended with status {process.returncode}:\n{(folder / 'output').read_text()[-2000:]}")
    return monotonic() - opened


def event_files(folder: Path) -> set[Path]:
    return set(folder.glob("lightning_logs/version_0/events.out.*"))


def kill_somewhere(folder: Path, flags: list[str], seconds: float, moment: random.Random) -> bool:
    """Start a run and kill a process of it, one time in eight in its start; False where it ended before."""
    process, in_start = start(folder, flags), moment.random() < 1 / 8
    end = monotonic() + moment.uniform(2, 8) if in_start else wait(folder, process) + moment.uniform(0, seconds)
    while monotonic() < end and process.poll() is None:
        sleep(0.002)
    if process.poll() is not None:
        return False
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(moment.choice([process.pid, *map(int, children)]), signal.SIGKILL)
    process.wait()
    for _ in range(1200):  # the other process has to notice
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        sleep(0.1)
    raise RuntimeError("a process waits for one that was killed")


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: tensor for part, inner in items for key, tensor in tensors(inner, f"{name}/{part}").items()}


def outcome(folder: Path) -> Outcome:
    """Return all tensors of the checkpoints, the curve, and the names of the checkpoints."""
    run = folder / "lightning_logs" / "version_0"
    names = sorted(path.name for path in run.glob("checkpoints/*"))
    found = {name: torch.load(run / "checkpoints" / name, weights_only=True) for name in names}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"train/samples_per_second"}
    return tensors(found), {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in tags}, names


def trial(recipe: str, number: int, flags: list[str], expected: Outcome, seconds: float) -> dict[str, Any]:
    moment, kills, next_flags = random.Random(f"{recipe} {number}"), 0, flags
    with tempfile.TemporaryDirectory() as name:
        folder, killed = Path(name), True
        for _ in range(moment.randint(1, 4)):
            killed = killed and kill_somewhere(folder, next_flags, seconds, moment)
            if list(folder.glob("lightning_logs/version_0/checkpoints/last-*.ckpt")):
                next_flags = ["--ckpt_path", "last", *flags[-4:]] if flags else []  # where the data and the devices are
                kills += killed
            else:
                shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
        finish(folder, next_flags)
        ours, curve, names = outcome(folder)
    different = [key for key in expected[0].keys() | ours.keys() if not same(expected[0].get(key), ours.get(key))]
    different += [tag for tag in expected[1].keys() | curve.keys() if expected[1].get(tag) != curve.get(tag)]
    different += set(names) ^ set(expected[2])
    scalars = sum(map(len, curve.values()))
    return {"kills": kills, "tensors": len(ours), "scalars": scalars, "different": sorted(different)}


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)} (all)")
    parser.add_argument("--kills", type=int, default=60, help="at least so many, over all recipes (60)")
    parser.add_argument("--root", type=Path, default=REPOSITORY / "data", help="folder of the data")
    add_flag(parser, "kill")
    options = parser.parse_args()
    datasets.prepare(options.root)
    torch.set_num_threads(1)  # as in the runs
    where, failed = conditions(torch.device("cpu")), False
    print("| recipe | runs | kills | tensors compared a run | scalars compared a run | runs that differ |")
    print("| --- | --- | --- | --- | --- | --- |")
    for recipe in options.recipes:
        flags = RECIPES[recipe] and [*RECIPES[recipe], "--data.root", str(options.root.resolve())]
        with tempfile.TemporaryDirectory() as name:
            seconds = finish(Path(name), flags)
            expected = outcome(Path(name))
        trials: list[dict[str, Any]] = []
        with ThreadPoolExecutor(2) as pool:
            while sum(result["kills"] for result in trials) * len(options.recipes) < options.kills:
                numbers = range(len(trials), len(trials) + 2)
                for result in pool.map(lambda number: trial(recipe, number, flags, expected, seconds), numbers):  # noqa: B023
                    trials.append(result)
                    append(options, {"recipe": recipe, **result}, where)
        different = sum(bool(result["different"]) for result in trials)
        failed |= different > 0
        kills, compared = sum(result["kills"] for result in trials), f"{trials[0]['tensors']} | {trials[0]['scalars']}"
        print(f"| {recipe} | {len(trials)} | {kills} | {compared} | {different} |", flush=True)
        for name in {name for result in trials for name in result["different"]}:
            print(f"{recipe}: {name} differs", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
