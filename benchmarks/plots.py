"""Draw docs/error-parameters.png, accuracy-seconds.png and processes-loss.png from what results/ holds.

A dot is a run, a ring a recipe's mean. Seconds are a run's epochs times those of an epoch in results/speed.jsonl, where
nothing else ran on the machine. The baseline, of 20 epochs, stands at its author's accuracy, 99.44 %.
"""

import json
import statistics
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from records import REPOSITORY, RESULTS

BASELINE = 99.44


def newest(name: str, measure: str) -> dict[str, Any]:
    """Read the newest record of a measure in a file of results/."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return {record["measure"]: record for record in map(json.loads, lines)}[measure]


def plot_recipes() -> None:
    """Plot every test accuracy in the studies results/seeds-NAME against parameters, and against seconds."""
    epoch_seconds, target = newest("speed", "epochs")["seconds"], newest("speed", "target")
    seed = json.loads((RESULTS / "seed.json").read_text())["fit"]
    baseline = seed["epochs"] * statistics.median(row["baseline"]["epoch_seconds"] for row in target["rounds"])
    fast = statistics.median(row["ours"]["train_seconds"] for row in target["rounds"])  # its epochs differ
    (first, by_parameters), (second, by_seconds) = (plt.subplots(figsize=(7, 4.5)) for _ in range(2))
    for number, path in enumerate(sorted(RESULTS.glob("seeds-*/results.json"))):
        name, (row,) = path.parent.name.removeprefix("seeds-"), json.loads(path.read_text())["settings_tried"]
        accuracy = np.array([100 * trial["test/accuracy"] for trial in row["trials"]])
        seconds = fast if name == "fast" else statistics.median(epoch_seconds[name]) * row["epochs"]
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": f"C{number}", "linewidths": 2}
        for axes, x, y in ((by_parameters, row["parameters"], 100 - accuracy), (by_seconds, seconds, accuracy)):
            axes.scatter([x] * len(y), y, s=12, alpha=0.5, color=f"C{number}")
            axes.scatter(x, statistics.mean(y), 120, label=f"{name}: {statistics.mean(y):.2f}, n = {len(y)}", **ring)
    for axes, place, level in ((by_parameters, seed["parameters"], 100 - BASELINE), (by_seconds, baseline, BASELINE)):
        axes.scatter(place, level, marker="x", s=80, color="black", label=f"the baseline: {level:.2f}, n = 1")
        axes.axhline(level, color="black", linewidth=0.5, linestyle=":")
    by_parameters.set(xlabel="parameters", ylabel="test error, %", xscale="log", ylim=(0, None))
    by_parameters.set_xticks(ticks := [3_000, 6_000, 15_000, 30_000, 60_000], [f"{tick:,}" for tick in ticks])
    by_parameters.minorticks_off()
    by_seconds.set(xlabel="seconds of training on two CPU cores", ylabel="test accuracy, %", xscale="log")
    save(first, "error-parameters", loc="lower left")
    save(second, "accuracy-seconds")


def plot_processes() -> None:
    """Plot the losses of each step of one run on several processes, and how far they are from those of one."""
    values = newest("processes", "agreement")["values"]
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
    save(figure, "processes-loss", fontsize=8)


def save(figure: Any, name: str, **legend: Any) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(**{"fontsize": 9} | legend)
    figure.tight_layout()
    figure.savefig(REPOSITORY / "docs" / f"{name}.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    plot_recipes()
    plot_processes()
