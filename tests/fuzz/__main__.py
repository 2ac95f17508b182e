"""Try command lines and checkpoints that nobody has thought of."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .cases import KINDS
from .loop import described, fuzz, report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=150, help="of each kind (150)")
    parser.add_argument("--seed", type=int, default=1, help="a case is a function of kind, seed and index (1)")
    parser.add_argument("--kind", choices=(*KINDS, "both"), default="both")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time (2)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds until a case is taken to wait (60)")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this case alone, with all that it prints")
    parser.add_argument("--keep", action="store_true", help="leave the sandboxes, and say where they lie")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append a line of JSON for each failure")
    options = parser.parse_args()
    kinds = KINDS if options.kind == "both" else (options.kind,)
    if options.only is None:
        jobs = [(kind, range(options.cases)) for kind in kinds]
        settings = {"workers": options.workers, "limit": options.limit, "keep": options.keep}
        return int(report(jobs, options.seed, options.log, **settings) > 0)
    failed = False
    for result, signature in fuzz(
        [(kind, [options.only]) for kind in kinds], options.seed, 1, options.limit, options.keep
    ):
        print(f"{described(result, options.seed)}\n  {signature}\n  status {result.status}, {result.seconds:.1f} s")
        print(f"  sandbox: {result.sandbox}\n" if options.keep else "")
        print(f"--- stdout\n{result.out}--- stderr\n{result.err}".encode(errors="backslashreplace").decode())
        failed = failed or bool(result.problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
