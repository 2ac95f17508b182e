"""What a GPU makes of all this: ten minutes on one card, of which nothing has been measured yet.

    python benchmarks/gpu.py                   # everything; each result is appended to results/gpu.jsonl at once
    python benchmarks/gpu.py steps busy        # some of it
    python benchmarks/gpu.py --cpu             # the same code on the processor, in small, without records

tests     the tests that need a GPU: `pytest -m gpu`.
target    configs/gpu.yaml over the seeds: seconds from the first step's beginning until the last checkpoint is written,
          within Lightning's Trainer, and the mean test accuracy against 99.44 %. It must take 3 s, and aims at 1 s.
fast      the same of configs/fast.yaml.
busy      of some recipes, by bare steps and by `fit`: milliseconds a step; and by torch's profiler the time that the
          GPU is at work in a step, its kernels, and how often the host launches or waits.
steps     what each means brings to bare steps of fast.yaml: bfloat16, channels_last, a fused optimizer, torch.compile,
          a CUDA graph of the whole step, batches of up to 4096; in milliseconds and images a second, in turns.
recipes   the seconds, validation included, and test accuracy of each recipe, one seed, the shortest first.

A bare step has the recipe's network, batches, augmentation, loss, optimizer, changing learning rate and averaged
weights, without metrics, logs and checkpoints. Runs that would not fit into the `--minutes` are left out. What fails is
reported in a line, the rest goes on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from records import RESULTS, append
from speed import REPOSITORY, row, table, tested_run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile

from lit_mnist import LitMNIST, MNISTDataModule
from lit_mnist.__main__ import main as lit_mnist
from lit_mnist.cli.cli import DEFAULT_EPOCHS
from lit_mnist.cli.settings import quickest_precision
from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.exact.checkpoints import LastCheckpoint
from lit_mnist.exact.conditions import conditions
from lit_mnist.network import NETWORKS

TARGET = 0.9944  # the baseline's test accuracy
MUST, AIM = 3.0, 1.0  # seconds
TRAINING_IMAGES = 60_000
Record = dict[str, Any]


@dataclass
class Bench:
    """What all parts share.

    Args:
        root: folder of the data.
        device: where it runs; a processor does everything in small.
        seeds: runs of a recipe over which its mean is taken.
        deadline: when to begin nothing more, by `perf_counter`.
        pace: seconds a step of the latest run, by which the next is judged.
    """

    root: str
    device: torch.device
    seeds: int
    deadline: float
    pace: float = 0.004  # a guess, until there was one

    @property
    def small(self) -> bool:
        return self.device.type == "cpu"

    @property
    def accelerator(self) -> str:
        return "cpu" if self.small else "gpu"

    def has_time(self, seconds: float, what: str) -> bool:
        left = self.deadline - perf_counter()
        if self.small or seconds <= left:
            return True
        print(f"left out: {what}, which may take {seconds:.0f} s, of {max(0.0, left):.0f} s that are left")
        return False

    def expected(self, recipe: str) -> float:
        """Seconds that a run of it may take, with its start and its test."""
        return 5 + 1.3 * steps_of(recipe) * self.pace

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tests(bench: Bench) -> Iterator[Record]:
    """On a processor one of them stands for all: they are its test suite's, too."""
    chosen = ["-k", "batches_weights and cpu"] if bench.small else ["-m", "gpu"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        flags = ["-p", "no:cacheprovider", "-rs", "--tb=short", f"--junitxml={report}", "tests/test_gpu.py"]
        command = [sys.executable, "-m", "pytest", *chosen, *flags]
        left = max(30.0, bench.deadline - perf_counter())
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=left)
        if not report.exists():
            raise RuntimeError(f"pytest gave no report: {last_line(done.stderr or done.stdout)}")
        suite = ElementTree.parse(report).find("testsuite")
        assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name", "") for case in suite.iter("testcase") if {"failure", "error"} & {e.tag for e in case}]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    print(f"\ntests on the device: {passed} passed, {len(failed)} failed, {counts['skipped']} skipped")
    yield {"passed": passed, "failed": failed, "skipped": counts["skipped"], "seconds": float(suite.get("time", 0))}
    if failed:
        print(done.stdout[-6000:])
        raise RuntimeError(f"{len(failed)} tests failed: {', '.join(failed)}")
    if not passed:
        raise RuntimeError("no test was run")


