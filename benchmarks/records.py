"""Where the benchmarks keep their figures: lines of JSON in results/, with `--record` alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lit_mnist.exact.conditions import conditions

RESULTS = Path(__file__).parent / "results"


def add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--record", action="store_true", help=f"append the figures to results/{name}.jsonl")
    parser.set_defaults(records=RESULTS / f"{name}.jsonl")


def append(options: argparse.Namespace, record: dict[str, Any], where: dict[str, Any] | None = None) -> None:
    """Append a line with what it depends on: by default the conditions of this process on the CPU."""
    if options.record:
        with options.records.open("a") as file:
            file.write(json.dumps(record | (where or conditions(torch.device("cpu")))) + "\n")
