"""predict: a checkpoint's answers for pictures, or for its test set. Nothing here imports Lightning."""

import csv
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lit_mnist.cli.console import OneLineParser
from lit_mnist.data import datasets
from lit_mnist.exact.console import UserError, shortened, shown
from lit_mnist.exact.runs import checkpoint_lines, find_checkpoint, read_checkpoint, replaced, run_folder
from lit_mnist.network import DIGITS, load_network
from lit_mnist.pictures.prepare import NO_PICTURE
from lit_mnist.pictures.report import Picture, classify, columns, contact_sheet, read

SHEET_LIMIT = 400  # pictures on a contact sheet


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


def find_pictures(names: Sequence[str], several: bool = False) -> dict[Path, str]:
    """Map files, and those below folders but for hidden ones and runs, to labels; UserError for a name without any."""
    # the digit, or the number of several, that a subfolder's or the file's name begins with
    label = re.compile(r"\d+" if several else r"\d(?!\d)")
    found: dict[Path, str] = {}
    for name in names:
        path = Path(name)
        files: dict[Path, tuple[str, ...]] = {path: (path.name,)} if path.is_file() else {}
        for file in sorted(path.rglob("*")) if name else []:
            parts = file.relative_to(path).parts
            if file.is_file() and not any(part.startswith((".", "lightning_logs")) for part in parts):
                files[file] = parts
        if not files:
            raise UserError(f"{shortened(name)!r} is neither a file nor a folder with files in it")
        for file, parts in files.items():
            found.setdefault(file, next((match[0] for part in parts if (match := label.match(part))), ""))
    return found


def print_answers(paths: Sequence[Path], several: bool, network: nn.Module, smoothing: float) -> list[Picture]:
    """Print and return a network's answers for files; raise UserError if none shows a digit."""
    tracked = track(paths, "reading pictures", disable=not sys.stdout.isatty())
    pictures = [picture for path in tracked for picture in read(network, path, several, smoothing)]
    longest = max((picture.row for picture in pictures), key=len)
    names = [name for name in longest if not name[1:].isdecimal()]  # without p0, p1, ...
    table = Table(*names, box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for picture in pictures:
        table.add_row(*(shortened(str(picture.row.get(name, "-"))) for name in names))
    # a pipe has no width, and would cut the lines
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    if not any(picture.probabilities for picture in pictures):
        raise UserError("none of the files shows a digit")
    return pictures


def print_score(pictures: Sequence[Picture], labels: dict[Path, str]) -> None:
    """Print the share of files that are answered as labelled, and of single digits which is answered for which."""
    from pandas import DataFrame, crosstab  # here, for predict does without it

    answers = dict.fromkeys(labels, "")
    for picture in pictures:
        answers[picture.row["file"]] += str(picture.row.get("digit", ""))
    table = DataFrame({"label": labels, "answer": answers})
    right = table["label"] == table["answer"]
    print(f"Accuracy: {right.mean():.1%} ({right.sum()} of {len(right)})")
    if not any("box" in picture.row for picture in pictures):
        print(crosstab(table["label"], table["answer"].replace("", "none")).to_string())


def write_answers(pictures: Sequence[Picture], output: Path) -> None:
    """Write answers: OUTPUT is the CSV, the `.png` beside it the sheet."""
    write_csv(output, [picture.row for picture in pictures])
    drawn = [picture for picture in pictures if picture.row["problem"] != NO_PICTURE][:SHEET_LIMIT]
    with replaced(sheet := output.with_suffix(".png")) as partial:
        contact_sheet(drawn).save(partial, format="PNG")
    print(f"Probabilities: {shown(output)}\nContact sheet: {shown(sheet)} ({len(drawn)} of {len(pictures)})")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of which the longest has all columns."""
    with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, max(rows, key=len))
        writer.writeheader()
        writer.writerows(rows)


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
    output, files = options.output, find_pictures(options.pictures, options.split)
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
        pictures = print_answers(list(files), options.split, network, smoothing)
        if options.labels:
            print_score(pictures, files)
        write_answers(pictures, output)
    else:
        _, images, _ = load_test_set(checkpoint, options.root)
        answers = classify(network, images).tolist()
        write_csv(output, [{"index": index} | columns(p, smoothing) for index, p in enumerate(answers)])
        print(f"Predictions of {len(images)} images: {shown(output)}")
