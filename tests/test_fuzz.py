"""Random command lines: each must end in time, with the right status, with one line for an error, and without damage.

FUZZ_SEED=7 FUZZ_CASES=5000 pytest -m slow tests/test_fuzz.py              # others than the 100 of seed 1
FUZZ_SEED=7 pytest -m slow "tests/test_fuzz.py::test_a_command_line[17]"   # one of them again
"""

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers import fail, in_processes, kill_before, write_tiny_mnist
from PIL import Image, ImageDraw

from lit_mnist import LitMNIST
from lit_mnist.__main__ import main
from lit_mnist.data import datasets

SEED, CASES = (int(os.environ.get(name, default)) for name, default in (("FUZZ_SEED", 1), ("FUZZ_CASES", 100)))
SECONDS = 60  # by which a case must have ended
MEMORY = 24 << 30  # of addresses: what asks for more is stopped, and not the machine
LONGEST_LINE = 400  # characters of an error, without those of the arguments
FIT = shlex.split(
    "fit --trainer.accelerator cpu --trainer.max_epochs 2 --board.every_n_epochs 0 --model.layers '4x5/2 8/2' "
    "--data.batch_size 20 --data.val_size 20 --checkpoint.every_n_steps 1"
)
FINISHED = [*FIT, "--model.dropout", "0.1"]
STOPPED = [*FIT, "--model.optimizer", "adamw", "--model.lr", "0.01", "--trainer.callbacks", "LearningRateMonitor"]

# flags | values that are right | values that are wrong
TABLE = r"""
model.layers        | 4 '4x5/2 4+' 4d 2x7v/2 '4\n4' | '' x 0 -1 16x2 '4 pool pool pool pool pool' 8+ 99999 16/3 '4,4'
model.network       | digitnet                | x '' MLP null 1
model.dropout model.label_smoothing model.ema_decay data.scale | 0 0.5 | -0.1 1 1.5 nan inf x [] null
model.warmup data.augmented | 0 0.5 1         | -1 1.1 nan inf x
model.nesterov data.download | false true     | x 2 null
model.activation    | silu relu               | x '' gelu RELU 1 null
model.optimizer     | adamw sgd               | x '' adam 1 null
model.lr            | 0.01 1e-3               | 0 -1 nan inf -inf x [] null ''
model.momentum      | 0.5 0.99                | 1 -1 nan x
model.schedule      | linear cosine           | x '' null
data.rotation data.shift | 0 28 10            | -1 181 nan inf x
data.root           | data ./data data/       | pipe a.yaml nowhere loop empty
data.batch_size     | 7 40                    | 0 -1 60001 x 1.5 nan null 1000000000000000000000
data.val_size       | 0 10                    | -1 60 60000 x 1.5
data.split_seed checkpoint.every_n_steps board.every_n_epochs | 1 3 | -1 x 1.5
seed_everything     | 0 4294967295            | -1 4294967296 x 1.5 nan null true
checkpoint.every_seconds model.weight_decay | 0 0.5 | -1 x
best.mode           | max                     | x '' null
processes.timeout   | 5 86400                 | 0 -1 nan inf 86401 x
trainer.max_epochs  | 1 3                     | 0 -1 -2 x 1.5 nan inf [] ''
trainer.max_steps   | 3 1                     | -2 x 1.5 nan
trainer.accelerator | cpu                     | x tpu
trainer.precision   | 32 32-true 64-true auto | x 8
trainer.logger      | true '{"class_path": "CSVLogger", "init_args": {"save_dir": "."}}' | x
trainer.callbacks   | Timer                   | x LearningRateFinder
trainer.val_check_interval | 1.0 1 0.5        | x -1
trainer.check_val_every_n_epoch trainer.accumulate_grad_batches | 1 2 | x 0 -1
trainer.limit_train_batches trainer.limit_val_batches | 1 | x -1
trainer.default_root_dir | out ./out .        | a.yaml pipe /dev/null loop
config              | a.yaml                  | broken.yaml latin1.yaml unknown.yaml missing.yaml empty pipe loop ''
"""
FLAGS = {
    flag: [shlex.split(cell.replace(r"\n", "\n")) for cell in cells[1:]]
    for cells in (line.split("|") for line in TABLE.strip().splitlines())
    for flag in cells[0].split()
}
LONG = "x" * 300
CHECKPOINTS = ["", "nowhere.ckpt", "empty", "pipe", "loop", "a.yaml", "/dev/zero", "/dev/null", "é", LONG, "\n", "BEST"]
CHECKPOINTS += ["http://x/y.ckpt", "lightning_logs/version_0", "\udcff", "[]", "text.png"]
OUTPUTS = ["", "x", "empty", "old.pt2", "nowhere/x.pt2", "loop/x.pt2", LONG, "\udcff", "x.PT2", "x" * 252 + ".pt2"]
PICTURES = ["", "nowhere.png", "pipe", "loop", "empty", "text.png", "blank.png", LONG, "\udcff", "\n"]


@dataclass
class Case:
    args: list[str]
    bad: bool = False

    def add(self, rng: Random, flag: str, right: list[str], wrong: list[str], share: float = 0.25) -> None:
        bad = bool(wrong) and rng.random() < share
        self.args += [*([flag] if flag else []), rng.choice(wrong if bad else right)]
        self.bad = self.bad or bad


