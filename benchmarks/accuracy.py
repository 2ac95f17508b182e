"""Accuracy of a recipe over seeds, every value behind the mean.

    python benchmarks/accuracy.py                                  # what `fit` does without a configuration
    python benchmarks/accuracy.py --config configs/seed.yaml -n 3
    python benchmarks/accuracy.py --test                           # once the recipe is settled

Trains with `python -m lit_mnist fit` for the seeds 1..n, and scores the validation images that it held out; with
`--test` also the test set, by the best checkpoint, or the last where nothing is held out. What is not known here are
flags for `fit`. Each run is appended to results/accuracy.jsonl as it ends, with its conditions; a benchmark that was
interrupted resumes after the runs that are there, which it knows by all their settings.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from lit_mnist.commands.main import main as lit_mnist
from lit_mnist.commands.settings import TRAINER_SETTINGS

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
DECIDING = TRAINER_SETTINGS - {"sync_batchnorm"}  # which is nothing to one process
MOVED = ("rotation", "shift", "scale")  # which were the model's when the first records were made
LATER = {"network": "digitnet", "name": "mnist"}.items()  # what older records, without these settings, mean


def settings_of(flags: list[str]) -> str:
    """A digest of what decides the result of `fit` with these flags, defaults included: model, data, length.

    Not the seed, and nothing of where files lie or of what is shown.
    """
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = lit_mnist(["fit", *flags, "--print_config"])
    if status:
        raise SystemExit(status)
    config = yaml.safe_load(printed.getvalue())
    deciding = {
        "model": dict(config["model"].items() - LATER) | {name: config["data"][name] for name in MOVED},
        "data": {name: config["data"][name] for name in ("batch_size", "val_size", "split_seed", "name")},
        "trainer": {name: config["trainer"][name] for name in sorted(DECIDING & config["trainer"].keys())},
    }
    deciding["data"] = dict(deciding["data"].items() - LATER)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]


def run(flags: list[str], seed: int, test: bool, root: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--seed_everything", str(seed), "--trainer.default_root_dir", folder, "--data.root", root]
        if status := lit_mnist(["fit", *flags, "--trainer.enable_model_summary", "false"]):
            raise SystemExit(status)
        results = Path(folder, "lightning_logs", "version_0", "results.json")
        fit = json.loads(results.read_text())["fit"]
        if test:
            kept = "best" if fit["best"] else "last"
            if status := lit_mnist(["test", "--ckpt_path", kept, *flags[-4:]]):
                raise SystemExit(status)
        fit.pop("commands")  # the folders in them are no condition of the figure
        return {"fit": fit, "test": json.loads(results.read_text()).get("test")}


def summary(name: str, values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    numbers = (statistics.mean(values), deviation, min(values), max(values))
    return f"{name:<24}" + "".join(f"{format(number, form):>10}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", type=int, default=10, help="how many seeds (10)")
    parser.add_argument("--config", help="the recipe; without one, what fit does by itself")
    parser.add_argument("--test", action="store_true", help="score the test set as well")
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    options, extra = parser.parse_known_args()
    recipe = Path(options.config).stem if options.config else "default"
    flags = [*(["--config", options.config] if options.config else []), *extra]
    settings = settings_of(flags)

    RESULTS.parent.mkdir(exist_ok=True)
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    mine = {record["seed"]: record for record in records if record["settings"] == settings}
    for seed in range(1, options.n + 1):
        if seed in mine and (mine[seed]["test"] or not options.test):
            continue
        print(f"\n{recipe}, seed {seed} of {options.n}", flush=True)
        result = run(flags, seed, options.test, options.root)
        mine[seed] = {"recipe": recipe, "flags": extra, "settings": settings, "seed": seed, **result}
        with RESULTS.open("a") as file:
            file.write(json.dumps(mine[seed]) + "\n")

    runs = [mine[seed] for seed in range(1, options.n + 1)]
    print(
        f"\n{recipe}: {runs[0]['fit']['parameters']:,} parameters, {runs[0]['fit']['epochs']} epochs, n = {len(runs)}"
    )
    print(f"{'':<24}{'mean':>10}{'std':>10}{'lowest':>10}{'highest':>10}")
    columns = {
        "validation accuracy %": [100 * r["fit"]["best"]["val/accuracy"] for r in runs if r["fit"]["best"]],
        "test accuracy %": [100 * r["test"]["test/accuracy"] for r in runs if r["test"]],
        "test loss": [r["test"]["test/loss"] for r in runs if r["test"]],
        "training seconds": [r["fit"]["train_seconds"] for r in runs],
    }
    for name, values in columns.items():
        if values:
            print(summary(name, values, ".4f" if "loss" in name else ".2f" if "%" in name else ".1f"))
    for name in ("validation accuracy %", "test accuracy %"):
        if columns[name]:
            print(f"every {name}: {' '.join(f'{value:.2f}' for value in columns[name])}")


if __name__ == "__main__":
    main()
