"""What a GPU makes of all this: ten minutes on one card. `--cpu` runs the same code in small on the processor.

tests   the tests that need a GPU: `pytest -m gpu`.
runs    configs/gpu.yaml over the seeds, and each other recipe once, the quickest first: seconds from the first step
        until the last checkpoint is written, within Lightning's Trainer, and test accuracy. gpu.yaml must reach a mean
        of 99.44 % in 3 s, and aims at 1 s.
steps   what each means brings to bare steps of fast.yaml, in turns: bfloat16, a fused optimizer,
        torch.compile, a CUDA graph of the whole step, batches of up to 4096.
busy    of bare steps, by torch's profiler: the time that the GPU is at work, kernels, launches, waits of the host.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, cast

import pandas
import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from records import REPOSITORY, make_parser, measure, print_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import profile
from torch.utils.benchmark import Timer

from lit_mnist.__main__ import main as lit_mnist
from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.data.datamodule import MNISTDataModule
from lit_mnist.module import LitMNIST

CONFIGS = REPOSITORY / "configs"
Options = argparse.Namespace
Record = dict[str, Any]


def results_of(recipe: str, root: Path, accelerator: str, *flags: str, test: bool = False) -> dict[str, Any]:
    """Train a recipe by the command line, test its last checkpoint if asked, and give the run's results.json."""
    config = [] if recipe == "default" else ["--config", str(CONFIGS / f"{recipe}.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        where = ["--trainer.default_root_dir", folder, "--data.root", str(root), "--trainer.accelerator", accelerator]
        fit = ["fit", *config, "--trainer.enable_model_summary", "false", *flags, *where]
        for command in [fit, ["test", "--ckpt_path", "last", *where]][: 1 + test]:
            if status := lit_mnist(command):
                raise SystemExit(status)
        return dict(json.loads(Path(folder, "lightning_logs", "version_0", "results.json").read_text()))


class Watch(Callback):
    """Notes when a fit's first step begins and when its last checkpoint is written; for `--trainer.callbacks`."""

    marks: ClassVar[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.marks[:] = [perf_counter()]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.marks.append(perf_counter())  # every on_train_end is over, that of the checkpoints too


@dataclass(frozen=True)
class Means:
    """How a bare step is taken; the defaults are what `fit` does in float32."""

    batch_size: int = 128
    bf16: bool = False
    fused: bool = False
    compiled: bool = False
    graph: bool = False  # with a fused optimizer, whose learning rate may be a tensor: others would fix it


class Loop:
    """A recipe's network, batches, augmentation, loss, optimizer, changing learning rate and averaged weights.

    No metrics, logs and checkpoints; a step waits for the device only at the beginning of an epoch, for its order.
    """

    def __init__(self, recipe: str, root: Path, device: torch.device, means: Means) -> None:
        self.means, self.device = means, device
        settings: Record = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text()) if recipe != "default" else {}
        torch.manual_seed(1)
        model = LitMNIST(**settings.get("model", {}))
        self.hp = hp = cast(Any, model.hparams)
        network: nn.Module = model.network.to(self.device).train()
        self.forward: Callable[[Tensor], Tensor] = torch.compile(network) if means.compiled else network
        self.rate = torch.tensor(hp.lr, device=self.device)
        weights, others = ([p for p in network.parameters() if (p.ndim > 1) is many] for many in (True, False))
        groups = [{"params": weights, "weight_decay": hp.weight_decay}, {"params": others, "weight_decay": 0.0}]
        chosen = {"nesterov": hp.nesterov, "fused": means.fused or means.graph or None}
        self.optimizer = torch.optim.SGD(groups, self.rate if means.graph else hp.lr, hp.momentum, **chosen)
        self.current = [t.detach() for t in network.state_dict().values() if t.is_floating_point()]
        self.average = [tensor.clone() for tensor in self.current]
        self.update_average = get_ema_multi_avg_fn(hp.ema_decay)
        self.data = MNISTDataModule(**settings.get("data", {}) | {"batch_size": means.batch_size, "val_size": 0})
        images, targets = (tensor.to(device) for tensor in datasets.load(root, train=True))
        self.data.train_batches = TensorBatches(images, targets, min(means.batch_size, len(images)), seed=1)
        self.batches = self.endless()
        self.images, self.targets = (tensor.clone() for tensor in next(self.batches))
        self.steps_taken = 0
        self.graph = self.captured() if means.graph else None

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of one size, as a graph needs them, over one epoch after the other."""
        batches: Any = self.data.train_batches
        for epoch in itertools.count():
            batches.sampler.set_epoch(epoch)
            yield from (self.data.augment(*batch) for batch in batches if len(batch[0]) == batches.part(0)[2])

    def captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is done once happens outside of the graph: momentum, cuDNN's choices, compiling
                self.work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.work()
        return graph

    def work(self) -> None:
        # in a graph, autocast must not keep the cast weights of another step
        cast = torch.autocast(self.device.type, torch.bfloat16, self.means.bf16, cache_enabled=not self.means.graph)
        with torch.enable_grad():
            with cast:
                logits = self.forward(self.images)
                loss = F.cross_entropy(logits, self.targets, label_smoothing=self.hp.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        if self.hp.ema_decay:
            self.update_average(self.average, self.current, 0)

    def step(self) -> None:
        images, targets = next(self.batches)
        self.steps_taken += 1
        rate = self.hp.lr * max(0.1, 1 - self.steps_taken / 2000)
        if self.graph:
            self.rate.fill_(rate)
            self.images.copy_(images)
            self.targets.copy_(targets)
            self.graph.replay()
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.images, self.targets = images, targets
            self.work()

    def milliseconds(self, steps: int) -> float:
        """Time a step, as the mean over some of them; torch's Timer waits for the device before and after."""
        timer = Timer("loop.step()", globals={"loop": self}, num_threads=torch.get_num_threads())
        return 1000 * timer.timeit(steps).mean


def tests(options: Options) -> Iterator[Record]:
    chosen = ["-k", "processors_batches and cpu"] if options.cpu else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rs", "--tb=short", *chosen, "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout[-6000:])
    yield {"status": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1]}
    done.check_returncode()


