"""What the time goes into: against the baseline's own loop, a bare loop, the bare imports and the processor's peak.

    python benchmarks/speed.py                       # all eight, on a quiet machine
    python benchmarks/speed.py target --rounds 20    # one of them

target    seconds of training with configs/fast.yaml to its last epoch, and its test accuracy, against the
          baseline's 20 epochs by a loop as its author would have written it: DataLoader, ToTensor and Normalize,
          plain PyTorch. Each round is one epoch of the baseline, with its scoring of the test set, and one whole run
          of ours.
epochs    seconds of an epoch of each recipe.
overhead  training by `fit`, with its metrics, scalars and checkpoints, over a bare loop with the same network, batches,
          augmentation, optimizer, schedule and averaged weights (torch's AveragedModel), and without these.
augment   the augmentation's share of a step of the bare loop.
board     what TensorBoard's pictures, curves of each digit, norms and graph take of a run of the default.
startup   from the start of `python -m lit_mnist fit` until its first step, over importing the packages that it uses.
peak      layer by layer, where a step's time goes, and what share of the processor's peak each reaches: of a large
          matrix product in its fastest number format.
predict   images a second: the network alone, and the command with its CSV.

What is compared takes turns within one run, because timings on shared machines drift. Prints tables; with `--record`
every value is appended with its conditions to results/speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from records import add_flag, append
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from lit_mnist import LitMNIST, MNISTDataModule
from lit_mnist.__main__ import main as lit_mnist
from lit_mnist.board import TrainingBoard, ValidationBoard
from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.network import MEAN, STD

REPOSITORY = Path(__file__).parent.parent
QUIET = ["--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]
BASELINE_EPOCHS = 20


def row(name: str, values: list[float], form: str = ".2f") -> None:
    median, low, high = statistics.median(values), min(values), max(values)
    print(f"{name:<44}" + "".join(f"{format(number, form):>12}" for number in (median, low, high)))


def table(title: str) -> None:
    print(f"\n{title:<44}{'median':>12}{'lowest':>12}{'highest':>12}")


class Baseline(nn.Module):
    """The course solution's design in plain PyTorch: 15,610 parameters, as configs/seed.yaml."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, width: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            return [convolution, nn.ReLU(), nn.BatchNorm2d(width), nn.Dropout(0.05)]

        self.features = nn.Sequential(
            *(*block(1, 16), *block(16, 16), *block(16, 16), nn.MaxPool2d(2)),
            *(*block(16, 16), *block(16, 16), *block(16, 16), nn.MaxPool2d(2)),
            *(*block(16, 24), nn.AvgPool2d(7), nn.Conv2d(24, 10, 1)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.log_softmax(self.features(images).flatten(1), dim=1)


def baseline_epochs(root: str) -> Iterator[tuple[float, float]]:
    """Train as the course solution does; after each epoch give its seconds, scoring included, and its test accuracy."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    train_loader = DataLoader(datasets.MNIST(root, transform=transform), 64, shuffle=True)
    test_loader = DataLoader(datasets.MNIST(root, train=False, transform=transform), 64)
    torch.manual_seed(1)
    model = Baseline()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        started = perf_counter()
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(images), targets)
            loss.backward()
            optimizer.step()
        model.eval()
        correct, test_loss = 0, 0.0
        with torch.no_grad():
            for images, targets in test_loader:
                output = model(images)
                test_loss += F.nll_loss(output, targets, reduction="sum").item()
                correct += int((output.argmax(dim=1) == targets).sum())
        yield perf_counter() - started, correct / len(test_loader.dataset)  # type: ignore[arg-type]


def tested_run(flags: list[str], seed: int, root: str, accelerator: str) -> dict[str, Any]:
    """The results of a run with these flags, its last checkpoint tested."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--trainer.default_root_dir", folder, "--data.root", root, "--trainer.accelerator", accelerator]
        fit = ["fit", *flags, "--seed_everything", str(seed), "--trainer.enable_model_summary", "false", *places]
        for command in (fit, ["test", "--ckpt_path", "last", *places]):
            if status := lit_mnist(command):
                raise SystemExit(status)
        return dict(json.loads(Path(folder, "lightning_logs", "version_0", "results.json").read_text()))


def target(root: str, rounds: int) -> dict[str, Any]:
    flags = ["--config", str(REPOSITORY / "configs" / "fast.yaml")]
    theirs, ours = [], []
    for seed, (epoch, accuracy) in zip(range(1, rounds + 1), baseline_epochs(root), strict=False):
        theirs.append({"epoch_seconds": epoch, "test_accuracy": accuracy})
        result = tested_run(flags, seed, root, "cpu")
        ours.append({"train_seconds": result["fit"]["train_seconds"], **result["test"]})
    seconds, epoch_seconds = [r["train_seconds"] for r in ours], [r["epoch_seconds"] for r in theirs]
    ratios = [BASELINE_EPOCHS * b / a for a, b in zip(seconds, epoch_seconds, strict=True)]
    table(f"to the target, {rounds} rounds")
    row("fast.yaml, seconds of training", seconds)
    row("fast.yaml, test accuracy %", [100 * r["test/accuracy"] for r in ours])
    row("the baseline, seconds an epoch", epoch_seconds)
    row(f"{BASELINE_EPOCHS} epochs of it / ours, within a round", ratios, ".1f")
    print(f"mean test accuracy of ours: {100 * statistics.mean(r['test/accuracy'] for r in ours):.2f} %")
    return {"ours": ours, "baseline": theirs, "median_ratio": statistics.median(ratios)}


@contextmanager
def folder_of_runs() -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield ["--trainer.default_root_dir", folder]


def bare_data(root: str, **augmentation: float) -> MNISTDataModule:
    """The default's data without a Trainer, with its own augmentation or another."""
    data = MNISTDataModule(root, val_size=0, **augmentation)  # type: ignore[arg-type]  # of other arguments
    data.setup("fit")
    data.train_dataloader()  # which `train_batches` is then
    return data


def bare_steps(
    model: LitMNIST, data: MNISTDataModule, batches: Iterator[tuple[Tensor, Tensor]], steps: int
) -> Iterator[float]:
    """Train without Lightning: the same network, batches, augmentation, optimizer, schedule and averaged weights.

    Gives the seconds of each step, its batch included.

    Args:
        batches: an iterator over those of `data`.
    """
    hp: Any = model.hparams
    weights = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights[0], "weight_decay": hp.weight_decay}, {"params": weights[1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=hp.lr, momentum=hp.momentum, nesterov=hp.nesterov)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, 0.1 + step / steps))
    averaged = None
    if hp.ema_decay:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(hp.ema_decay), use_buffers=True)
    model.train()
    for _ in range(steps):
        with torch.enable_grad():
            started = perf_counter()
            images, targets = data.augment(*next(batches))
            loss = F.cross_entropy(model.network(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if averaged:
                averaged.update_parameters(model)
            seconds = perf_counter() - started
        yield seconds


def overhead(root: str, rounds: int, steps: int = 250) -> dict[str, Any]:
    """Steps of both take turns: whenever the Trainer asks for a batch, the bare loop takes a step first."""
    flags = ["--data.root", root, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", str(steps), *QUIET]
    flags += ["--data.val_size", "0", "--board.every_n_epochs", "0"]  # the board has a measure of its own
    original = TensorBatches.__iter__
    data = bare_data(root)
    recipes = {"the default": LitMNIST().hparams["ema_decay"], "without averaged weights": 0.0}
    seconds: dict[str, dict[str, list[float]]] = {name: {"fit": [], "bare": []} for name in recipes}
    for number in range(rounds + 1):
        for name, decay in recipes.items():
            theirs: list[float] = []
            ours: list[float] = []
            loop = bare_steps(LitMNIST(ema_decay=decay), data, original(data.train_batches), steps + 2)

            def in_turns(
                self: TensorBatches, loop: Any = loop, ours: Any = ours, theirs: Any = theirs
            ) -> Iterator[Any]:
                iterator, given = original(self), 0.0
                while True:
                    batch = next(iterator, None)
                    if batch is None:
                        return
                    if given:
                        ours.append(perf_counter() - given)
                    theirs.append(next(loop))
                    given = perf_counter()
                    yield batch

            TensorBatches.__iter__ = in_turns  # type: ignore[method-assign]
            try:
                with folder_of_runs() as where:
                    lit_mnist(["fit", *flags, *where, "--model.ema_decay", str(decay)])
            finally:
                TensorBatches.__iter__ = original  # type: ignore[method-assign]
            if number:  # the first round warms up
                seconds[name]["bare"].append(sum(theirs[: len(ours)]))
                seconds[name]["fit"].append(sum(ours))
    table(f"the Trainer's cost, {steps} steps")
    for name, values in seconds.items():
        row(f"{name}: fit, seconds", values["fit"])
        row(f"{name}: bare loop, seconds", values["bare"])
        ratios = [a / b for a, b in zip(values["fit"], values["bare"], strict=True)]
        row(f"{name}: ratio within a round", ratios, ".3f")
    return {"seconds": seconds}


def stopwatch(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The same function, which also appends the seconds of each call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(perf_counter() - started)

    return run


def augment(root: str, rounds: int, steps: int = 100) -> dict[str, Any]:
    shares, milliseconds = [], []
    for number in range(rounds + 1):
        data = bare_data(root, rotation=8.0, shift=1.5, scale=0.08)
        spent: list[float] = []
        data.augment = stopwatch(data.augment, spent)  # type: ignore[method-assign]
        whole = sum(bare_steps(LitMNIST(), data, iter(data.train_batches), steps))
        if number:
            shares.append(100 * sum(spent) / whole)
            milliseconds.append(1000 * sum(spent) / steps)
    table("the augmentation, batches of 128")
    row("milliseconds a step", milliseconds)
    row("share of a step of the default, %", shares, ".1f")
    return {"milliseconds": milliseconds, "share": shares}


def epochs(root: str, rounds: int) -> dict[str, Any]:
    configs = sorted((REPOSITORY / "configs").glob("*.yaml"))
    others = "seed", "smoke", "ddp", "gpu"  # another measure's, no recipes, and one for a GPU
    recipes = {path.stem: ["--config", str(path)] for path in configs if path.stem not in others}
    seconds: dict[str, list[float]] = {name: [] for name in ("default", *recipes)}
    for _ in range(rounds):
        for name, values in seconds.items():
            with folder_of_runs() as where:
                flags = [*recipes.get(name, []), "--data.root", root, "--trainer.max_epochs", "1", *QUIET, *where]
                lit_mnist(["fit", *flags])
                results = Path(where[1], "lightning_logs", "version_0", "results.json").read_text()
            values.append(json.loads(results)["fit"]["train_seconds"])
    table("seconds of training an epoch")
    for name, values in seconds.items():
        row(name, values)
    return {"seconds": seconds}


def board(root: str, rounds: int) -> dict[str, Any]:
    """The time within the callbacks' hooks: two runs, with and without, differ more by chance."""
    spent: list[float] = []
    parts = (TrainingBoard, ValidationBoard)
    originals = [(part, name, hook) for part in parts for name, hook in vars(part).items() if name.startswith("on_")]
    inside, whole = [], []
    for part, name, hook in originals:
        setattr(part, name, stopwatch(hook, spent))
    try:
        for _ in range(rounds):
            spent.clear()
            with folder_of_runs() as where:
                started = perf_counter()
                lit_mnist(["fit", "--data.root", root, *QUIET, *where])
                whole.append(perf_counter() - started)
            inside.append(sum(spent))
    finally:
        for part, name, hook in originals:
            setattr(part, name, hook)
    shares = [100 * a / (b - a) for a, b in zip(inside, whole, strict=True)]
    table("the board's cost in a run of the default")
    row("the run, seconds", whole)
    row("within the board's hooks, seconds", inside)
    row("share of the rest, %", shares)
    return {"run": whole, "board": inside, "median_share": statistics.median(shares)}


FIRST_STEP = """
import os, sys
from lit_mnist.__main__ import main
LitMNIST.training_step = lambda self, batch, batch_idx: os._exit(0)
main(sys.argv[1:])
"""
IMPORTS = "import torch, torchvision, torchmetrics.classification, torch.utils.tensorboard, pytorch_lightning.cli"


def startup(root: str, rounds: int) -> dict[str, Any]:
    ours, imports = [], []
    for number in track(range(rounds + 1), "starting"):
        with folder_of_runs() as where:
            fit = [sys.executable, "-c", FIRST_STEP, "fit", "--data.root", root, *where, "--trainer.accelerator", "cpu"]
            pair = [timed(fit), timed([sys.executable, "-c", IMPORTS])]
        if number:
            ours.append(pair[0])
            imports.append(pair[1])
    ratios = [a / b for a, b in zip(ours, imports, strict=True)]
    table("start-up")
    row("until the first step, seconds", ours)
    row("bare imports, seconds", imports)
    row("ratio within a round", ratios, ".3f")
    return {"fit": ours, "imports": imports, "median_ratio": statistics.median(ratios)}


def timed(command: list[str]) -> float:
    started = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - started


def peak(root: str, rounds: int, steps: int = 50) -> dict[str, Any]:
    """Steps of the network alone, its batch at hand, and the largest matrix products in turns with them."""
    recipes = {name: LitMNIST(**settings) for name, settings in {"default": {}, "fast.yaml": model_of("fast")}.items()}
    images, targets = next(iter(bare_data(root, shift=0.0).train_batches))
    matrices = {str(dtype): torch.rand(2, 2048, 2048).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    products: dict[str, list[float]] = {name: [] for name in matrices}
    milliseconds: dict[str, dict[str, list[float]]] = {name: {} for name in recipes}
    work: dict[str, dict[str, float]] = {}
    for name, model in recipes.items():
        with FlopCounterMode(display=False, depth=9) as counter:
            F.cross_entropy(model(images), targets).backward()
        counts = counter.get_flop_counts()
        paths = {layer: f"LitMNIST.network.{layer}" for layer, _ in leaves(model.network)}
        work[name] = {layer: sum(counts.get(path, {}).values()) / 1e9 for layer, path in paths.items()}
    for number in track(range(rounds + 1), "measuring"):
        fastest = {name: min(repeat(partial(torch.matmul, *pair), 5)) for name, pair in matrices.items()}
        times = {name: layer_times(model.network, images, targets, steps) for name, model in recipes.items()}
        if number:
            for name, seconds in fastest.items():
                products[name].append(2 * 2048**3 / seconds / 1e9)
            for name, spent in times.items():
                for layer, value in spent.items():
                    milliseconds[name].setdefault(layer, []).append(value)
    table("matrix product of 2048, GFLOP/s")
    for name, values in products.items():
        row(name, values, ".0f")
    best = max(statistics.median(values) for values in products.values())
    for name, layers in milliseconds.items():
        print(f"\n{name + ', a step of 128':<44}{'ms':>12}{'GFLOP/s':>12}{'of peak, %':>12}")
        medians = {layer: statistics.median(values) for layer, values in layers.items()}
        described = {layer: f"{layer} {part}"[:43] for layer, part in leaves(recipes[name].network)}
        flops = {**work[name], "whole": sum(work[name].values())}
        for layer, value in {**medians, "whole": sum(medians.values())}.items():
            speed = 1000 * flops.get(layer, 0) / value
            shown = f"{speed:>12.1f}{100 * speed / best:>12.1f}" if speed else ""
            print(f"{described.get(layer, layer):<44}{value:>12.2f}{shown}")
    return {"products": products, "gflop": work, "milliseconds": milliseconds}


def model_of(recipe: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / f"{recipe}.yaml").read_text())
    return dict(settings["model"])


def leaves(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in network.named_modules() if not list(part.children())]


def layer_times(network: nn.Module, images: Tensor, targets: Tensor, steps: int) -> dict[str, float]:
    """Milliseconds of each layer in a step, forward and backward, and of the rest: loss, optimizer and the like.

    A layer's backward lasts from the arrival of its output's gradient to that of its input's.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    parts = leaves(network)
    started: dict[str, float] = {}
    arrived: dict[str, float] = {}
    spent = dict.fromkeys([name for name, _ in parts], 0.0)

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, perf_counter())

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            spent[name] += perf_counter() - started[name]
            if output.requires_grad:
                output.register_hook(lambda _: arrived.__setitem__(name, perf_counter()))

        return hook

    hooks = [part.register_forward_pre_hook(before(name)) for name, part in parts]
    hooks += [part.register_forward_hook(after(name)) for name, part in parts]
    network.train()
    whole = 0.0
    for _ in range(steps):
        begun = perf_counter()
        loss = F.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        arrived.clear()
        loss.backward()
        ended = perf_counter()
        optimizer.step()
        whole += perf_counter() - begun
        for name in arrived:  # from the last layer to the first
            following = list(arrived)[list(arrived).index(name) + 1 :]
            spent[name] += (arrived[following[0]] if following else ended) - arrived[name]
    for hook in hooks:
        hook.remove()
    times = {name: 1000 * seconds / steps for name, seconds in spent.items()}
    return {**times, "loss, optimizer, between the layers": 1000 * whole / steps - sum(times.values())}


def repeat(work: Callable[[], Any], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started)
    return seconds


def predict(root: str, rounds: int) -> dict[str, Any]:
    images, _ = datasets.load(root, train=False)
    network = LitMNIST().network.eval()
    alone, command = [], []
    with folder_of_runs() as where:
        short = ["--trainer.limit_train_batches", "5", "--trainer.max_epochs", "1"]
        lit_mnist(["fit", "--data.root", root, *where, *QUIET, *short])
        for number in track(range(rounds + 1), "predicting"):
            with torch.inference_mode():
                seconds = repeat(lambda: [network(batch).softmax(1) for batch in images.split(1000)], 1)[0]
            started = perf_counter()
            lit_mnist(["predict", "--ckpt_path", "last", "--data.root", root, *where, "--trainer.accelerator", "cpu"])
            if number:
                alone.append(len(images) / seconds)
                command.append(len(images) / (perf_counter() - started))
    table("predict, images a second")
    row("the network of the default alone", alone, ",.0f")
    row("the command in a warm process, with its CSV", command, ",.0f")
    return {"network": alone, "command": command}


MEASURES = {
    "target": (target, 5),
    "epochs": (epochs, 3),
    "overhead": (overhead, 5),
    "augment": (augment, 5),
    "board": (board, 3),
    "startup": (startup, 5),
    "peak": (peak, 7),
    "predict": (predict, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(MEASURES)} (all)")
    parser.add_argument("--rounds", type=int, help="how often each is measured, in turns (5 to 7)")
    parser.add_argument("--root", default="data", help="folder of the data (data)")
    add_flag(parser, "speed")
    settings = parser.parse_args()
    if unknown := set(settings.measures) - set(MEASURES):
        parser.error(f"unknown measures {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    root = str(Path(settings.root).resolve())
    datasets.prepare(root)
    for name in settings.measures or MEASURES:
        measure, rounds = MEASURES[name]
        values = measure(root, settings.rounds or rounds)
        append(settings, {"measure": name, **values})


if __name__ == "__main__":
    main()
