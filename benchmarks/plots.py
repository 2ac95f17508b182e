"""Draw what results/accuracy.jsonl holds: test error against parameters, and accuracy against seconds of training.

    python benchmarks/plots.py        # writes docs/error-parameters.png and docs/accuracy-seconds.png

Every single run is a dot, the mean of a recipe's runs a ring. The yardstick stands at its author's figure, 99.44 %
(0.56 % error) with 16k parameters, and at the seconds of results/seed.json, its recipe on this project's machine.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
YARDSTICK = 99.44


def recipes() -> dict[str, list[dict[str, Any]]]:
    """The tested runs of each recipe without further flags: those with the settings of the newest."""
    records = [json.loads(line) for line in (RESULTS / "accuracy.jsonl").read_text().splitlines()]
    plain = [record for record in records if record["test"] and not record["flags"]]
    newest = {record["recipe"]: record["settings"] for record in plain}
    return {
        name: [record for record in plain if record["recipe"] == name and record["settings"] == settings]
        for name, settings in newest.items()
    }


def scatter(axes: Any, name: str, x: list[float], y: list[float], colour: str) -> None:
    axes.scatter(x, y, s=12, alpha=0.5, color=colour)
    mean = statistics.mean(x), statistics.mean(y)
    axes.scatter(*mean, s=120, facecolors="none", edgecolors=colour, linewidths=2)
    axes.annotate(f"{name}, n = {len(y)}", mean, textcoords="offset points", xytext=(9, 7), color=colour)


def main() -> None:
    runs = recipes()
    yardstick = json.loads((RESULTS / "seed.json").read_text())["fit"]
    first, by_parameters = plt.subplots(figsize=(7, 4.5))
    second, by_seconds = plt.subplots(figsize=(7, 4.5))
    for number, (name, records) in enumerate(sorted(runs.items())):
        accuracy = [100 * record["test"]["test/accuracy"] for record in records]
        errors = [100 - value for value in accuracy]
        scatter(by_parameters, name, [r["fit"]["parameters"] for r in records], errors, f"C{number}")
        scatter(by_seconds, name, [r["fit"]["train_seconds"] for r in records], accuracy, f"C{number}")
    for axes, x, y in (
        (by_parameters, yardstick["parameters"], 100 - YARDSTICK),
        (by_seconds, yardstick["train_seconds"], YARDSTICK),
    ):
        axes.scatter(x, y, marker="x", s=80, color="black")
        axes.annotate("the yardstick", (x, y), textcoords="offset points", xytext=(-10, 9), ha="right")
        axes.axhline(y, color="black", linewidth=0.5, linestyle=":")
        axes.grid(alpha=0.3)
    by_parameters.set(xlabel="parameters", ylabel="test error, %", xlim=(0, 17_500), ylim=(0, None))
    by_seconds.set(xlabel="seconds of training on a CPU", ylabel="test accuracy, %", xscale="log")
    for figure, name in ((first, "error-parameters"), (second, "accuracy-seconds")):
        figure.tight_layout()
        figure.savefig(DOCS / f"{name}.png", dpi=130, metadata={"Software": None})
        print(DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
