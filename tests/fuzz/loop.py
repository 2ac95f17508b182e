"""Many cases on a few processes, and what they came to."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .cases import Result

# one process imports everything once; the workers are forked from it, and each case from a worker
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lit_mnist.cli.cli", "lit_mnist.cli.export", "tensorboard", "torch.utils.tensorboard"])
CHUNK = 5  # cases that a worker is given at once
QUIET_SECONDS = 30  # between two lines where there is no terminal


def _work(
    kind: str, seed: int, indices: Sequence[int], template: Path, limit: float, keep: bool
) -> list[tuple[Result, str]]:
    from .runner import run, signature

    results = [run(kind, seed, index, template, limit, keep) for index in indices]
    return [(result, signature(result) if result.problems else "") for result in results]


def _prepare(template: Path) -> None:
    from .runner import make_template

    make_template(template)


def fuzz(
    jobs: Sequence[tuple[str, Sequence[int]]], seed: int, workers: int = 2, limit: float = 60.0, keep: bool = False
) -> Iterator[tuple[Result, str]]:
    """Run cases, kinds with their indices, and give each result with the signature of its failure as it comes."""
    folder = Path(tempfile.mkdtemp(prefix="lit_mnist-fuzz-"))
    try:
        with ProcessPoolExecutor(workers, CONTEXT) as pool:
            pool.submit(_prepare, folder / "template").result()
            futures = [
                pool.submit(_work, kind, seed, indices[start : start + CHUNK], folder / "template", limit, keep)
                for kind, indices in jobs
                for start in range(0, len(indices), CHUNK)
            ]
            try:
                for future in as_completed(futures):
                    yield from future.result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if not keep:
            shutil.rmtree(folder)


def described(result: Result, seed: int) -> str:
    lines = [f"{result.kind} {result.index} of seed {seed}: {'; '.join(result.problems) or 'in good order'}"]
    lines += [f"  lit_mnist {shlex.join(result.args)}", f"  {result.note}" if result.note else ""]
    lines += [f"  | {line[:300]}" for line in result.err.splitlines()[-4:]]
    lines += [f"  again: python -m tests.fuzz --kind {result.kind} --seed {seed} --only {result.index}"]
    return "\n".join(filter(None, lines)).encode(errors="backslashreplace").decode()


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as shown:
        shown.add_task("", total=total)
        yield shown


def report(jobs: Sequence[tuple[str, Sequence[int]]], seed: int, log: Path | None = None, **options: float) -> int:
    """Run cases and print what comes of them; the number of failures."""
    total = sum(len(indices) for _, indices in jobs)
    statuses: Counter[tuple[str, str]] = Counter()
    failures: Counter[str] = Counter()
    examples: dict[str, Result] = {}
    started = told = time.monotonic()
    with progress(total) as shown:
        for done, (result, signature) in enumerate(fuzz(jobs, seed, **options), 1):  # type: ignore[arg-type]
            statuses[result.kind, result.status] += 1
            if result.problems:
                failures[signature] += 1
                examples.setdefault(signature, result)
                shown.console.print(described(result, seed))
                if log:
                    entry = {"seed": seed, "signature": signature, **vars(result)}
                    with log.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
            shown.update(shown.task_ids[0], completed=done, description=f"{failures.total()} failures")
            if not sys.stdout.isatty() and time.monotonic() - told > QUIET_SECONDS:
                told = time.monotonic()
                print(f"{done} of {total} cases, {failures.total()} failures", flush=True)
    seconds = time.monotonic() - started
    table = Table("kind", "status", "cases", box=None)
    for (kind, status), count in sorted(statuses.items()):
        table.add_row(kind, status, str(count))
    Console().print(table)
    for signature, count in failures.most_common():
        example = examples[signature]
        print(f"{count:5} x {signature}  ({example.kind} {example.index})".encode(errors="replace").decode())
    print(f"{total} cases in {seconds:.0f} s, {total / seconds:.1f} a second; {failures.total()} failures")
    return failures.total()