def settings_of(recipe: str) -> dict[str, Any]:
    """Those of a recipe's file; none of the default's."""
    if recipe == "default":
        return {}
    return dict(yaml.safe_load((REPOSITORY / "configs" / f"{recipe}.yaml").read_text()))


def flags_of(recipe: str, bench: Bench) -> list[str]:
    flags = [] if recipe == "default" else ["--config", str(REPOSITORY / "configs" / f"{recipe}.yaml")]
    small = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--data.val_size", "0"]
    return [*flags, *(small if bench.small else [])]


def steps_of(recipe: str) -> int:
    settings = settings_of(recipe)
    data, defaults = settings.get("data", {}), MNISTDataModule().hparams
    images = TRAINING_IMAGES - data.get("val_size", defaults["val_size"])
    epochs = settings.get("trainer", {}).get("max_epochs", DEFAULT_EPOCHS)
    return int(epochs * math.ceil(images / data.get("batch_size", defaults["batch_size"])))


@contextmanager
def wall_clock(bench: Bench, marks: list[float]) -> Iterator[None]:
    """Append when the first step of a fit begins, and when its last checkpoint is written."""
    step, end = LitMNIST.training_step, LastCheckpoint.on_train_end

    def begin(self: LitMNIST, batch: Any, batch_idx: int) -> Tensor:
        if not marks:
            marks.append(perf_counter())
        return step(self, batch, batch_idx)

    def finish(self: LastCheckpoint, trainer: Trainer, pl_module: LightningModule) -> None:
        end(self, trainer, pl_module)
        bench.synchronize()
        marks.append(perf_counter())

    LitMNIST.training_step, LastCheckpoint.on_train_end = begin, finish  # type: ignore[method-assign]
    try:
        yield
    finally:
        LitMNIST.training_step, LastCheckpoint.on_train_end = step, end  # type: ignore[method-assign]


def timed_run(bench: Bench, recipe: str, seed: int) -> Record:
    marks: list[float] = []
    with wall_clock(bench, marks), redirect_stdout(StringIO()):
        results = tested_run(flags_of(recipe, bench), seed, bench.root, bench.accelerator)
    fit = results["fit"]
    seconds = marks[-1] - marks[0]
    bench.pace = seconds / fit["steps"]
    record = {name: fit[name] for name in ("epochs", "steps", "parameters", "train_seconds", "validation_seconds")}
    record |= {"precision": fit["settings"]["trainer.precision"], "wall_seconds": seconds}
    record |= {"test_accuracy": results["test"]["test/accuracy"]}
    print(f"{recipe:<12} seed {seed}: {seconds:.2f} s, {100 * record['test_accuracy']:.2f} %")
    return {"recipe": recipe, "seed": seed, **record}


def over_seeds(bench: Bench, recipe: str) -> Iterator[Record]:
    """The first run of a process, which waits for libraries to be loaded, is not counted."""
    print(f"\n{recipe}.yaml, {bench.seeds} seeds")
    if not bench.has_time(10 + bench.expected(recipe), recipe):
        return
    yield timed_run(bench, recipe, 1) | {"warms_up": True}
    runs: list[Record] = []
    for seed in range(1, bench.seeds + 1):
        if bench.has_time(bench.expected(recipe), f"{recipe}, seed {seed}"):
            runs.append(timed_run(bench, recipe, seed))
            yield runs[-1]
    if not runs:
        return
    accuracies, seconds = ([run[key] for run in runs] for key in ("test_accuracy", "wall_seconds"))
    table(f"{recipe}.yaml, {len(runs)} seeds, {runs[0]['steps']} steps")
    row("first step to last checkpoint, seconds", seconds)
    row("training by the run's own clock, seconds", [run["train_seconds"] for run in runs])
    row("test accuracy, %", [100 * accuracy for accuracy in accuracies])
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    print(f"mean test accuracy {100 * statistics.mean(accuracies):.3f}{spread} %, n = {len(runs)}")


