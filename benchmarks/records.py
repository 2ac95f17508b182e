"""What the benchmarks share: their command line, tables of medians, and lines of JSON in results/."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.data import datasets
from lit_mnist.exact.conditions import conditions

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
Measure = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]


def make_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Make a parser of --root and --record; records go to NAME.jsonl in the folder $OUT, or else in results/."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--root", type=lambda path: Path(path).resolve(), default="data", help="of the data")
    parser.add_argument("--record", action="store_true", help=f"append the figures to results/{name}.jsonl")
    parser.set_defaults(records=Path(os.environ.get("OUT") or RESULTS, f"{name}.jsonl"), device=torch.device("cpu"))
    return parser


def append(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Append a line with what it depends on: the conditions of this process."""
    if options.record:
        with options.records.open("a") as file:
            file.write(json.dumps(record | conditions(options.device)) + "\n")


def print_rows(title: str, rows: Any, form: str = ".2f") -> None:
    table = pandas.DataFrame(rows).agg(["median", "min", "max"]).T
    print(f"\n{title}", table.to_string(float_format=f"{{:{form}}}".format), sep="\n")


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read (step, value) of each tag in a run's event files."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def children(process: subprocess.Popen[Any]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def measure(parser: argparse.ArgumentParser, measures: dict[str, Measure], arguments: list[str] | None = None) -> int:
    """Take the measures that the command line names, or all; the exit status is 1 where one failed.

    Each record is appended at once; after a failure the others continue. `options.flags` are the arguments left over.
    """
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(measures)} (all)")
    options, flags = parser.parse_known_args(arguments)
    options.flags = flags
    datasets.prepare(options.root)
    failed = 0
    for name in options.measures or measures:
        started = perf_counter()
        try:
            for record in measures[name](options):
                append(options, {"measure": name, **record})
        except (Exception, SystemExit) as error:
            failed += 1
            print(f"{name} failed: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        print(f"({name}: {perf_counter() - started:.0f} s)", flush=True)
    return int(failed > 0)
