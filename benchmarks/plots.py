"""Draw what results/ hold: test error against parameters, accuracy against seconds, losses on several processes.

    python benchmarks/plots.py        # writes docs/error-parameters.png, accuracy-seconds.png and processes-loss.png

Every single run is a dot, the mean of a recipe's runs a ring. A recipe's seconds are its epochs times those of an epoch
in results/speed.jsonl, where nothing else ran on the machine; the baseline's are its 20 epochs there. The baseline
stands at its author's accuracy, 99.44 % (0.56 % error).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
BASELINE = 99.44


def recipes() -> dict[str, dict[str, Any]]:
    """Parameters, epochs and every test accuracy of each recipe: of the studies `sweep --output results/seeds-NAME`,
    and before there were such of the runs in accuracy.jsonl with the settings of the newest.
    """
    records = [json.loads(line) for line in (RESULTS / "accuracy.jsonl").read_text().splitlines()]
    where = {"--trainer.accelerator", "cpu"}  # no setting of the recipe
    plain = [record for record in records if record["test"] and not set(record["flags"]) - where]
    newest = {record["recipe"]: record["settings"] for record in plain}
    found: dict[str, dict[str, Any]] = {}
    for record in plain:
        if newest[record["recipe"]] == record["settings"]:
            fit = {name: record["fit"][name] for name in ("parameters", "epochs")}
            found.setdefault(record["recipe"], {**fit, "accuracy": []})["accuracy"].append(
                record["test"]["test/accuracy"]
            )
    for path in sorted(RESULTS.glob("seeds-*/results.json")):
        study = json.loads(path.read_text())
        (row,) = study["settings_tried"]
        fit = {"parameters": row["parameters"], "epochs": row["epochs"]}
        accuracy = [trial["test/accuracy"] for trial in row["trials"]]
        found[study["study"].removeprefix("seeds-")] = {**fit, "accuracy": accuracy}
    return found


def speed(measure: str) -> dict[str, Any]:
    """The newest record of a measure of speed.py."""
    records = [json.loads(line) for line in (RESULTS / "speed.jsonl").read_text().splitlines()]
    return next(record for record in reversed(records) if record["measure"] == measure)


def scatter(axes: Any, name: str, x: float, y: list[float], colour: str) -> None:
    axes.scatter([x] * len(y), y, s=12, alpha=0.5, color=colour)
    label = f"{name}: {statistics.mean(y):.2f}, n = {len(y)}"
    axes.scatter(x, statistics.mean(y), s=120, facecolors="none", edgecolors=colour, linewidths=2, label=label)


def losses() -> None:
    """The losses of each step of one run on several processes, and how far they are from those of one."""
    records = [json.loads(line) for line in (RESULTS / "processes.jsonl").read_text().splitlines()]
    values = next(record["values"] for record in reversed(records) if record["measure"] == "agreement")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for number, (name, run) in enumerate(values.items()):
        precision, _, way = name.partition(", ")
        steps = range(1, len(run["losses"]) + 1)
        if precision == "64-true" and "apart" not in way and "thread" not in way:
            left.plot(steps, run["losses"], linewidth=4 - 1.5 * number, label=f"{way}, 64 bits")
        reference = values[f"{precision}, 1 process"]["losses"]
        apart = [abs(a - b) / b for a, b in zip(run["losses"], reference, strict=True)]
        if precision == "32-true" and any(apart):
            right.plot(steps, apart, linewidth=1, label=f"{way}, 32 bits")
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="step", ylabel="relative difference from one process", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, "processes-loss")


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.png", dpi=130, metadata={"Software": None})
    print(DOCS / f"{name}.png")


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    losses()
    runs = recipes()
    baseline = json.loads((RESULTS / "seed.json").read_text())["fit"]
    epoch_seconds = speed("epochs")["seconds"]
    target = speed("target")
    epochs = target.get("baseline") or target["yardstick"]  # as older records call it
    baseline_seconds = statistics.median(epoch["epoch_seconds"] for epoch in epochs)
    first, by_parameters = plt.subplots(figsize=(7, 4.5))
    second, by_seconds = plt.subplots(figsize=(7, 4.5))
    for number, (name, fit) in enumerate(sorted(runs.items())):
        accuracy = [100 * value for value in fit["accuracy"]]
        errors = [100 - value for value in accuracy]
        seconds = statistics.median(epoch_seconds[name]) * fit["epochs"]
        scatter(by_parameters, name, fit["parameters"], errors, f"C{number}")
        scatter(by_seconds, name, seconds, accuracy, f"C{number}")
    for axes, x, y in (
        (by_parameters, baseline["parameters"], 100 - BASELINE),
        (by_seconds, baseline["epochs"] * baseline_seconds, BASELINE),
    ):
        axes.scatter(x, y, marker="x", s=80, color="black", label=f"the baseline: {y:.2f}, n = 1")
        axes.axhline(y, color="black", linewidth=0.5, linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left" if axes is by_parameters else "best", fontsize=9)
    by_parameters.set(xlabel="parameters", ylabel="test error, %", xscale="log", ylim=(0, None))
    by_seconds.set(xlabel="seconds of training on two CPU cores", ylabel="test accuracy, %", xscale="log")
    by_parameters.set_xticks(ticks := [3_000, 6_000, 15_000, 30_000, 60_000], [f"{tick:,}" for tick in ticks])
    by_parameters.minorticks_off()
    for figure, name in ((first, "error-parameters"), (second, "accuracy-seconds")):
        save(figure, name)


if __name__ == "__main__":
    main()
