"""runs: a table of all runs, with the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_mnist.cli.console import BAD_INPUT, OneLineParser, complain
from lit_mnist.exact.console import shortened
from lit_mnist.exact.runs import being_trained, number, read_results, section, text, versions

COLUMNS = ("run", "recipe", "parameters", "epochs", "val_accuracy", "test_accuracy", "seconds", "state")
FORMS = {"parameters": "{:,}", "seconds": "{:.1f}"}


def list_runs(args: Sequence[str]) -> int:
    """Print the table, and return the exit status."""
    parser = OneLineParser(
        prog="python -m lit_mnist runs",
        description="List the runs under lightning_logs/, with the settings in which they differ.",
    )
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    help_ = f"of {', '.join(COLUMNS)}, any setting such as model.lr, and any metric such as val/loss"
    parser.add_argument("--columns", type=lambda names: [name.strip() for name in names.split(",")], help=help_)
    parser.add_argument("--sort", metavar="COLUMN", help="sort by this column, ascending")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    options = parser.parse_args(args)
    try:
        folders = versions(options.root_dir / "lightning_logs")
        runs = [read_run(folder) for folder in reversed(folders)]
    except OSError as error:
        return complain(f"--root_dir {shortened(str(options.root_dir))}: {error.strerror}", BAD_INPUT)
    if not runs:
        return complain(f"--root_dir {shortened(str(options.root_dir))}: no run in its lightning_logs", BAD_INPUT)

    from pandas import DataFrame  # after --help and errors, which do without it

    table = DataFrame(runs, dtype=object)
    differing = [name for name in table if is_setting(name) and table[name].dropna().astype(str).nunique() > 1]
    columns = options.columns or [*COLUMNS, *differing]
    for flag, names in (("--columns", columns), ("--sort", [options.sort] if options.sort else [])):
        if unknown := [name for name in names if name not in table]:
            return complain(f"{flag} {shortened(unknown[0], 80)}: no run has it (see runs --help)", BAD_INPUT)
    if options.sort and options.sort != "run":  # numbers before words
        table = table.sort_values(
            options.sort,
            key=lambda values: values.map(lambda value: (isinstance(value, str), value), na_action="ignore"),
            kind="stable",
            na_position="first",
        )
    table = table[columns]
    if options.format == "json":
        print(table.to_json(orient="records", indent=2, double_precision=15))
    elif options.format == "csv":
        print(table.to_csv(index=False), end="")
    else:
        shown = {name: [shown_value(str(name), value) for value in table[name]] for name in table}
        print(DataFrame(shown).to_string(index=False))
    return 0


def is_setting(name: str) -> bool:
    return "." in name or name == "seed_everything"


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run's results.json has, by column, setting and metric.

    The state is `running`, `finished`, `interrupted` (also if the process was killed), `failed`, or `unknown` without
    results.
    """
    results = read_results(folder)
    fit, test = section(results, "fit"), section(results, "test")
    state = text(fit, "state") or "unknown"
    values = {f"{part}.{name}": value for part in ("model", "data") for name, value in section(fit, part).items()}
    values |= dict(section(fit, "settings")) | {"seed_everything": values.pop("data.seed", None)}
    values |= {name: value for name, value in test.items() if name.startswith("test/")} | dict(section(fit, "metrics"))
    plain = {name: plain_value(values, name) for name in values if plain_value(values, name) is not None}
    return plain | {
        "run": folder.name,
        "recipe": plain_value(fit, "recipe"),
        "parameters": number(fit, "parameters"),
        "epochs": number(fit, "epochs"),
        "val_accuracy": number(section(fit, "best") or section(fit, "metrics"), "val/accuracy"),
        "test_accuracy": number(test, "test/accuracy"),
        "seconds": number(fit, "train_seconds"),
        "state": "interrupted" if state == "running" and not being_trained(folder) else shortened(state),
    }


def plain_value(values: Mapping[str, Any], name: str) -> str | float | None:
    """Return a string on one line, a boolean or a number; nothing of another kind."""
    value = values.get(name)
    return shortened(value) if isinstance(value, str) else value if isinstance(value, bool) else number(values, name)


def shown_value(name: str, value: Any) -> str:
    form = "{:.2%}" if name.endswith("accuracy") else FORMS.get(name, "{}")
    return (
        "-"
        if value is None or value != value
        else form.format(value)
        if isinstance(value, (int, float))
        else str(value)
    )
