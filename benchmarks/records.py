"""What the benchmarks share: their command line, tables of medians, and lines of JSON in results/."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from lit_mnist.data import datasets
from lit_mnist.exact.conditions import conditions

RESULTS = Path(__file__).parent / "results"
Measure = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]


def add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--record", action="store_true", help=f"append the figures to results/{name}.jsonl")
    parser.set_defaults(records=RESULTS / f"{name}.jsonl")


def append(options: argparse.Namespace, record: dict[str, Any], where: dict[str, Any] | None = None) -> None:
    """Append a line with what it depends on: by default the conditions of this process on the CPU."""
    if options.record:
        with options.records.open("a") as file:
            file.write(json.dumps(record | (where or conditions(torch.device("cpu")))) + "\n")


def print_rows(title: str, rows: Mapping[str, list[float]], form: str = ".2f") -> None:
    print(f"\n{title:<44}{'median':>12}{'lowest':>12}{'highest':>12}")
    for name, values in rows.items():
        numbers = (statistics.median(values), min(values), max(values))
        print(f"{name:<44}" + "".join(f"{format(number, form):>12}" for number in numbers))


def measure(parser: argparse.ArgumentParser, measures: Mapping[str, Measure], arguments: list[str] | None) -> int:
    """Take the measures that the command line names, all by default; `options.flags` are those left over.

    A record is appended as soon as it is there, in the folder $OUT where there is one. A measure that fails is reported
    in a line, and the others continue.

    Returns:
        The exit status: 1 where one failed.
    """
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(measures)} (all)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data (data)")
    options, flags = parser.parse_known_args(arguments)
    options.flags = flags
    options.records = Path(os.environ.get("OUT") or RESULTS) / options.records.name
    options.root = options.root.resolve()
    datasets.prepare(options.root)
    failed = 0
    for name in options.measures or measures:
        started = perf_counter()
        try:
            for record in measures[name](options):
                append(options, {"measure": name, **record}, conditions(options.device))
        except (Exception, SystemExit) as error:
            failed += 1
            print(f"{name} failed: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        print(f"({name}: {perf_counter() - started:.0f} s)", flush=True)
    return 1 if failed else 0
