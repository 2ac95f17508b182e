"""What a study came to: a table, the difference of the best two with its confidence interval, and two plots."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import ttest_rel

from lit_mnist.exact.conditions import conditions
from lit_mnist.exact.console import interactive, print_table, shown
from lit_mnist.exact.runs import replaced
from lit_mnist.sweep.study import Study, as_flag


@dataclass
class Setting:
    """A setting and its trials.

    Args:
        sample: its number in the study.
        values: what was compared, by seed, of the trials that came to their end, in the order of the seeds.
        seconds: of their training, by seed.
        runs: where they lie, and those of other trials.
        reason: why it was given up; empty where it was not.
        test: metrics on the test set, by seed.
    """

    sample: int
    params: dict[str, Any]
    values: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    parameters: int = 0
    epochs: int = 0
    reason: str = ""
    test: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())


def table(plan: Study, trials: Sequence[FrozenTrial], tested: Mapping[str, Any]) -> list[Setting]:
    """The settings of a study, the best first, those with fewer seeds next, and those given up last.

    Args:
        trials: that count.
        tested: metrics on the test set by `test SAMPLE SEED`.
    """
    found: dict[int, Setting] = {}
    for trial in sorted(trials, key=lambda trial: plan.all_seeds.index(trial.user_attrs["seed"])):
        sample, seed, attributes = trial.user_attrs["sample"], trial.user_attrs["seed"], trial.user_attrs
        if set(plan.varied) - trial.params.keys():
            continue  # it is being drawn
        setting = found.setdefault(sample, Setting(sample, trial.params))
        if trial.state == TrialState.COMPLETE:
            assert trial.value is not None
            setting.values[seed] = trial.value
            setting.seconds[seed] = attributes["seconds"]
            setting.parameters, setting.epochs = attributes["parameters"], attributes.get("epochs", 0)
            if f"test {sample} {seed}" in tested:
                setting.test[seed] = tested[f"test {sample} {seed}"]
        if "run" in attributes:
            names = ("run", "id", "host", "checkpoint", "hardware", "commit")
            setting.runs[seed] = {name: attributes[name] for name in names if name in attributes}
        setting.reason = setting.reason or attributes.get("reason", "")

    def order(setting: Setting) -> tuple[bool, int, float, int]:
        value = -plan.sign * setting.mean if setting.n else math.inf
        return bool(setting.reason), -setting.n, value, setting.sample

    return sorted(found.values(), key=order)


def ranked(table: Sequence[Setting]) -> list[Setting]:
    """Those of a table that can be compared: some trial of theirs came to its end, and none was given up."""
    return [setting for setting in table if setting.n and not setting.reason]


def named(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {shortest(value)}" for name, value in setting.items()) or "the recipe"


def shortest(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_flag(value)


def scale(plan: Study) -> tuple[float, str, str]:
    """Factor, digits and unit in which a study's values are told."""
    return (100.0, ".2f", " %") if plan.compare.endswith("accuracy") else (1.0, ".4f", "")


def shown_value(plan: Study, value: float, unit: bool = True) -> str:
    factor, digits, name = scale(plan)
    return f"{factor * value:{digits}}{name if unit else ''}"


