"""Times as fast as the baseline's own loop, seconds an epoch, and what the Trainer costs.

target      training with configs/fast.yaml, against the baseline's 20 epochs by a loop as its author would have written
            it, in both readings: in each round an epoch of each of BASELINES, and a whole run of ours.
epochs      seconds of an epoch of each recipe.
input_path  normalised images a second in shuffled batches of 128, in one process without workers: by `TensorBatches`,
            and by `DataLoader` over torchvision's `MNIST` with `ToTensor` and `Normalize`.
overhead    training by `fit`, with its metrics, scalars and checkpoints, over the bare loop of gpu.py.
predict     processor seconds of `predict` for one picture, over those of `import torch`.

What is compared takes turns, because timings on shared machines drift. Other flags, as --NAME=VALUE, go to `fit`.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from time import perf_counter

import pandas
import torch
import torchvision
from gpu import Loop, Means, Options, Record, results_of
from PIL import Image
from records import REPOSITORY, make_parser, measure, print_rows
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from lit_mnist.__main__ import main as lit_mnist
from lit_mnist.data import datasets
from lit_mnist.data.batches import TensorBatches
from lit_mnist.network import MEAN, STD, normalise

BASELINE_EPOCHS = 20
# of the course solution, whose picture of the network is not public: its 3x3 convolutions, whether they have biases,
# and whether each epoch scores the test set; 15,610 parameters, as configs/seed.yaml, and 13,386
BASELINES = {
    "baseline": ("16 16 16 pool 16 16 16 pool 24", False, True),
    "lighter baseline": ("8 16 pool 16 16 pool 16 32", True, False),
}
TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])


def baseline(widths: str, bias: bool) -> nn.Module:
    layers, inputs = list[nn.Module](), 1
    for word in widths.split():
        if word == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, inputs := int(word), 3, padding=1, bias=bias), nn.ReLU()]
            layers += [nn.BatchNorm2d(inputs), nn.Dropout(0.05)]
    return nn.Sequential(*layers, nn.AvgPool2d(7), nn.Conv2d(inputs, 10, 1), nn.Flatten(), nn.LogSoftmax(dim=1))


def baseline_epochs(root: str, widths: str, bias: bool, scores: bool) -> Iterator[Record]:
    """Train as the course solution does; after each epoch give its seconds, and the test accuracy if it `scores`."""
    train_loader = DataLoader(torchvision.datasets.MNIST(root, transform=TRANSFORM), 64, shuffle=True)
    test_loader = DataLoader(torchvision.datasets.MNIST(root, train=False, transform=TRANSFORM), 64)
    torch.manual_seed(1)
    model = baseline(widths, bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        started = perf_counter()
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad()
            F.nll_loss(model(images), targets).backward()
            optimizer.step()
        model.eval()
        correct, test_loss = 0, 0.0
        with torch.no_grad():
            for images, targets in test_loader if scores else ():
                output = model(images)
                test_loss += F.nll_loss(output, targets, reduction="sum").item()
                correct += int((output.argmax(dim=1) == targets).sum())
        score = {"test_accuracy": correct / len(test_loader.dataset)} if scores else {}  # type: ignore[arg-type]
        yield {"epoch_seconds": perf_counter() - started, **score}


def target(options: Options) -> Iterator[Record]:
    theirs = {name: baseline_epochs(str(options.root), *kind) for name, kind in BASELINES.items()}
    rounds = []
    for seed in range(1, options.rounds + 1):
        found = {name: next(trained) for name, trained in theirs.items()}
        result = results_of("fast", options.root, "cpu", "--seed_everything", str(seed), *options.flags, test=True)
        rounds.append({"ours": {"train_seconds": result["fit"]["train_seconds"], **result["test"][-1]}} | found)
    table = pandas.json_normalize(rounds)
    for name in BASELINES:
        table[f"{name}.ratio"] = BASELINE_EPOCHS * table[f"{name}.epoch_seconds"] / table["ours.train_seconds"]
    print_rows("fast.yaml, and epochs of the baselines", table.filter(regex="seconds$|accuracy$|ratio$"), ".4f")
    yield {"rounds": rounds, "median_ratios": table.filter(regex="ratio$").median().to_dict()}


def epochs(options: Options) -> Iterator[Record]:
    seconds = {name: list[float]() for name in ("default", "fast", "tiny", "record", "nano", "best")}
    for _ in range(options.rounds):
        for name, values in seconds.items():
            fit = results_of(name, options.root, "cpu", "--trainer.max_epochs", "1", *options.flags)["fit"]
            values.append(fit["train_seconds"])
    print_rows("seconds of training an epoch", seconds)
    yield {"seconds": seconds}


def overhead(options: Options) -> Iterator[Record]:
    flags = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "250", "--data.val_size", "0"]
    seconds = []
    for _ in range(options.rounds + 1):
        fit = results_of("default", options.root, "cpu", *flags, "--board.every_n_epochs", "0", *options.flags)["fit"]
        bare = Loop("default", options.root, options.device, Means()).milliseconds(fit["steps"])
        seconds.append({"fit": fit["train_seconds"], "bare": bare * fit["steps"] / 1000})
    table = pandas.DataFrame(seconds[1:])  # the first round warms up
    print_rows(f"the default, {fit['steps']} steps, seconds", table.assign(ratio=table["fit"] / table["bare"]), ".3f")
    yield {"seconds": table.to_dict("list")}


def predict(options: Options) -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--trainer.max_steps", "20", "--data.root", str(options.root), "--trainer.default_root_dir", folder]
        lit_mnist(["fit", *flags, *options.flags])
        digit = datasets.load(options.root, train=False)[0][0, 0]
        Image.fromarray(255 - digit.numpy()).resize((280, 280)).save(picture := f"{folder}/digit.png")
        command = ["-m", "lit_mnist", "predict", picture, "--ckpt_path", "last", "--root_dir", folder]
        ran = [os.times()]
        for arguments in [["-c", "import torch"], command] * (options.rounds + 1):
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
            ran.append(os.times())
    spent = [sum(after[2:4]) - sum(before[2:4]) for before, after in itertools.pairwise(ran)][2:]  # without the first
    table = pandas.DataFrame({"import torch": spent[::2], "predict": spent[1::2]})
    print_rows("processor seconds", table.assign(ratio=table["predict"] / table["import torch"]))
    yield {"processor_seconds": table.to_dict("list")}


def input_path(options: Options) -> Iterator[Record]:
    ours = TensorBatches(*datasets.load(options.root, train=True), 128, seed=1)
    theirs = DataLoader(torchvision.datasets.MNIST(options.root, transform=TRANSFORM), 128, shuffle=True)
    torch.testing.assert_close(normalise(ours.images[7]), theirs.dataset[7][0])  # the same image comes out the same
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(options.rounds):
        ours.sampler.set_epoch(number)
        batches = {"ours": (normalise(i) for i, _ in ours), "theirs": (i for i, _ in itertools.islice(theirs, 47))}
        for name, values in rates.items():
            started = perf_counter()
            values.append(sum(map(len, batches[name])) / (perf_counter() - started))
    table = pandas.DataFrame(rates).assign(ratio=lambda values: values["ours"] / values["theirs"])
    print_rows("images a second", table, ",.0f")
    yield {"batch_size": 128, **rates, "median_ratio": table["ratio"].median()}


if __name__ == "__main__":
    parser = make_parser(__doc__, "speed")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured, in turns (5)")
    sys.exit(measure(parser, {part.__name__: part for part in (target, epochs, input_path, overhead, predict)}))
