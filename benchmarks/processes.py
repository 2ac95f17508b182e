"""One run on several processes and machines: whether it is the same, and what a cut link costs.

agreement   the losses of each step of an epoch of the default recipe on 1, 2 and 4 processes, in 64 and 32 bits, beside
            one process with another number of threads, and batch norm that is not synchronised.
machines    two machines: network namespaces joined by a veth pair, torchrun on each. The link is cut in the middle of a
            run, the run resumed, and its weights compared with those of an uninterrupted run. Needs root and `ip`.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pandas
import torch
from records import children, make_parser, measure, scalars

FIT = ["-m", "lit_mnist", "fit", "--board.every_n_epochs", "0", "--trainer.accelerator", "cpu"]
VERSION = "lightning_logs/version_0"
HOSTS = {"lit-mnist-a": "10.77.31.1", "lit-mnist-b": "10.77.31.2"}
NETWORK = """
ip netns add lit-mnist-a; ip netns add lit-mnist-b
ip link add wire netns lit-mnist-a type veth peer name wire netns lit-mnist-b
ip -n lit-mnist-a address add 10.77.31.1/24 dev wire; ip -n lit-mnist-b address add 10.77.31.2/24 dev wire
for name in a b; do ip -n lit-mnist-$name link set lo up; ip -n lit-mnist-$name link set wire up; done
"""


def start(folder: Path, flags: list[str], threads: int | None, program: tuple[str, ...] = (sys.executable,)) -> Any:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*program, *FIT, *flags], cwd=folder, env=variables, **options)


def finish(*processes: Any) -> None:
    for process in processes:
        output = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"{' '.join(process.args)} ended with status {process.returncode}:\n{output}")


def agreement(options: Namespace) -> Iterator[dict[str, Any]]:
    flags = ["--data.root", str(options.root), "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    flags += ["--trainer.limit_train_batches", str(options.steps)] if options.steps else []
    ways = {"1 process": (1, os.cpu_count()), "2 processes": (2, 1), "4 processes": (4, 1)}
    ways |= {"1 process, 1 thread": (1, 1)} | {f"{n} processes, batch norm apart": (n, 1) for n in (2, 4)}
    record: dict[str, Any] = {}
    for precision in ("64-true", "32-true"):
        rows = {}
        for name, (number, threads) in ways.items():
            with tempfile.TemporaryDirectory() as where:
                more = ["--trainer.devices", str(number), "--trainer.precision", precision]
                more += ["--trainer.sync_batchnorm", "false"] if "apart" in name else []
                finish(start(Path(where), [*flags, *more], threads))
                losses = [value for _, value in scalars(Path(where, VERSION))["train/loss_step"]]
                metrics = json.loads(Path(where, VERSION, "results.json").read_text())["fit"]["metrics"]
            scores = {"val_loss": metrics["val/loss"], "val_accuracy": metrics["val/accuracy"]}
            record[f"{precision}, {name}"] = {"losses": losses, **scores}
            reference = record[f"{precision}, 1 process"]["losses"]
            apart = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
            marks = [mark for mark in (1, 10, 100) if mark < len(apart)] + [len(apart)]
            rows[name] = {f"step {mark}": f"{max(apart[:mark]):.0e}" for mark in marks} | scores
        print(f"\n{precision}: largest relative difference of the loss from that of one process, up to a step")
        print(pandas.DataFrame(rows).T.to_string())
    yield {"values": record}


def start_both(folder: Path, flags: list[str]) -> list[Any]:
    first, pair = HOSTS["lit-mnist-a"], []
    for name, own in HOSTS.items():
        torchrun = ["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=wire", sys.executable, "-m"]
        torchrun += ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        # torchrun recognises the host by its name, which both have in common
        torchrun += [f"--rdzv-endpoint={first}:29500", f"--rdzv-conf=is_host={int(own == first)}", "--local-addr", own]
        pair.append(start(folder, flags, 1, tuple(torchrun)))
    return pair


def trains(torchrun: Any) -> bool:
    """Return whether the process that torchrun has started is there, and no zombie."""
    try:
        return Path(f"/proc/{children(torchrun)[0]}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, IndexError):
        return False


def newest(folder: Path) -> Any:
    """Return the content of a run's newest checkpoint; empty before there is one."""
    for path in folder.glob(f"{VERSION}/checkpoints/last-*.ckpt"):
        with suppress(FileNotFoundError):  # replaced meanwhile
            return torch.load(path, weights_only=True)
    return {}


def machines(options: Namespace) -> Iterator[dict[str, Any]]:
    root, steps, record = str(options.root), options.steps or 150, []
    flags = ["--data.root", root, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", str(steps)]
    flags += ["--model.dropout", "0.05", "--checkpoint.every_seconds", "2", "--processes.timeout", "15"]
    with tempfile.TemporaryDirectory() as where, ExitStack() as stack:
        for name in HOSTS:
            stack.callback(subprocess.run, ["ip", "netns", "del", name])
        subprocess.run(["sh", "-ec", NETWORK], check=True)
        for number, share in enumerate((0, 0.2, 0.5, 0.8, 1.2, 1.6)):
            folder = Path(where, str(number))
            folder.mkdir()
            pair = start_both(folder, flags)
            if not share:  # uninterrupted
                finish(*pair)
                expected = newest(folder)
                continue
            while newest(folder).get("global_step", 0) < share * steps:
                sleep(0.2)
            wire = ["ip", "-n", list(HOSTS)[number % 2], "link", "set", "wire"]
            subprocess.run([*wire, "down"], check=True)
            cut = monotonic()
            while any(map(trains, pair)) and monotonic() - cut < 300:
                sleep(0.05)
            row = {"cut at": wire[2], "step": newest(folder)["global_step"], "seconds to end": monotonic() - cut}
            for process in pair:  # torchrun waits minutes for the machine that it cannot reach
                process.kill()
            row["reports"] = sum("lit_mnist: error" in process.communicate()[0] for process in pair)
            subprocess.run([*wire, "up"], check=True)
            finish(*start_both(folder, ["--ckpt_path", "last", "--data.root", root]))
            resumed, parts = newest(folder), ("state_dict", "current_model_state")
            same = (torch.equal(resumed[part][name], value) for part in parts for name, value in expected[part].items())
            record.append({**row, "same weights": all(same)})
    print(pandas.DataFrame(record).to_string())
    yield {"values": record}


if __name__ == "__main__":
    parser = make_parser(__doc__, "processes")
    parser.add_argument("--steps", type=int, help="an epoch: all of agreement, 150 of machines")
    sys.exit(measure(parser, {"agreement": agreement, "machines": machines}))