def spread(values: Iterable[float]) -> float | None:
    """The standard deviation; None of a single value, which tells nothing of it."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def difference(plan: Study, first: Setting, second: Setting) -> dict[str, Any]:
    """How far apart two settings are over the seeds that both have: the mean of the paired differences, positive where
    the first is better, and its 95 % confidence interval by Student's distribution; None where they tell of none.
    """
    seeds = [seed for seed in first.values if seed in second.values]
    ours, theirs = ([plan.sign * setting.values[seed] for seed in seeds] for setting in (first, second))
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    found: dict[str, Any] = {
        "seeds": seeds,
        "mean": statistics.mean(apart) if seeds else None,
        "low": None,
        "high": None,
    }
    if len(seeds) > 1 and statistics.stdev(apart) > 1e-9:  # else chance, or rounding, made them alike
        interval = ttest_rel(ours, theirs).confidence_interval(0.95)
        found |= {"low": float(interval.low), "high": float(interval.high)}
    return found


def in_words(plan: Study, table: Sequence[Setting]) -> list[str]:
    """What the best two settings of a study tell."""
    whole = ranked(table)
    if not whole:
        return ["No setting came to an end."]
    best = whole[0]
    lines = [f"Best: {named(best.params)}"]
    if len(whole) == 1:
        return lines if len(table) > 1 else []
    found = difference(plan, best, whole[1])
    n, sign = len(found["seeds"]), plan.sign
    second = f"the second, {named(whole[1].params)}"
    factor, digits, unit = scale(plan)
    unit = unit and " points"  # of a percentage
    if not n:
        return [*lines, f"{second[:1].upper()}{second[1:]}, has no seed in common with it yet."]
    if found["low"] is None:
        mean = f"{factor * sign * found['mean']:+{digits}}"
        each = "one seed" if n == 1 else f"each of {n} seeds"
        return [*lines, f"Against {second}: {mean}{unit} with {each}, which tells nothing of the spread."]
    mean, low, high = (f"{factor * sign * found[name]:+{digits}}" for name in ("mean", "low", "high"))
    low, high = (low, high) if sign > 0 else (high, low)
    interval = f"{mean}{unit} (95 % confidence interval {low} to {high}, paired over {n} common seeds)"
    if found["low"] > 0:
        lines.append(f"It is better than {second}: {interval}.")
    else:
        lines.append(f"Against {second}: {interval}; no difference can be seen with {n} seeds.")
    if len(whole) > 2:
        lines.append(f"It was chosen among {len(whole)} settings by these values, so they flatter it a little.")
    return lines


def as_row(plan: Study, setting: Setting) -> dict[str, Any]:
    """A line of the table, in full precision; None where there is nothing."""
    values = list(setting.values.values())
    best = max(values, key=lambda value: plan.sign * value, default=None)
    row: dict[str, Any] = {**plan.fixed, **setting.params, "n": setting.n}
    row |= {"mean": setting.mean if values else None, "std": spread(values) if values else None, "best": best}
    row |= {"worst": min(values, key=lambda value: plan.sign * value, default=None)}
    row |= {"seconds": round(statistics.mean(setting.seconds.values()), 3) if values else None}
    row |= {
        "parameters": setting.parameters or None,
        "epochs": setting.epochs or None,
        "given_up": setting.reason or None,
    }
    for name in next(iter(setting.test.values()), {}):
        tested = [metrics[name] for metrics in setting.test.values()]
        row |= {name: statistics.mean(tested), f"{name} std": spread(tested), f"{name} n": len(tested)}
    return row


def print_settings(plan: Study, table: Sequence[Setting]) -> None:
    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in plan.varied:
        columns.add_column(name.replace(".", ".\n"), overflow="fold")
    for name in ("n", "mean ± std", "best", "worst", "seconds", "parameters"):
        columns.add_column(name, justify="right")
    if any(setting.reason for setting in table):
        columns.add_column("given up")
    for setting in table:
        row = as_row(plan, setting)
        numbers = ["-"] * 5
        if setting.n:
            mean, best, worst = (shown_value(plan, row[name], False) for name in ("mean", "best", "worst"))
            std = f" ± {shown_value(plan, row['std'], False)}" if setting.n > 1 else ""
            numbers = [f"{mean}{std}", best, worst, f"{row['seconds']:.1f}", f"{setting.parameters:,}"]
        settings = [shortest(setting.params[name]) for name in plan.varied]
        columns.add_row(*settings, str(setting.n), *numbers, *([setting.reason] if setting.reason else []))
    print_table(columns)


def report(plan: Study, table: list[Setting], described: dict[str, Any], folder: Path, settled: bool) -> None:
    """Print what a study came to, and write it to a folder as CSV, JSON and PNG.

    Args:
        described: the name of the study, and all that decides its result.
    """
    counted = sum(setting.n for setting in table)
    of = f"of the {'best checkpoint' if plan.of == 'best' and plan.compare.startswith('val/') else 'last epoch'}"
    unit, so_far = scale(plan)[2] and ", %", "" if settled else " so far"
    print(f"\n{described['study']}: {plan.compare}{unit} {of}, {counted} trials{so_far}\n")
    print_settings(plan, table)
    words = in_words(plan, table)
    if table and table[0].test:
        tested = table[0].test.values()
        for metric in sorted(next(iter(tested))):
            values = [metrics[metric] for metrics in tested]
            factor, digits = (100, ".2f") if metric.endswith("accuracy") else (1, ".4f")
            mean, std, low, high = (
                f"{factor * x:{digits}}"
                for x in (statistics.mean(values), spread(values) or 0, min(values), max(values))
            )
            several = f" ± {std} ({low} to {high})" if len(values) > 1 else ""
            words.append(f"Test set, {metric}: {mean}{several}, n = {len(values)}")
    print("\n" + "\n".join(words))
    rows = [as_row(plan, setting) for setting in table]
    whole = ranked(table)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "settings.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    results = {
        **described,
        "settled": settled,
        "settings_tried": [row | {"trials": trials_of(setting)} for row, setting in zip(rows, table, strict=True)],
        "difference": difference(plan, *whole[:2]) if len(whole) > 1 else None,
        "in_words": words,
        "versions": conditions(torch.device("cpu"))["versions"],
    }
    with replaced(folder / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")
    names = ["settings.csv", "results.json"]
    for title, figure in (("settings.png", by_setting(plan, whole)), ("seconds.png", by_seconds(plan, whole))):
        if figure:
            with replaced(folder / title) as partial:
                figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
            names.append(title)
    print(f"Written: {', '.join(names)} in {shown(folder)}")


def trials_of(setting: Setting) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "value": value, "seconds": setting.seconds[seed]}
        | setting.runs.get(seed, {})
        | setting.test.get(seed, {})
        for seed, value in setting.values.items()
    ]


def by_setting(plan: Study, table: Sequence[Setting]) -> Figure | None:
    """A panel for each setting: every trial a dot, the mean of each of its values a ring."""
    if not table or not plan.varied:
        return None
    factor, _, unit = scale(plan)
    columns = min(3, len(plan.varied))
    rows = math.ceil(len(plan.varied) / columns)
    figure = Figure(figsize=(1 + 4 * columns, 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for name, axes in zip(plan.varied, panels, strict=False):
        numbers = all(type(setting.params[name]) in (int, float) for setting in table)
        places = sorted({setting.params[name] for setting in table}, key=None if numbers else repr)
        for place in places:
            here = [setting for setting in table if setting.params[name] == place]
            x = place if numbers else places.index(place)
            values = [factor * value for setting in here for value in setting.values.values()]
            axes.scatter([x] * len(values), values, s=10, alpha=0.5, color="C0")
            axes.scatter(x, statistics.mean(values), s=70, facecolors="none", edgecolors="C1", linewidths=1.5)
        if not numbers:
            axes.set_xticks(range(len(places)), [shortest(place) for place in places], rotation=20, ha="right")
        elif min(places) > 0 and max(places) > 20 * min(places):
            axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_visible(False)
    figure.supylabel(f"{plan.compare}{unit and ', %'}")
    return figure


def by_seconds(plan: Study, table: Sequence[Setting]) -> Figure | None:
    """Each setting's mean against its seconds, and through those that none beats in both the Pareto front."""
    if not table:
        return None
    factor, _, unit = scale(plan)
    points = sorted((statistics.mean(setting.seconds.values()), -plan.sign * setting.mean) for setting in table)
    front = [point for number, point in enumerate(points) if all(point[1] < before[1] for before in points[:number])]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for setting in table:
        middle, seconds = factor * setting.mean, statistics.mean(setting.seconds.values())
        deviations = [factor * (spread(setting.values.values()) or 0)], [spread(setting.seconds.values()) or 0]
        axes.errorbar(seconds, middle, *deviations, fmt="o", color="C0", alpha=0.6, elinewidth=0.8)
        if len(table) <= 12:
            axes.annotate(named(setting.params), (seconds, middle), (4, 4), textcoords="offset points", fontsize=6)
    x, y = zip(*front, strict=True)
    axes.step(x, [-plan.sign * factor * value for value in y], where="post", color="C1", label="Pareto front")
    axes.set(xlabel="seconds of training", ylabel=f"{plan.compare}{unit and ', %'}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


class Display:
    """How far a study is: a line for each trial that ended, and on a terminal a bar.

    Args:
        total: how many trials it has.
        log: file that takes what the trials themselves print.
    """

    def __init__(self, plan: Study, total: int, log: Path) -> None:
        self.plan = plan
        self.total = total
        self.path = log
        self.started = monotonic()
        self.told: set[int] | None = None  # numbers of trials
        self.before = 0  # trials that had ended before this process began

    def __enter__(self) -> Display:
        self.log = self.path.open("a", buffering=1)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
        console = Console(highlight=False, markup=False, width=None if interactive() else 1000)
        self.bar = Progress(*columns, console=console, disable=not interactive(), redirect_stdout=False)
        self.task = self.bar.add_task("trials", total=self.total)
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()
        self.log.close()

    def say(self, line: str) -> None:
        self.bar.console.print(line, soft_wrap=True)

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Tell of those that ended since."""
        ended = [trial for trial in trials if trial.state.is_finished()]
        whole = table(self.plan, trials, {})
        skipped = sum(len(self.plan.all_seeds) for setting in whole if setting.reason)
        done = sum(setting.n for setting in whole if not setting.reason) + skipped
        if self.told is None:
            self.told, self.before = {trial.number for trial in ended}, done
            if done:
                self.say(f"{done} of {self.total} trials are there already")
        for trial in ended:
            if trial.number in self.told:
                continue
            self.told.add(trial.number)
            what = f"{named(trial.params)}, seed {trial.user_attrs['seed']}"
            if trial.state != TrialState.COMPLETE:
                result = f"given up ({trial.user_attrs.get('reason')})"
            else:
                value = shown_value(self.plan, trial.value or 0.0)
                result = f"{self.plan.compare} {value} in {trial.user_attrs['seconds']:.1f} s"
            self.say(f"[{done}/{self.total}] {what}: {result}{self.outlook(whole, done)}")
        self.bar.update(self.task, completed=done)

    def outlook(self, whole: Sequence[Setting], done: int) -> str:
        """The best so far, and the time that is left."""
        text, ended = "", ranked(whole)
        if ended:
            best = max(ended, key=lambda setting: self.plan.sign * setting.mean)
            text = f"; best so far {named(best.params)} ({shown_value(self.plan, best.mean)}, n = {best.n})"
        if self.before < done < self.total:
            left = (monotonic() - self.started) / (done - self.before) * (self.total - done)
            text += f"; {left / 60:.0f} min left" if left > 90 else f"; {left:.0f} s left"
        return text
