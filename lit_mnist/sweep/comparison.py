"""What a study came to: a table, the difference of the best two with its confidence interval, and a plot."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from matplotlib import pyplot
from optuna.visualization.matplotlib import plot_slice
from scipy.stats import ttest_rel

from lit_mnist.exact.console import shown
from lit_mnist.exact.runs import replaced
from lit_mnist.sweep.study import Study, latest_trials, plain

VALUES = ["mean", "std", "best", "worst"]


def table(plan: Study, study: optuna.Study) -> pd.DataFrame:
    """Return a line for each configuration and its runs (`trials`), the best first, and failed ones last."""
    lines, least, attrs = [], plan.direction == "minimize", study.user_attrs
    for sample, trial in sorted(latest_trials(study).items()):
        runs = [{"seed": n, **run, **attrs.get(f"test {sample} {n}", {})} for n, run in plan.ended_runs(trial).items()]
        frame = pd.DataFrame(runs).reindex(columns=["value", "seconds", "parameters", "epochs"])
        values, scores = frame["value"], pd.DataFrame(runs).filter(like="test/")
        ends = sorted([values.min(), values.max()], reverse=not least)
        reason = trial.user_attrs.get("reason")
        line = {"sample": sample, **plan.settings, **trial.params, "n": len(runs), "reason": reason}
        line |= dict(zip(VALUES, [values.mean(), values.std(), *ends], strict=True))
        line |= {"seconds": frame["seconds"].mean(), **frame[["parameters", "epochs"]].max(), "trials": runs}
        if runs or reason:
            lines.append({**line, **scores.mean(), **scores.std().add_suffix(" std")})
    lines.sort(key=lambda line: (bool(line["reason"]), -line["n"], line["n"] and (1 if least else -1) * line["mean"]))
    columns = ["sample", *plan.settings, "n", "reason", *VALUES, "seconds", "parameters", "epochs", "trials"]
    return pd.DataFrame(lines, columns=None if lines else columns)


def named(params: Mapping[str, Any]) -> str:
    values = {name: f"{value:.4g}" if isinstance(value, float) else plain(value) for name, value in params.items()}
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items()) or "the recipe"


def shown_value(metric: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if metric.endswith("accuracy") else f"{value:{sign}.4f}"


def difference(first: pd.Series, second: pd.Series) -> dict[str, Any]:
    """Return the mean difference of two lines of the table over their common seeds, and its 95 % interval if any."""
    lines = [pd.Series({run["seed"]: run["value"] for run in line["trials"]}) for line in (first, second)]
    pairs = pd.concat(lines, axis=1, join="inner")
    apart = pairs[0] - pairs[1]
    several = apart.std() > 1e-6  # else there is one seed, or chance or rounding made them equal
    low, high = ttest_rel(pairs[0], pairs[1]).confidence_interval(0.95) if several else (None, None)
    return {"seeds": pairs.index.tolist(), "mean": float(apart.mean()), "low": low, "high": high}


def in_words(plan: Study, ranked: pd.DataFrame, apart: dict[str, Any] | None) -> list[str]:
    """Say what lines of the table, and the difference of the first two, show."""
    if ranked.empty:
        return ["No configuration was trained with all its seeds."]
    names = [named(line) for line in ranked[[*plan.varied]].to_dict("records")]
    words = [f"Best: {names[0]}"]
    if apart and apart["low"] is not None:
        mean, low, high = (shown_value(plan.compare, apart[key], "+") for key in ("mean", "low", "high"))
        points = " points" if plan.compare.endswith("accuracy") else ""
        real = "a real difference" if apart["low"] > 0 or apart["high"] < 0 else "no difference can be seen"
        paired = f"95 % confidence interval {low} to {high}, paired over {len(apart['seeds'])} common seeds"
        words.append(f"Against the second, {names[1]}: {mean}{points} ({paired}): {real}.")
    if len(ranked) > 2:
        words.append(f"Its score is optimistically biased: it is the best of {len(ranked)} settings on the same data.")
    for metric, scores in pd.DataFrame(ranked["trials"].iloc[0]).filter(like="test/").items():
        mean, std, low, high = (shown_value(str(metric), scores.agg(name)) for name in ("mean", "std", "min", "max"))
        several = f" ± {std} ({low} to {high})" if len(scores) > 1 else ""
        words.append(f"Test set, {metric}: {mean}{several}, n = {scores.count()}")
    return words


def report(plan: Study, study: optuna.Study, folder: Path, settled: bool) -> pd.DataFrame:
    """Print the table and what it shows, write it to a folder as CSV, JSON and PNG, and return it."""
    found = table(plan, study)
    ranked = found[found["reason"].isna()]
    apart = difference(ranked.iloc[0], ranked.iloc[1]) if len(ranked) > 1 else None
    words, percent = in_words(plan, ranked, apart), ", %" * plan.compare.endswith("accuracy")
    of = "best checkpoint" if plan.of == "best" and plan.compare.startswith("val/") else "last epoch"
    runs = f"{found['n'].sum()} runs{'' if settled else ' so far'}"
    printed = found[[*plan.varied, "n", *VALUES, "seconds", "parameters", "reason"]].dropna(axis=1, how="all")
    forms = {"float_format": "{:.4g}".format, "formatters": dict.fromkeys(VALUES, partial(shown_value, plan.compare))}
    lines = printed.rename(columns=lambda name: name.rpartition(".")[2]).to_string(index=False, na_rep="-", **forms)
    print(f"\n{study.study_name}: {plan.compare}{percent} of the {of}, {runs}\n", lines, "", *words, sep="\n")
    with replaced(folder / "settings.csv") as file:
        found.drop(columns=["sample", "trials"]).to_csv(file, index=False)
    results = study.user_attrs["study"] | {"study": study.study_name, "settled": settled, "difference": apart}
    results |= {"settings_tried": found.astype(object).where(found.notna(), None).to_dict("records"), "in_words": words}
    with replaced(folder / "results.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    if plan.varied:
        latest = optuna.create_study(direction=plan.direction)
        latest.add_trials(latest_trials(study).values())
        plot_slice(latest, target_name=plan.compare)
        with replaced(folder / "settings.png") as file:
            pyplot.savefig(file, format="png", dpi=100, bbox_inches="tight")
        pyplot.close("all")
    print(f"Written to: {shown(folder)}")
    return found