def target(bench: Bench) -> Iterator[Record]:
    runs = []
    for run in over_seeds(bench, "gpu"):
        yield run
        runs += [] if "warms_up" in run else [run]
    if not runs or bench.small:
        print("skipped on a processor: the comparison with the target" if bench.small else "nothing to compare")
        return
    mean = statistics.mean(run["test_accuracy"] for run in runs)
    seconds = statistics.median(run["wall_seconds"] for run in runs)
    print(f"the mean is {'at least' if mean >= TARGET else 'below'} {100 * TARGET:.2f} %")
    for name, bound in (("must", MUST), ("aim", AIM)):
        print(f"{name}: {bound:.0f} s, {'reached' if mean >= TARGET and seconds <= bound else 'missed'}")


def fast(bench: Bench) -> Iterator[Record]:
    return over_seeds(bench, "fast")


def recipes(bench: Bench) -> Iterator[Record]:
    names = [path.stem for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem not in ("smoke", "ddp")]
    runs: list[Record] = []
    print("\neach recipe, one seed, the shortest first")
    for name in sorted(["default", *names], key=steps_of):
        if bench.has_time(bench.expected(name), name):
            runs.append(timed_run(bench, name, 1))
            yield runs[-1]
    print(f"\n{'each recipe':<20}{'parameters':>12}{'steps':>9}{'seconds':>10}{'ms a step':>11}{'test, %':>10}")
    for run in runs:
        step = 1000 * run["wall_seconds"] / run["steps"]
        print(
            f"{run['recipe']:<20}{run['parameters']:>12,}{run['steps']:>9,}{run['wall_seconds']:>10.2f}{step:>11.2f}"
            f"{100 * run['test_accuracy']:>10.2f}"
        )


@dataclass(frozen=True)
class Means:
    """How a bare step is taken; the defaults are what `fit` does in float32."""

    batch_size: int = 128
    bf16: bool = False
    contiguous: bool = False
    fused: bool = False
    compiled: bool = False
    graph: bool = False  # with a fused optimizer, whose learning rate may be a tensor: others would fix it