def runs(options: Options) -> Iterator[Record]:
    """The first run of a process, which waits for libraries to be loaded, is not counted."""
    others = "fast", "default", "tiny", "record", "nano", "best", "seed"
    seeds = [*(("gpu", number) for number in range(options.seeds + 1)), *((name, 1) for name in others)]
    for recipe, seed in seeds:
        flags = ["--seed_everything", str(seed), "--trainer.callbacks", f"{__name__}.Watch"]
        if options.cpu:
            flags += ["--trainer.max_steps", "4", "--data.batch_size", "64", "--data.val_size", "0"]
        with redirect_stdout(StringIO()):
            results = results_of(recipe, options.root, "cpu" if options.cpu else "gpu", *flags, test=True)
        fit, seconds, accuracy = results["fit"], Watch.marks[-1] - Watch.marks[0], results["test"][-1]["test/accuracy"]
        print(f"{recipe:<8} seed {seed}: {fit['steps']:,} steps, {seconds:.2f} s, {100 * accuracy:.2f} %", flush=True)
        record = {key: fit[key] for key in ("epochs", "steps", "parameters", "train_seconds", "validation_seconds")}
        record |= {"precision": fit["settings"]["trainer.precision"], "test_accuracy": accuracy}
        yield {"recipe": recipe, "seed": seed, "warms_up": not seed, "wall_seconds": seconds, **record}


VARIANTS = {
    "float32, batches of 128": Means(),
    "bfloat16": Means(bf16=True),
    "fused optimizer": Means(fused=True),
    "torch.compile": Means(compiled=True),
    "CUDA graph": Means(graph=True),
    "bfloat16, torch.compile, CUDA graph": Means(bf16=True, compiled=True, graph=True),
    **{f"batches of {size}": Means(size) for size in (256, 1024, 4096)},
    **{f"{size}, bfloat16, CUDA graph": Means(size, bf16=True, graph=True) for size in (128, 512, 1024, 2048, 4096)},
}


def steps(options: Options) -> Iterator[Record]:
    count, rounds = (2, 1) if options.cpu else (100, 5)
    loops: dict[str, Loop] = {}
    for name, means in VARIANTS.items():
        if options.cpu and (means.graph or means.compiled or means.batch_size > 256):  # compiling takes half a minute
            continue
        try:
            loop = Loop("fast", options.root, options.device, means)
            loop.milliseconds(count)  # also compiles
            loops[name] = loop
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
    taken = pandas.DataFrame({name: loop.milliseconds(count) for name, loop in loops.items()} for _ in range(rounds))
    print_rows("a bare step of fast.yaml, ms", taken, ".3f")
    failed = [name for name in VARIANTS if name not in loops]
    yield {"recipe": "fast", "milliseconds": taken.to_dict("list"), "failed": failed}


def counts(profiler: profile, steps: int) -> Record:
    """Count what a step has of a profile's events, and round for printing."""
    events = list(profiler.key_averages())
    annotations = {event.key for event in events if event.is_user_annotation}  # an optimizer's: on both devices
    there = [e for e in events if e.device_type.name == "CUDA" and e.key not in annotations]
    here = {e.key: e.count / steps for e in events if e.device_type.name == "CPU"}
    return {
        "busy_milliseconds": round(sum(event.self_device_time_total for event in there) / 1000 / steps, 4),
        "kernels": sum(event.count for event in there) / steps,
        "launches": sum(count for key, count in here.items() if "LaunchKernel" in key or "GraphLaunch" in key),
        "waits": sum(count for key, count in here.items() if key.endswith(("StreamSynchronize", "EventSynchronize"))),
    }


def busy(options: Options) -> Iterator[Record]:
    """The busy share is the GPU's time in a profiled step, over a step that was not profiled: that slows the host."""
    count = 1 if options.cpu else 30
    for recipe, size in (("fast", 128), ("record", 128), ("gpu", 512)):
        for means in [Means(size), Means(size, bf16=True, graph=True)][: 1 if options.cpu else 2]:
            loop = Loop(recipe, options.root, options.device, means)
            values = {"milliseconds": round(loop.milliseconds(count), 4)}
            with profile() as profiler:
                for _ in range(count):
                    loop.step()
                loop.images.sum().item()  # waits for the device
            values |= counts(profiler, count)
            yield {"recipe": recipe, "means": asdict(means), "steps": count, **values}
            print(recipe, size, "bfloat16, CUDA graph" if means.graph else "float32", values, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "gpu")
    parser.add_argument("--cpu", action="store_true", help="the same code in small on the processor")
    parser.add_argument("--seeds", type=int, default=10, help="runs of gpu.yaml (10)")
    cpu = "--cpu" in (sys.argv if arguments is None else arguments)
    if not (cpu or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --cpu runs the same code in small on the processor")
    parser.set_defaults(device=torch.device("cpu" if cpu else "cuda"), record=not cpu)
    return measure(parser, {part.__name__: part for part in (tests, runs, steps, busy)}, arguments)


if __name__ == "__main__":
    sys.exit(main())
