"""runs: a table of all runs, with the settings in which they differ."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_mnist.cli.console import OneLineParser
from lit_mnist.exact.console import UserError, shortened
from lit_mnist.exact.runs import being_trained, read_results, section, test_score, versions

COLUMNS = ("run", "val_accuracy", "test_accuracy", "state", "epochs", "seconds", "recipe", "parameters")
PERCENT = "{:.2%}".format
FORMS = {"parameters": "{:,}".format, "seconds": "{:.1f}".format, "val_accuracy": PERCENT, "test_accuracy": PERCENT}


def runs(args: Sequence[str]) -> None:
    """Run the command with the flags after its name; UserError if there are no runs, or no such column."""
    parser = OneLineParser(prog="python -m lit_mnist runs", description="List runs and the settings they differ in.")
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    columns_help = f"of {', '.join(COLUMNS)}, any setting such as model.lr, and any metric such as val/loss"
    parser.add_argument("--columns", type=lambda names: [name.strip() for name in names.split(",")], help=columns_help)
    parser.add_argument("--sort", metavar="COLUMN", default="run", help="sort by this column, ascending (run)")
    parser.add_argument("--descending", action="store_true", help="sort the other way, the greatest first")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    options = parser.parse_args(args)
    found = [read_run(folder) for folder in reversed(versions(options.root_dir / "lightning_logs"))]
    if not found:
        raise UserError(f"--root_dir {shortened(str(options.root_dir))}: there are no runs in a folder lightning_logs")

    from pandas import DataFrame  # here, for --help does without it

    table = DataFrame(found, dtype=object)
    settings = [name for name in table if "." in name or name == "seed_everything"]
    differing = [name for name in settings if table[name].dropna().astype(str).nunique() > 1]
    columns = options.columns or [*COLUMNS[:4], *differing, *COLUMNS[4:]]  # on a narrow terminal the first ones stay
    for flag, names in (("--columns", columns), ("--sort", [options.sort])):
        if unknown := [name for name in names if name not in table]:
            raise UserError(f"{flag} {shortened(unknown[0], 80)}: no run has it (see runs --help)")
    if options.sort != "run":  # in whose order they are
        table = table.sort_values(options.sort, kind="stable", na_position="first")
    table = table[columns][:: -1 if options.descending else 1]
    if options.format == "json":
        print(table.to_json(orient="records", indent=2, double_precision=15))
    elif options.format == "csv":
        print(table.to_csv(index=False), end="")
    else:
        width = shutil.get_terminal_size((10**9, 0)).columns  # a file has no width
        print(table.fillna(float("nan")).to_string(index=False, na_rep="-", line_width=width, formatters=FORMS))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run's results.json has, by column, setting and metric; its state is `unknown` without results."""
    results = read_results(folder)
    fit, test = section(results, "fit"), test_score(results)
    state = fit.get("state", "unknown")
    if state == "running" and not being_trained(folder):
        state = "interrupted"  # the process was killed and could not write it
    best, metrics = section(fit, "best"), section(fit, "metrics")
    last = {name: metrics[name] for name in metrics if not (best and name.startswith("val/"))}  # which are the best's
    values = {f"{part}.{name}": value for part in ("model", "data") for name, value in section(fit, part).items()}
    values["seed_everything"] = values.pop("data.seed", None)
    values |= {**section(fit, "settings"), **last, **test, **best}
    values |= {"run": folder.name, "state": state, "seconds": fit.get("train_seconds")}
    values |= {name: fit.get(name) for name in ("recipe", "parameters", "epochs")}
    values |= {f"{part}_accuracy": values.get(f"{part}/accuracy") for part in ("val", "test")}
    return {name: value if isinstance(value, (str, int, float)) else None for name, value in values.items()}
