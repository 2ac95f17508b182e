"""One run on several processes and machines: whether it is the same, how fast it is, and what a cut link costs.

    python benchmarks/processes.py                        # all four, on a quiet machine: half an hour
    python benchmarks/processes.py agreement --steps 50   # one of them

agreement   the losses of each step of an epoch of the default recipe on 1, 2 and 4 processes, in 64 and 32 bits,
            against those of one process; beside them one process with another number of threads, and batch norm that
            is not synchronised.
scores      test and validation of one checkpoint on 1, 2, 3 and 4 processes.
throughput  images a second, training on 1, 2 and 4 processes, in turns.
machines    two machines: network namespaces joined by a veth pair, torchrun with a rendezvous between them. The link is
            cut in the middle of a run, and the run resumed; its weights are compared with those of a run that was left
            alone. Needs root and the command `ip`.

Prints tables in Markdown; with `--record` every value is appended with its conditions to results/processes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from records import add_flag, append
from rich.progress import track
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_mnist.data import datasets

QUIET = ["--trainer.enable_model_summary", "false", "--board.every_n_epochs", "0", "--trainer.accelerator", "cpu"]
CORES = os.cpu_count() or 1
PROGRAM = [sys.executable, "-m", "lit_mnist"]


def environment(threads: int | None = None) -> dict[str, str]:
    """With so many threads a process; None lets Lightning share the cores out."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**variables, "CUDA_VISIBLE_DEVICES": "", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def lit_mnist(folder: Path, *flags: str, threads: int | None = None) -> str:
    done = subprocess.run([*PROGRAM, *flags], cwd=folder, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(flags)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def newest(folder: Path) -> Path:
    return max((folder / "lightning_logs").glob("version_*"), key=lambda run: int(run.name.removeprefix("version_")))


def results(folder: Path) -> Any:
    return json.loads((newest(folder) / "results.json").read_text())


def last_checkpoint(folder: Path) -> dict[str, Any]:
    (path,) = newest(folder).glob("checkpoints/last-*.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def table(*rows: tuple[Any, ...]) -> None:
    for number, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if number == 0:
            print("| " + " | ".join("---" for _ in row) + " |")


def agreement(root: str, options: argparse.Namespace) -> Any:
    """Losses of each step against those of one process with a thread for each core."""
    flags = ["fit", "--data.root", root, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1", *QUIET]
    flags += ["--trainer.limit_train_batches", str(options.steps)] if options.steps else []
    ways: dict[str, tuple[list[str], int | None]] = {"1 process": ([], CORES)}
    ways |= {f"{number} processes": (["--trainer.devices", str(number)], 1) for number in (2, 4)}
    ways["1 process, 1 thread"] = [], 1
    unsynchronised = ["--trainer.sync_batchnorm", "false"]
    ways |= {
        f"{number} processes, batch norm apart": (["--trainer.devices", str(number), *unsynchronised], 1)
        for number in (2, 4)
    }
    record: dict[str, Any] = {}
    for precision in ("64-true", "32-true"):
        for name, (extra, threads) in track(ways.items(), precision):
            with tempfile.TemporaryDirectory() as where:
                folder = Path(where)
                lit_mnist(folder, *flags, *extra, "--trainer.precision", precision, threads=threads)
                events = EventAccumulator(str(newest(folder)), size_guidance={"scalars": 0})
                events.Reload()
                record[f"{precision}, {name}"] = {
                    "losses": [event.value for event in events.Scalars("train/loss_step")],
                    "val_loss": results(folder)["fit"]["metrics"]["val/loss"],
                    "val_accuracy": results(folder)["fit"]["metrics"]["val/accuracy"],
                }
        reference = record[f"{precision}, 1 process"]["losses"]
        last = len(reference)
        marks = [mark for mark in (1, 10, 100) if mark < last] + [last]
        rows = []
        for name in ways:
            run = record[f"{precision}, {name}"]
            apart = [abs(a - b) / b for a, b in zip(run["losses"], reference, strict=True)]
            difference = [f"{max(apart[:mark]):.0e}" if max(apart[:mark]) else "0" for mark in marks]
            rows.append((name, *difference, f"{run['val_loss']:.6f}", f"{100 * run['val_accuracy']:.2f}"))
        print(f"\n{precision}: largest relative difference of the loss from that of one process, up to a step")
        table(("", *(f"step {mark}" for mark in marks), "validation loss", "accuracy, %"), *rows)
    return record


def scores(root: str, options: argparse.Namespace) -> Any:
    record = []
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        lit_mnist(folder, "fit", "--data.root", root, "--trainer.max_epochs", "1", *QUIET)
        for processes in (1, 2, 3, 4):
            many = ["--ckpt_path", "best", "--trainer.devices", str(processes), "--trainer.accelerator", "cpu"]
            many += ["--data.root", root]
            lit_mnist(folder, "test", *many, threads=1)
            validated = lit_mnist(folder, "validate", *many, threads=1).splitlines()[-1]
            lit_mnist(folder, "predict", *many, threads=1)
            (path,) = newest(folder).glob("predictions-*.csv")
            digits = [line.split(",")[:2] for line in path.read_text().splitlines()]
            record.append({"test": results(folder)["test"], "validated": validated, "digits": digits})
    print("\nThe same checkpoint")
    rows = [
        (
            entry["test"]["processes"],
            entry["test"]["samples"],
            f"{100 * entry['test']['test/accuracy']:.2f}",
            f"{entry['test']['test/loss']:.7g}",
            entry["validated"].partition(": ")[2],
            "yes" if entry["digits"] == record[0]["digits"] else "no",
        )
        for entry in record
    ]
    head = ("processes", "test images", "accuracy, %", "loss", "validation", "the same 10,000 digits predicted")
    table(head, *rows)
    return [{**entry["test"], "validated": entry["validated"]} for entry in record]


def throughput(root: str, options: argparse.Namespace) -> Any:
    steps = options.steps or 200
    flags = ["fit", "--data.root", root, "--trainer.max_epochs", "1", "--data.val_size", "0", *QUIET]
    flags += ["--trainer.limit_train_batches", str(steps)]
    ways = [(processes, batch) for batch in (128, 512) for processes in (1, 2, 4)]
    record: dict[str, list[float]] = {f"{processes} {batch}": [] for processes, batch in ways}
    for number in track(range(options.rounds + 1), "throughput"):
        for processes, batch in ways:
            with tempfile.TemporaryDirectory() as where:
                many = ["--trainer.devices", str(processes), "--data.batch_size", str(batch)]
                lit_mnist(Path(where), *flags, *many)
                if number:  # the first round warms up
                    record[f"{processes} {batch}"].append(results(Path(where))["fit"]["samples_per_second"])
    print(
        f"\nTraining, images a second: medians of {options.rounds} rounds in turns (lowest to highest), {steps} steps"
    )
    rows = []
    for processes, batch in ways:
        values, single = record[f"{processes} {batch}"], record[f"1 {batch}"]
        ratio = statistics.median(a / b for a, b in zip(values, single, strict=True))
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        threads = max(1, CORES // processes)
        rows.append((batch, processes, threads, f"{statistics.median(values):,.0f} ({spread})", f"{ratio:.2f}"))
    table(("global batch", "processes", "threads each", "images a second", "to one process"), *rows)
    return record


NAMES, ADDRESSES = ("lit-mnist-a", "lit-mnist-b"), ("10.77.31.1", "10.77.31.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def two_machines() -> Iterator[None]:
    for name in NAMES:
        ip("netns", "add", name)
    try:
        ip("link", "add", "wire", "netns", NAMES[0], "type", "veth", "peer", "name", "wire", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def start_both(folder: Path, flags: list[str]) -> list[subprocess.Popen[str]]:
    processes = []
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "digits"]
        # torchrun recognises the host by its name, which both have in common
        torchrun += ["--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}", "--local-addr", address]
        torchrun += ["-m", "lit_mnist", *flags]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *torchrun],
                cwd=folder,
                env={**environment(1), "GLOO_SOCKET_IFNAME": "wire"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish_both(processes: list[subprocess.Popen[str]]) -> None:
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"torchrun ended with status {process.returncode}:\n{output}")


def trains(torchrun: subprocess.Popen[str]) -> bool:
    """Whether the process that torchrun has started is there."""
    try:
        child = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()[0]
        return Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"  # a zombie, where torchrun does not look
    except (FileNotFoundError, IndexError):
        return False


def training_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 before there is one."""
    names = [path.name for path in folder.glob("lightning_logs/version_0/checkpoints/last-*.ckpt")]
    return max((int(found[1]) for name in names if (found := re.search(r"step=(\d+)", name))), default=0)


def machines(root: str, options: argparse.Namespace) -> Any:
    steps, timeout = options.steps or 150, 15
    flags = ["fit", "--data.root", root, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", str(steps)]
    flags += ["--model.dropout", "0.05", "--checkpoint.every_seconds", "2", "--processes.timeout", str(timeout), *QUIET]
    record: list[dict[str, Any]] = []
    with two_machines(), tempfile.TemporaryDirectory() as where:
        folders = [Path(where, name) for name in ("alone", "one-machine")]
        for folder in folders:
            folder.mkdir()
        finish_both(start_both(folders[0], flags))
        expected = last_checkpoint(folders[0])
        lit_mnist(folders[1], *flags, "--trainer.devices", "2", threads=1)
        same_as_loopback = same_weights(expected, last_checkpoint(folders[1]))
        for number, share in enumerate(track((0.2, 0.5, 0.8, 1.2, 1.6), "cutting the link")):
            folder = Path(where, f"cut-{number}")
            folder.mkdir()
            pair = start_both(folder, flags)
            while training_step(folder) < share * steps and all(process.poll() is None for process in pair):
                sleep(0.05)
            ip("-n", NAMES[number % 2], "link", "set", "wire", "down")
            cut = monotonic()
            while any(map(trains, pair)) and monotonic() - cut < 300:
                sleep(0.05)
            ended = monotonic() - cut
            for process in pair:  # torchrun itself waits minutes for the machine that it cannot reach
                process.kill()
            words = [process.communicate()[0] for process in pair]
            step = training_step(folder)
            messages = [line for text in words for line in text.splitlines() if line.startswith("lit_mnist: error")]
            ip("-n", NAMES[number % 2], "link", "set", "wire", "up")
            again = ["fit", "--ckpt_path", "last", "--data.root", root, "--processes.timeout", str(timeout)]
            finish_both(start_both(folder, again))
            record.append(
                {
                    "cut_at": NAMES[number % 2],
                    "step": step,
                    "seconds_until_both_ended": round(ended, 1),
                    "messages": messages,
                    "same_weights": same_weights(expected, last_checkpoint(folder)),
                }
            )
    print(f"\nTwo machines, {2 * steps} steps, a timeout of {timeout} s; each run resumed from its last checkpoint")
    print(f"Bits of the run that was left alone are those of two processes on one machine: {same_as_loopback}")
    rows = [
        (
            entry["cut_at"],
            entry["step"],
            f"{entry['seconds_until_both_ended']} s",
            len(entry["messages"]),
            "yes" if entry["same_weights"] else "no",
        )
        for entry in record
    ]
    head = ("link down at", "last checkpoint, step", "both ended after", "told by processes")
    table((*head, "weights of the resumed run the same, bit for bit"), *rows)
    print(f"\n{record[0]['messages'][0]}")
    return {"same_as_loopback": same_as_loopback, "cuts": record, "timeout": timeout}


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    parts = [part for part in ("state_dict", "current_model_state") if part in one]
    return all(torch.equal(one[part][name], other[part][name]) for part in parts for name in one[part])


MEASURES = {"agreement": agreement, "scores": scores, "throughput": throughput, "machines": machines}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(MEASURES)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput (5)")
    parser.add_argument("--steps", type=int, help="an epoch: all of agreement, 200 of throughput, 150 of machines")
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    add_flag(parser, "processes")
    options = parser.parse_args()
    if unknown := set(options.measures) - set(MEASURES):
        parser.error(f"unknown measures {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    root = str(Path(options.root).resolve())
    datasets.prepare(root)
    for name in options.measures or MEASURES:
        values = MEASURES[name](root, options)
        append(options, {"measure": name, "values": values})


if __name__ == "__main__":
    main()
