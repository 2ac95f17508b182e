"""runs: a table of all runs, with the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_mnist.cli.console import OneLineParser
from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.runs import being_trained, number, read_results, section, text, versions

COLUMNS = ("run", "recipe", "parameters", "epochs", "val_accuracy", "test_accuracy", "seconds", "state")
FORMS = {"parameters": "{:,}", "seconds": "{:.1f}"}


def runs(args: Sequence[str]) -> None:
    """Print the table.

    Raises:
        UserError: there are no runs, or no such column.
    """
    parser = OneLineParser(
        prog="python -m lit_mnist runs", description="List runs and the settings in which they differ."
    )
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    columns_help = f"of {', '.join(COLUMNS)}, any setting such as model.lr, and any metric such as val/loss"
    parser.add_argument("--columns", type=lambda names: [name.strip() for name in names.split(",")], help=columns_help)
    parser.add_argument("--sort", metavar="COLUMN", help="sort by this column, ascending")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    options = parser.parse_args(args)
    found = [read_run(folder) for folder in reversed(versions(options.root_dir / "lightning_logs"))]
    if not found:
        raise UserError(f"--root_dir {shortened(str(options.root_dir))}: there are no runs in a folder lightning_logs")

    from pandas import DataFrame  # here, for --help does without it

    table = DataFrame(found, dtype=object)
    settings = [name for name in table if "." in name or name == "seed_everything"]
    differing = [name for name in settings if table[name].dropna().astype(str).nunique() > 1]
    columns = options.columns or [*COLUMNS, *differing]
    for flag, names in (("--columns", columns), ("--sort", [options.sort or "run"])):
        if unknown := [name for name in names if name not in table]:
            raise UserError(f"{flag} {shortened(unknown[0], 80)}: no run has it (see runs --help)")
    if options.sort and options.sort != "run":
        keys = table[options.sort].map(lambda value: (isinstance(value, str), value), na_action="ignore")
        table = table.loc[keys.sort_values(kind="stable", na_position="first").index]  # numbers before words
    table = table[columns]
    if options.format == "json":
        print(table.to_json(orient="records", indent=2, double_precision=15))
    elif options.format == "csv":
        print(table.to_csv(index=False), end="")
    else:
        forms = {name: lambda value, name=name: shown_value(name, value) for name in columns}
        print(table.fillna("-").to_string(index=False, formatters=forms))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run's results.json has, by column, setting and metric; its state is `unknown` without results."""
    results = read_results(folder)
    fit, test = section(results, "fit"), section(results, "test")
    values = {f"{part}.{name}": value for part in ("model", "data") for name, value in section(fit, part).items()}
    values["seed_everything"] = values.pop("data.seed", None)
    for found in (section(fit, "settings"), test, section(fit, "metrics")):
        values |= {name: value for name, value in found.items() if "." in name or "/" in name}
    state = text(fit, "state") or "unknown"
    if state == "running" and not being_trained(folder):
        state = "interrupted"  # the process was killed and could not write it
    values |= {"run": folder.name, "state": state, "recipe": text(fit, "recipe"), "epochs": fit.get("epochs")}
    values |= {"parameters": fit.get("parameters"), "seconds": fit.get("train_seconds")}
    values["val_accuracy"] = (section(fit, "best") or section(fit, "metrics")).get("val/accuracy")
    values["test_accuracy"] = test.get("test/accuracy")
    return {name: plain_value(values, name) for name in values}


def plain_value(values: Mapping[str, Any], name: str) -> Any:
    """Return a string on one line, a boolean or a number; None in place of anything else."""
    value = values[name]
    return shortened(value) if isinstance(value, str) else value if isinstance(value, bool) else number(values, name)


def shown_value(name: str, value: Any) -> str:
    form = "{:.2%}" if name.endswith("accuracy") else FORMS.get(name, "{}")
    return value if isinstance(value, str) else form.format(value)