class Loop:
    """Training without Lightning, whose steps do not wait for the device, but for the order of an epoch.

    Args:
        recipe: the settings of its file.
        images: uint8 (N, 1, 28, 28), on the device.
        targets: int64 (N,), there too.
    """

    def __init__(self, recipe: Mapping[str, Any], images: Tensor, targets: Tensor, means: Means) -> None:
        self.means, self.device = means, images.device
        torch.manual_seed(1)
        hp: Any = LitMNIST(**recipe.get("model", {})).hparams
        self.hp = hp
        layout = torch.contiguous_format if means.contiguous else torch.channels_last
        network = NETWORKS[hp.network](hp.layers, hp.dropout, hp.activation, hp.classes)
        self.network: nn.Module = network.to(self.device).to(memory_format=layout).train()
        self.forward: Callable[[Tensor], Tensor] = torch.compile(network) if means.compiled else network
        fused = means.fused or means.graph
        self.rate: float | Tensor = torch.tensor(hp.lr, device=self.device) if means.graph else hp.lr
        parameters = list(network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": hp.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        chosen = {"fused": True} if fused else {}
        self.optimizer = torch.optim.SGD(groups, lr=self.rate, momentum=hp.momentum, nesterov=hp.nesterov, **chosen)
        self.current = [t.detach() for t in (*parameters, *network.buffers()) if t.is_floating_point()]
        self.average = [tensor.clone() for tensor in self.current]
        self.average_moves = get_ema_multi_avg_fn(hp.ema_decay) if hp.ema_decay else None
        own = {key: value for key, value in recipe.get("data", {}).items() if key not in ("batch_size", "val_size")}
        self.data = MNISTDataModule(batch_size=means.batch_size, val_size=0, **own)
        self.data.train_batches = TensorBatches(images, targets, means.batch_size, seed=1)
        self.batches = self.endless()
        self.images, self.targets = (tensor.clone() for tensor in next(self.batches))
        self.steps_taken = 0
        self.graph = self.captured() if means.graph else None

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of one size, as a graph wants them, over one epoch after the other."""
        batches, epoch = self.data.train_batches, 0
        while True:
            batches.sampler.set_epoch(epoch)
            for batch in batches:
                if len(batch[0]) == self.means.batch_size:
                    yield self.data.augment(*batch)
            epoch += 1

    def captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # outside of the graph what is done once is done: momentum, cuDNN's choices, compiling
                self.work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.work()
        return graph

    def work(self) -> None:
        # the weights that autocast keeps cast must not be those of another step, outside of the graph
        cast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.means.bf16, cache_enabled=not self.means.graph
        )
        with torch.enable_grad():
            with cast:
                logits = self.forward(self.images)
                loss = F.cross_entropy(logits, self.targets, label_smoothing=self.hp.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        if self.average_moves:
            self.average_moves(self.average, self.current, 0)

    def step(self) -> None:
        images, targets = next(self.batches)
        self.steps_taken += 1
        rate = self.hp.lr * max(0.1, 1 - self.steps_taken / 2000)
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        if self.graph:
            self.images.copy_(images)
            self.targets.copy_(targets)
            self.graph.replay()
        else:
            self.images, self.targets = images, targets
            self.work()

    def milliseconds(self, bench: Bench, steps: int) -> float:
        """Of a step, over some of them."""
        bench.synchronize()
        started = perf_counter()
        for _ in range(steps):
            self.step()
        bench.synchronize()
        return 1000 * (perf_counter() - started) / steps


def all_images(bench: Bench) -> tuple[Tensor, Tensor]:
    images, targets = datasets.load(bench.root, train=True)
    return images.to(bench.device), targets.to(bench.device)


ALONE = {
    "float32, channels_last, batches of 128": Means(),
    "bfloat16": Means(bf16=True),
    "contiguous": Means(contiguous=True),
    "fused optimizer": Means(fused=True),
    "torch.compile": Means(compiled=True),
    "CUDA graph": Means(graph=True),
    "bfloat16, CUDA graph": Means(bf16=True, graph=True),
    "bfloat16, contiguous, CUDA graph": Means(bf16=True, contiguous=True, graph=True),
    "bfloat16, torch.compile, CUDA graph": Means(bf16=True, compiled=True, graph=True),
}
SIZES = {
    f"batches of {size}{name}": Means(batch_size=size, **means)
    for size in (256, 512, 1024, 2048, 4096)
    for name, means in (("", {}), (", bfloat16, CUDA graph", {"bf16": True, "graph": True}))
}


def steps(bench: Bench) -> Iterator[Record]:
    count, rounds = (2, 1) if bench.small else (100, 5)
    data = all_images(bench)
    loops: dict[str, Loop] = {}
    wrong = 0
    for name, means in {**ALONE, **SIZES}.items():
        if bench.small and (means.graph or means.compiled or means.batch_size > 256):  # compiling takes half a minute
            print(f"skipped on a processor: {name}")
        elif bench.has_time(60 if means.compiled else 10, name):
            try:
                loop = Loop(settings_of("fast"), *data, means)
                loop.milliseconds(bench, 2 if bench.small else 20)  # also compiles
                loops[name] = loop
            except Exception as error:
                wrong += 1
                print(f"{name} failed: {last_line(str(error)) or type(error).__name__}")
    milliseconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        if not bench.has_time(count * len(loops) * bench.pace, f"round {number + 1} of the steps"):
            break
        taken = {name: loop.milliseconds(bench, count) for name, loop in loops.items()}
        for name, value in taken.items():
            milliseconds[name].append(value)
        means_of = {name: asdict(loop.means) for name, loop in loops.items()}
        yield {"recipe": "fast", "round": number, "steps": count, "milliseconds": taken, "means": means_of}
    if any(milliseconds.values()):
        table(f"a bare step of fast.yaml, {count} steps, ms")
        for name, values in milliseconds.items():
            row(name, values, ".3f")
        table("images a second")
        for name, values in milliseconds.items():
            row(name, [1000 * loops[name].means.batch_size / value for value in values], ",.0f")
    if wrong:
        raise RuntimeError(f"{wrong} of {len(ALONE) + len(SIZES)} could not be measured")


def activities(bench: Bench) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] if bench.small else [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of all of them together, what overlaps counted once."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def counted(profiler: profile, steps: int) -> Record:
    """What a step has of a profile's events."""
    events = list(profiler.events() or [])
    annotations = {event.name for event in events if event.is_user_annotation}  # an optimizer's: on both devices
    there = [e for e in events if e.device_type.name == "CUDA" and e.name not in annotations]
    copies = [event for event in there if event.name.startswith(("Memcpy", "Memset"))]
    here = [event.name for event in events if event.device_type.name == "CPU"]
    spans = [(event.time_range.start, event.time_range.end) for event in there]  # microseconds
    return {
        "operations": sum(name.startswith("aten::") for name in here) / steps,
        "busy_milliseconds": union(spans) / 1000 / steps,
        "kernels": (len(there) - len(copies)) / steps,
        "copies": len(copies) / steps,
        "launches": sum("LaunchKernel" in name or "GraphLaunch" in name for name in here) / steps,
        "waits": sum(name.endswith(("StreamSynchronize", "EventSynchronize")) for name in here) / steps,
    }


def bare_profile(bench: Bench, loop: Loop, count: int) -> Record:
    loop.milliseconds(bench, count)  # warms up
    milliseconds = loop.milliseconds(bench, count)
    with profile(activities=activities(bench)) as profiler:
        loop.milliseconds(bench, count)
    return {"milliseconds": milliseconds, **counted(profiler, count)}


def fit_profile(bench: Bench, recipe: str, count: int) -> Record:
    """Of `fit`: COUNT steps for the clock, then as many for the profiler, after as many to warm up."""
    original, taken, marks = LitMNIST.training_step, [0], []
    profiler = profile(activities=activities(bench))

    def step(self: LitMNIST, batch: Any, batch_idx: int) -> Tensor:
        if taken[0] in (count, 2 * count, 3 * count):
            bench.synchronize()
            marks.append(perf_counter())
            if taken[0] == 2 * count:
                profiler.start()
            if taken[0] == 3 * count:
                profiler.stop()
        taken[0] += 1
        return original(self, batch, batch_idx)

    # within one epoch, and without the scalars and checkpoints for which it waits now and then
    flags = [
        *flags_of(recipe, bench),
        "--trainer.accelerator",
        bench.accelerator,
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        str(3 * count + 1),
    ]
    flags += ["--trainer.log_every_n_steps", "100000", "--checkpoint.every_seconds", "3600"]
    flags += ["--trainer.enable_model_summary", "false", "--board.every_n_epochs", "0", "--data.val_size", "0"]
    LitMNIST.training_step = step  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            if status := lit_mnist(["fit", *flags, "--data.root", bench.root, "--trainer.default_root_dir", folder]):
                raise SystemExit(status)
    finally:
        LitMNIST.training_step = original  # type: ignore[method-assign]
    if len(marks) < 3:
        raise RuntimeError(f"an epoch of {recipe} has {taken[0]} steps, of {3 * count + 1} that are needed")
    return {"milliseconds": 1000 * (marks[1] - marks[0]) / count, **counted(profiler, count)}


def busy(bench: Bench) -> Iterator[Record]:
    """The share is the GPU's time in a profiled step, over that of a step that was not: the profiler slows the host."""
    count = 1 if bench.small else 30
    data = all_images(bench)
    rows: dict[str, Record] = {}
    for recipe in ("fast", "record", "gpu"):
        settings = settings_of(recipe)
        auto = settings.get("trainer", {}).get("precision") == "auto"
        bf16 = auto and quickest_precision(bench.device.type)[0] == "bf16-mixed"
        size = min(settings["data"]["batch_size"], len(data[0]) // 2)
        means = {"bare": Means(size, bf16), "bare, CUDA graph": Means(size, bf16, graph=True)}
        for name, chosen in means.items():
            if bench.small and chosen.graph:
                print(f"skipped on a processor: {recipe}, {name}")
            elif bench.has_time(15, f"{recipe}, {name}"):
                rows[f"{recipe}, {name}"] = bare_profile(bench, Loop(settings, *data, chosen), count)
                yield {"recipe": recipe, "by": name, "steps": count, **rows[f"{recipe}, {name}"]}
        if len(data[0]) <= 3 * count * settings["data"]["batch_size"]:
            print(f"skipped: {recipe}, fit: its epochs are too short on this data")
        elif bench.has_time(15, f"{recipe}, fit"):
            rows[f"{recipe}, fit"] = fit_profile(bench, recipe, count)
            yield {"recipe": recipe, "by": "fit", "steps": count, **rows[f"{recipe}, fit"]}
    titles = ("ms", "GPU, ms", "busy, %", "kernels", "copies", "launches", "waits", "aten")
    print(f"\n{'a step':<28}" + "".join(f"{title:>10}" for title in titles))
    for name, values in rows.items():
        share = 100 * values["busy_milliseconds"] / values["milliseconds"]
        there = [f"{values['busy_milliseconds']:.3f}", f"{share:.1f}"]
        there += [f"{values[key]:.1f}" for key in ("kernels", "copies", "launches", "waits")]
        there = ["-"] * len(there) if bench.small else there
        shown = [f"{values['milliseconds']:.3f}", *there, f"{values['operations']:.1f}"]
        print(f"{name:<28}" + "".join(f"{text:>10}" for text in shown))
    if bench.small:
        print("skipped on a processor: the time, kernels, copies, launches and waits of a GPU")


PARTS: dict[str, Callable[[Bench], Iterator[Record]]] = {
    "tests": tests,
    "target": target,
    "fast": fast,
    "busy": busy,
    "steps": steps,
    "recipes": recipes,
}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def where(device: torch.device) -> Record:
    found = conditions(device)
    if device.type == "cuda":
        found["hardware"]["memory"] = torch.cuda.get_device_properties(device).total_memory
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["tf32"] = torch.backends.cudnn.allow_tf32  # of convolutions in float32
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts.

    Returns:
        The exit status: 1 where one of them failed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--cpu", action="store_true", help="in small on the processor, without records")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing that would end later (10)")
    parser.add_argument("--seeds", type=int, default=10, help="runs of gpu.yaml and fast.yaml (10)")
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    settings = parser.parse_args(arguments)
    if unknown := set(settings.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not (settings.cpu or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --cpu runs the same code in small on the processor")
    device = torch.device("cpu" if settings.cpu else "cuda")
    records = argparse.Namespace(record=not settings.cpu, records=RESULTS / "gpu.jsonl")
    root = str(Path(settings.root).resolve())
    datasets.prepare(root)
    bench = Bench(root, device, 1 if settings.cpu else settings.seeds, perf_counter() + 60 * settings.minutes)
    conditions_here = where(device)
    failed = []
    for name in settings.parts or PARTS:
        started = perf_counter()
        try:
            for record in PARTS[name](bench):
                append(records, {"measure": name, **record}, conditions_here)
        except (Exception, SystemExit) as error:
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {last_line(str(error))}", file=sys.stderr)
        print(f"({name}: {perf_counter() - started:.0f} s)", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
