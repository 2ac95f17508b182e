"""runs: a table of all runs, with whatever tells them apart."""

from __future__ import annotations

import csv
import errno
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_mnist.cli.console import BAD_INPUT, OneLineParser, complain
from lit_mnist.exact.console import print_table, shortened
from lit_mnist.exact.runs import being_trained, number, read_results, section, text, versions

COLUMNS = ("run", "recipe", "parameters", "epochs", "val_accuracy", "test_accuracy", "seconds", "state")
PERCENT = "{:.2%}"
FORMS = {"parameters": "{:,}", "val_accuracy": PERCENT, "test_accuracy": PERCENT, "seconds": "{:.1f}"}


def list_runs(args: Sequence[str]) -> int:
    """Print them, and return the exit status."""
    parser = OneLineParser(
        prog="python -m lit_mnist runs",
        description="List the runs under lightning_logs/, with the settings in which they differ.",
    )
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    parser.add_argument(
        "--columns",
        type=lambda names: [name.strip() for name in names.split(",")],
        help=f"of {', '.join(COLUMNS)}, any setting such as model.lr, and any metric such as val/loss",
    )
    parser.add_argument("--sort", metavar="COLUMN", help="by a column, the best or largest number last")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    try:
        options = parser.parse_args(args)
    except SystemExit as stop:  # from --help and from an error, which was told
        return stop.code if isinstance(stop.code, int) else 0
    folder = options.root_dir / "lightning_logs"
    try:
        if not folder.is_dir():
            raise OSError(errno.ENOENT, "there is no folder lightning_logs in it")
        everything = [everything_of(run) for run in reversed(versions(folder))]
    except OSError as error:
        return complain(f"--root_dir {shortened(str(options.root_dir))}: {error.strerror}", BAD_INPUT)
    known = {name for run in everything for name in run} | set(COLUMNS)
    columns = options.columns or [*COLUMNS, *differing(everything)]
    for flag, names in (("--columns", columns), ("--sort", [options.sort] if options.sort is not None else [])):
        if unknown := [name for name in names if name not in known]:
            allowed = f"{', '.join(COLUMNS)}, settings such as model.lr, and metrics such as val/loss"
            return complain(f"{flag} {shortened(unknown[0], 80)}: no run has it; allowed are {allowed}", BAD_INPUT)
    if options.sort and options.sort != "run":
        everything.sort(key=lambda run: place(run.get(options.sort)))
    rows = [{name: run.get(name) for name in columns} for run in everything]
    if options.format == "json":
        print(json.dumps(rows, indent=2))
    elif options.format == "csv":
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_rows(rows, columns)
    return 0


def place(value: Any) -> tuple[int, float, str]:
    """Where a value stands in an order: nothing first, then numbers, then words."""
    if value is None:
        return 0, 0, ""
    return (1, float(value), "") if isinstance(value, (int, float)) else (2, 0, str(value))


def everything_of(run: Path) -> dict[str, Any]:
    """All that a run's results.json tells, by column, setting and metric; None where a column is not there.

    The state is `running`, `finished`, `interrupted` (also where the process was killed and could not say so),
    `failed`, or `unknown` for a run without results.
    """
    results = read_results(run)
    fit, test = section(results, "fit"), section(results, "test")
    state = text(fit, "state") or "unknown"
    if state == "running" and not being_trained(run):
        state = "interrupted"
    settings = read_settings(fit)
    settings["seed_everything"] = settings.pop("data.seed", None)
    metrics = {name: value for name, value in test.items() if name.startswith("test/")} | dict(section(fit, "metrics"))
    plain = {name: value for name, value in (settings | metrics).items() if type(value) in (int, float, str, bool)}
    return plain | {
        "run": run.name,
        "recipe": text(fit, "recipe"),
        "parameters": number(fit, "parameters"),
        "epochs": number(fit, "epochs"),
        "val_accuracy": number(section(fit, "best") or section(fit, "metrics"), "val/accuracy"),
        "test_accuracy": number(test, "test/accuracy"),
        "seconds": number(fit, "train_seconds"),
        "state": state,
    }


def read_settings(fit: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, by dotted key, as its results.json tells them of the fit."""
    settings = {f"{part}.{name}": value for part in ("model", "data") for name, value in section(fit, part).items()}
    return settings | dict(section(fit, "settings"))


def differing(everything: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which these runs differ; one that a run does not tell is no difference."""
    names = dict.fromkeys(name for run in everything for name in run if "." in name or name == "seed_everything")
    values = {name: {repr(run[name]) for run in everything if name in run} for name in names}
    return [name for name in names if len(values[name]) > 1]


def print_rows(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        words = column in ("run", "recipe", "state")
        heading = column.replace("_", "\n").replace(".", ".\n")  # so that a table is 80 columns wide
        table.add_column(
            heading, justify="left" if words else "right", no_wrap=words and column != "recipe", overflow="fold"
        )
    for row in rows:
        table.add_row(*("-" if row[name] is None else shown_value(name, row[name]) for name in columns))
    print_table(table)


def shown_value(name: str, value: Any) -> str:
    form = FORMS.get(name) or (PERCENT if name.endswith("/accuracy") else "{}")
    return form.format(value) if isinstance(value, (int, float)) else str(value)