def draw(rng: Random) -> Case:
    command = rng.choices(["fit", "resume", "validate", "test", "predict", "export"], [9, 3, 1, 2, 2, 1])[0]
    case = Case([*FIT] if command == "fit" else ["fit" if command == "resume" else command])
    if command == "fit":
        for flag in rng.sample(list(FLAGS), rng.choice([0, 1, 1, 1, 2, 2, 3])):
            right, wrong = FLAGS[flag]
            case.add(rng, f"--{flag}", right, wrong)
    else:
        if command == "predict" and rng.random() < 0.7:
            case.add(rng, "", ["digit.png", "pictures"], PICTURES, 0.5)
        right = ["best", "last", "lightning_logs/version_0/checkpoints/best.ckpt"]
        case.add(rng, "--ckpt_path", right, CHECKPOINTS, 0.2)
        if command == "resume":
            case.add(rng, "--trainer.max_epochs", ["3"], ["x", "0"])
        if command == "export":
            case.add(rng, "--output", ["out.pt2", "out.onnx"], OUTPUTS, 0.4)
    slip(rng, case)
    return case


def slip(rng: Random, case: Case) -> None:
    """Make a mistake of the form now and then."""
    args, kind = case.args, rng.choices(["", "=", "junk", "unknown", "missing"], [60, 4, 4, 4, 4])[0]
    if kind == "=" and len(args) > 2 and args[-2].startswith("--"):
        args[-2:] = [f"{args[-2]}={args[-1]}"]
    elif kind == "unknown":
        args += [rng.choice(["--nothing", "--trainer.nothing", "--model.nothing.x", "--é"]), "1"]
        case.bad = True
    elif kind == "junk" and args[0] != "predict":  # whose other words are pictures
        args.insert(1, "junk")
        case.bad = True
    elif kind == "missing" and args[0] == "fit":
        args.append(rng.choice(["--model.lr", "--trainer.max_epochs", "--ckpt_path", "--data.root"]))
        case.bad = True


def call(args: list[str], files: dict[str, Any], kill_at: int = 0) -> int:
    """Run a command in a process that knows the tiny data, has no network and not all memory."""
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    socket.getaddrinfo = partial(fail, OSError("there is no network in tests"))
    os.environ["PIP_NO_INDEX"] = "1"
    datasets.FILES = files
    kill_before(kill_at, LitMNIST)
    return main(args)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a finished and a killed run, data, and what else a user may have lying about."""
    folder = tmp_path_factory.mktemp("sandbox") / "work"
    files = write_tiny_mnist(folder / "data" / "MNIST" / "raw", train=60, test=20)
    runs = in_processes(folder, call, (FINISHED, files)) + in_processes(folder, call, (STOPPED, files, 4))
    assert [run.status for run in runs] == [0, -signal.SIGKILL], runs
    for path in folder.glob("lightning_logs/version_0/checkpoints/best-*"):
        path.rename(path.with_name("best.ckpt"))
    contents = {"a.yaml": b"trainer:\n  max_epochs: 1\n", "broken.yaml": b"trainer: [\n", "latin1.yaml": b"a: \xe9\n"}
    contents |= {"unknown.yaml": b"model:\n  nothing: 1\n", "text.png": b"no picture\n", "old.pt2": b"something dear\n"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("pictures", "empty"):
        (folder / name).mkdir()
    (folder / "loop").symlink_to("loop")
    for name in ("blank.png", "digit.png", "pictures/7.png"):
        picture = Image.new("L", (60, 60), 230)
        ImageDraw.Draw(picture).text((20, 12), "" if "blank" in name else "7", fill=20)
        picture.save(folder / name)
    return folder, files


def snapshot(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if "lock" not in path.name and not path.name.startswith(".")]
    hashed = {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}
    return {str(path.relative_to(folder)): digest for path, digest in hashed.items()}


def may_write(path: str, args: list[str]) -> bool:
    """Whether a command that did not refuse its input may write there: in a run, or where the user said."""
    named = [part.partition("=")[2] or part for part in args[1:]]
    if any(part and path.startswith((part.removeprefix("./"), f"{part}/MNIST")) for part in named):
        return True
    return path == "out" or bool(re.match(r"(.*/)?lightning_logs|predictions|pictures-", path))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(CASES))
def test_a_command_line(index: int, sandbox: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    case, folder = draw(Random(f"{SEED} {index}")), tmp_path / "work"
    shutil.copytree(sandbox[0], folder, symlinks=True)
    os.mkfifo(folder / "pipe")
    before = snapshot(folder)
    (outcome,) = in_processes(folder, call, (case.args, sandbox[1]))
    after = snapshot(folder)
    status, shown = outcome.status, f"lit_mnist {shlex.join(case.args)}\n{outcome.err[-3000:]}"
    assert status == 2 * case.bad, shown
    assert not re.search("Traceback|Exception (ignored|in thread)|Fatal Python", outcome.out + outcome.err), shown
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("lit_mnist: error")]
    assert len(errors) == (status > 0), shown
    assert len("".join(errors)) < LONGEST_LINE + sum(map(len, case.args)), shown
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if status == 2:
        about_data = "--data.root" in " ".join(case.args) or "MNIST" in errors[0]  # lists files and sources
        assert len(lines) == 1 or about_data, shown
        assert all(about_data and "MNIST" in path for path in changed), (changed, shown)
    else:
        assert all(may_write(path, case.args) for path in changed), changed
    if status == 0 and case.args[0] == "fit":
        states = [json.loads((folder / path).read_text())["fit"]["state"] for path in changed if "results.json" in path]
        assert set(states) == {"finished"}, shown
