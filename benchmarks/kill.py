"""Kill the real program with SIGKILL at random moments, resume it, and compare with the run that was never killed.

    python benchmarks/kill.py            # 60 kills over three recipes and a foreign module (tests/foreign.py): minutes
    python benchmarks/kill.py --kills 3 smoke

Each trial starts `python -m lit_mnist fit` on real MNIST with a shortened recipe, kills it at a random (seeded) moment
of its training, or now and then of its start, resumes it with `--ckpt_path last`, kills it again up to three times, and
then lets it end. A kill counts where it left a checkpoint to resume; one before the first checkpoint means a start from
scratch, and has a column of its own. Every tensor of its last checkpoint (weights, averaged weights, optimizer,
random state, best score) and every scalar of its curve but the timings is compared with the uninterrupted run's. Prints
a table, and ends with status 1 where anything differed; with `--record` a line for each trial is appended
to results/kill.jsonl.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from records import add_flag, append
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.data import datasets
from lit_mnist.exact.conditions import conditions

REPOSITORY = Path(__file__).parent.parent
TIMINGS = {"train/samples_per_second"}
SHORT = ["--trainer.max_epochs", "3", "--trainer.limit_train_batches", "40", "--trainer.log_every_n_steps", "3"]
SHORT += ["--trainer.enable_model_summary", "false", "--data.val_size", "1000", "--checkpoint.every_seconds", "0.2"]
RECIPES = {
    "default": SHORT,
    "seed": ["--config", str(REPOSITORY / "configs" / "seed.yaml"), *SHORT],
    "smoke": ["--config", str(REPOSITORY / "configs" / "smoke.yaml"), *SHORT],
    "foreign": [],  # lit_mnist/exact in another project, under another name
}
# one thread a process: two trials run side by side, and sums come out in one order
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(folder: Path, flags: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_mnist", "fit", *flags]
    if not flags:
        if not (folder / "machinery").exists():
            shutil.copytree(REPOSITORY / "lit_mnist" / "training", folder / "machinery")
            shutil.copy(REPOSITORY / "tests" / "foreign.py", folder)
        command = [sys.executable, "-c", "from foreign import fit; fit('lightning_logs')"]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"fit ended with status {process.returncode}:\n{out}")


def event_files(folder: Path) -> set[Path]:
    return set(folder.glob("lightning_logs/version_0/events.out.*"))


def kill_somewhere(process: subprocess.Popen[str], folder: Path, seconds: float, moment: random.Random) -> bool:
    """Kill the process; False where it ended before.

    The clock runs from the moment when this process opened its own file of events: the imports before it are seconds
    in which nothing can be lost. One kill in eight comes somewhere in the start all the same.
    """
    before = event_files(folder)
    started = monotonic()
    in_start = moment.random() < 1 / 8
    delay = moment.uniform(2, 8) if in_start else moment.uniform(0, seconds)
    while not in_start and not event_files(folder) - before and process.poll() is None:
        sleep(0.005)
    opened = started if in_start else monotonic()
    while monotonic() - opened < delay and process.poll() is None:
        sleep(0.002)
    if process.poll() is not None:
        return False
    process.kill()
    process.communicate()
    return True


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: tensor for part, inner in items for key, tensor in tensors(inner, f"{name}/{part}").items()}


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[tuple[int, float]]], list[str]]:
    """All tensors of the last checkpoint and of the best, the curve, and the names of the checkpoints."""
    run = folder / "lightning_logs" / "version_0"
    paths = sorted((run / "checkpoints").iterdir())
    all_tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        all_tensors |= tensors(torch.load(path, weights_only=True), path.name)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curve = {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in set(events.Tags()["scalars"]) - TIMINGS
    }
    return all_tensors, curve, [path.name for path in paths]


def trial(recipe: str, number: int, flags: list[str], expected: Any, seconds: float) -> dict[str, Any]:
    moment = random.Random(f"{recipe} {number}")
    kills = start_kills = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        next_flags = flags
        for _ in range(moment.randint(1, 4)):
            killed = kill_somewhere(start(folder, next_flags), folder, seconds, moment)
            if list(folder.glob("lightning_logs/version_0/checkpoints/last-*.ckpt")):
                next_flags = ["--ckpt_path", "last", *flags[-2:]] if flags else []  # the data's folder
                kills += killed
            else:
                # killed before there was anything to resume: a newcomer would start again
                start_kills += killed
                shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
            if not killed:
                break
        finish(start(folder, next_flags))
        ours, curve, names = outcome(folder)
    expected_tensors, expected_curve, expected_names = expected
    different = [key for key in expected_tensors.keys() | ours.keys() if not same(expected_tensors, ours, key)]
    different += [tag for tag in expected_curve.keys() | curve.keys() if expected_curve.get(tag) != curve.get(tag)]
    different += sorted(set(names) ^ set(expected_names))
    scalars = sum(map(len, curve.values()))
    return {
        "kills": kills,
        "start_kills": start_kills,
        "tensors": len(ours),
        "scalars": scalars,
        "different": sorted(different),
    }


def same(expected: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], key: str) -> bool:
    return key in expected and key in ours and torch.equal(expected[key], ours[key])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)} (all)")
    parser.add_argument("--kills", type=int, default=60, help="at least so many, over all recipes (60)")
    parser.add_argument("--root", default=str(REPOSITORY / "data"), help="folder of the data")
    add_flag(parser, "kill")
    settings = parser.parse_args()
    if unknown := set(settings.recipes) - set(RECIPES):
        parser.error(f"unknown recipes {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    datasets.prepare(settings.root)
    share = -(-settings.kills // len(settings.recipes))

    where = conditions(torch.device("cpu"))
    where["hardware"]["threads"] = int(ENVIRONMENT["OMP_NUM_THREADS"])
    table, failed = [], False
    with Progress() as progress, ThreadPoolExecutor(2) as pool:
        for recipe in settings.recipes:
            flags = RECIPES[recipe]
            if flags:
                flags = [*flags, "--trainer.accelerator", "cpu", "--data.root", str(Path(settings.root).resolve())]
            with tempfile.TemporaryDirectory() as name:
                process = start(Path(name), flags)
                while not event_files(Path(name)) and process.poll() is None:
                    sleep(0.005)
                opened = monotonic()
                finish(process)
                seconds = monotonic() - opened
                expected = outcome(Path(name))
            task = progress.add_task(recipe, total=share)
            trials: list[dict[str, Any]] = []
            number = 0
            while sum(result["kills"] for result in trials) < share:
                pair = [pool.submit(trial, recipe, number + side, flags, expected, seconds) for side in range(2)]
                number += 2
                for result in (future.result() for future in pair):
                    trials.append(result)
                    append(settings, {"recipe": recipe, **result}, where)
                    for name in result["different"]:
                        progress.console.print(f"{recipe}: {name} differs", markup=False)
                progress.update(task, completed=min(share, sum(result["kills"] for result in trials)))
            different = sum(bool(result["different"]) for result in trials)
            failed |= different > 0
            kills, start_kills = (sum(result[key] for result in trials) for key in ("kills", "start_kills"))
            table.append(
                (recipe, len(trials), kills, start_kills, trials[0]["tensors"], trials[0]["scalars"], different)
            )
    print(
        "\n| recipe | runs | kills | kills before the first checkpoint | tensors compared a run |"
        " scalars compared a run | runs that differ |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in table:
        print("| " + " | ".join(map(str, row)) + " |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
