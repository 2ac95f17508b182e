"""predict: a checkpoint's answers for pictures, or for its test set. Nothing here imports Lightning."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_mnist.cli.console import OneLineParser
from lit_mnist.data import datasets
from lit_mnist.exact.console import UserError, shown
from lit_mnist.exact.runs import checkpoint_lines, find_checkpoint, read_checkpoint, run_folder
from lit_mnist.network import DIGITS, load_network
from lit_mnist.pictures import report


def checkpoint_parser(command: str, description: str) -> OneLineParser:
    """Make a parser with the flags of all commands that read a checkpoint's network."""
    parser = OneLineParser(prog=f"python -m lit_mnist {command}", description=description)
    parser.add_argument("--ckpt_path", required=True, metavar="best|last|PATH", help="the checkpoint")
    parser.add_argument("--root_dir", type=Path, default=Path(), help="folder of lightning_logs (the current one)")
    return parser


def open_network(options: Any) -> tuple[Path, dict[str, Any], nn.Module]:
    """Load the network of `--ckpt_path`, in eval mode, and return it after the checkpoint's path and content."""
    try:
        path = find_checkpoint(options.ckpt_path, options.root_dir / "lightning_logs")
        checkpoint = read_checkpoint(path)
    except UserError as error:
        raise UserError(f"--ckpt_path {error}") from error
    print(*checkpoint_lines(options.ckpt_path, path, options.root_dir / "lightning_logs"), sep="\n", flush=True)
    network = load_network(checkpoint)
    shape = tuple(checkpoint["hyper_parameters"].get("image_shape", DIGITS))
    with torch.inference_mode():
        answers = network(torch.zeros(1, *shape, dtype=torch.uint8))
    if shape != DIGITS or answers.ndim != 2 or answers.shape[1] < 2:
        raise UserError(f"--ckpt_path {path}: maps {shape} to {[*answers.shape[1:]]}, not images {DIGITS} to classes")
    return path, checkpoint, network


def load_test_set(checkpoint: dict[str, Any], root: str) -> tuple[str, Tensor, Tensor]:
    """Load the test set of the data that a checkpoint was trained on: its name, images and targets."""
    name = str(checkpoint["datamodule_hyper_parameters"].get("name", "mnist"))
    datasets.prepare(root, name=name)
    return name, *datasets.load(root, train=False, name=name)


def check_output(output: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    """Refuse a file that cannot be written before any work is done for it."""
    if output.suffix not in suffixes:
        raise UserError(f"--output {output}: the name must end in {', '.join(suffixes)}")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: that file exists; --overwrite replaces it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.absolute().parent}")


def predict(args: Sequence[str]) -> None:
    """Run the command with the flags after its name; UserError if they cannot be used, or no picture shows a digit."""
    parser = checkpoint_parser("predict", "Write a checkpoint's answers for pictures, or for the test images.")
    parser.add_argument("pictures", nargs="*", help="files and folders, one digit in each; none for the test set")
    parser.add_argument("--split", action="store_true", help="the pictures may show several digits each")
    parser.add_argument("--labels", action="store_true", help="score them: names begin with the digit")
    parser.add_argument("--output", type=Path, help="answers.csv, with answers.png beside it (in the run's folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --output if they exist")
    parser.add_argument("--data.root", dest="root", default="data", help="folder of the test set (data)")
    options = parser.parse_intermixed_args(args)
    if (options.split or options.labels) and not options.pictures:
        raise UserError("--split and --labels need pictures")
    output, files = options.output, report.find(options.pictures, options.split)
    if options.labels and (unlabelled := next((path for path, label in files.items() if not label), None)):
        raise UserError(f"--labels {unlabelled}: no digit begins its name or folder, as in 7_mine.png or 7/mine.png")
    for file in [output, output.with_suffix(".png")][: 1 + bool(files)] if output else []:
        check_output(file, [".csv"] if file == output else [".png"], options.overwrite)
        if file.resolve() in [path.resolve() for path in files]:
            raise UserError(f"--output {output}: {file} is one of the pictures, and would be replaced")
    path, checkpoint, network = open_network(options)
    if not output:
        folder, name = run_folder(path) or path.parent, f"{'pictures' if files else 'predictions'}-{path.stem}"
        taken = {file.stem for file in folder.iterdir()}  # by a CSV or by a contact sheet
        names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        output = folder / f"{next(each for each in names if each not in taken)}.csv"
    smoothing = checkpoint["hyper_parameters"].get("label_smoothing", 0.0)
    if files:
        pictures = report.answer(list(files), options.split, network, smoothing)
        if options.labels:
            report.score(pictures, files)
        report.write(pictures, output)
    else:
        _, images, _ = load_test_set(checkpoint, options.root)
        answers = report.classify(network, images).tolist()
        report.write_csv(output, [{"index": index} | report.columns(p, smoothing) for index, p in enumerate(answers)])
        print(f"Predictions of {len(images)} images: {shown(output)}")
