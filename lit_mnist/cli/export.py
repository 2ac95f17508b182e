"""A trained network for other runtimes: raw pixels in, probabilities out."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_mnist import __version__
from lit_mnist.cli import page
from lit_mnist.cli.console import OneLineParser
from lit_mnist.cli.settings import plain_settings
from lit_mnist.data import datasets
from lit_mnist.exact.conditions import commit
from lit_mnist.exact.console import shortened, shown
from lit_mnist.exact.errors import UserError
from lit_mnist.exact.reader import find_and_read
from lit_mnist.module import LitMNIST

ONNX = ("onnx", "onnxscript", "onnxruntime")  # what the extra [export] installs, and selenium for pages
TOLERANCE = 1e-5  # of a probability
BATCHES = (1, 500)  # sizes in which the written file is checked; the test set ends in a smaller one


class Probabilities(nn.Module):
    """uint8 (B, 1, 28, 28) to the probabilities of the classes, float (B, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.network(images).softmax(dim=1)
        return probabilities


def write_pt2(model: Probabilities, path: Path, metadata: dict[str, str]) -> None:
    program = torch.export.export(model, (example(),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    content = io.BytesIO()  # torch 2.15 aborts the process where a file cannot be written to its end
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    path.write_bytes(content.getbuffer())


def write_onnx(model: Probabilities, path: Path, metadata: dict[str, str]) -> None:
    path.write_bytes(network_onnx(model, metadata))


def write_html(model: Probabilities, path: Path, metadata: dict[str, str]) -> None:
    canvas = torch.zeros(page.CANVAS, page.CANVAS, dtype=torch.uint8)
    drawing = onnx_bytes(page.Drawing(), {}, (canvas,), input_names=["canvas"], output_names=["images"])
    page.write(path, network_onnx(model, metadata), drawing, metadata)


def network_onnx(model: Probabilities, metadata: dict[str, str]) -> bytes:
    batch = {"images": {0: torch.export.Dim("batch")}}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"], "dynamic_shapes": batch}
    return onnx_bytes(model, metadata, (example(),), **names)


def onnx_bytes(model: nn.Module, metadata: dict[str, str], inputs: tuple[Tensor], **settings: Any) -> bytes:
    import onnx

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **settings)
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@contextmanager
def run_pt2(path: Path) -> Iterator[Callable[[Tensor], Tensor]]:
    yield torch.export.load(path).module()


@contextmanager
def run_onnx(path: Path) -> Iterator[Callable[[Tensor], Tensor]]:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    yield lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS = {".pt2": (write_pt2, run_pt2), ".onnx": (write_onnx, run_onnx), ".html": (write_html, page.opened)}


def example() -> Tensor:
    return torch.zeros(2, 1, 28, 28, dtype=torch.uint8)


def restored(checkpoint: dict[str, Any], name: str) -> LitMNIST:
    """The module of a checkpoint, with its weights.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        name: its file's, for messages.

    Raises:
        UserError: the weights do not fit their network.
    """
    settings = plain_settings("model", checkpoint["hyper_parameters"])
    try:
        lit = LitMNIST(**{key.removeprefix("model."): value for key, value in settings.items()})
    except Exception as error:  # a setting of another kind fails wherever it is used first
        raise UserError(f"--ckpt_path {name}: its settings make no network ({shortened(str(error))})") from error
    try:
        lit.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"--ckpt_path {name}: its weights do not fit the network it names") from error
    return lit


def export(checkpoint: dict[str, Any], output: Path, root: str, checkpoint_name: str) -> str:
    """Write a checkpoint's network and check the file on the whole test set.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        output: the file, replaced once the new one is complete and right; its suffix tells the format.
        root: folder of the data.
        checkpoint_name: for the file's metadata.

    Returns:
        A line that says what was written and how it was checked.

    Raises:
        UserError: the file does not give what the checkpoint gives, or the weights do not fit their network.
        UserError: the test set cannot be had.
    """
    name = str(checkpoint["datamodule_hyper_parameters"].get("name", "mnist"))
    if name not in datasets.SETS:
        raise UserError(f"--ckpt_path {checkpoint_name}: its data.name {name} is none that this version knows")
    datasets.prepare(root, name=name)
    images, targets = datasets.load(root, train=False, name=name)
    lit = restored(checkpoint, checkpoint_name)
    model = Probabilities(lit.network).eval()
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in images.split(500)])
    correct = int((expected.argmax(1) == targets).sum())
    metadata = {
        "description": f"images uint8 (batch, 1, 28, 28), white on black, to {expected.shape[1]} probabilities each",
        "data": name,
        "network": str(lit.hparams["network"]),
        "layers": str(lit.hparams["layers"]),
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "test_accuracy": str(correct / len(targets)),
        "checkpoint": checkpoint_name,
        "lit_mnist": __version__,
        "commit": commit() or "unknown",
    }
    write, load = FORMATS[output.suffix]
    partial = output.with_name(f".{output.stem}.{os.getpid()}.tmp{output.suffix}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporters warn of their own deprecations
            try:
                write(model, partial, metadata)
            except (OSError, RuntimeError) as error:  # torch's type for a file that cannot be written
                raise UserError(f"--output {output}: {str(error).splitlines()[0]}") from error
        difference = 0.0
        with load(partial) as answer:
            for size in BATCHES:
                part = images[: 10 * size] if size == 1 else images
                answers = torch.cat([answer(batch).detach() for batch in part.split(size)])
                difference = max(difference, float((answers - expected[: len(part)]).abs().nan_to_num(math.inf).max()))
                if difference > TOLERANCE or not torch.equal(answers.argmax(1), expected[: len(part)].argmax(1)):
                    raise UserError(
                        f"--output {output}: the exported network differs from the checkpoint by {difference:.1e} in a"
                        f" probability, and {TOLERANCE:.0e} is allowed; nothing was written"
                    )
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    accuracy = f"{correct}/{len(targets)} ({100 * correct / len(targets):.2f} %)"
    return (
        f"Exported: {shown(output)}, {output.stat().st_size:,} bytes, {metadata['parameters']} parameters;"
        f" checked on the test set: accuracy {accuracy}, every digit as the checkpoint's,"
        f" probabilities within {difference:.0e}"
    )


def main(args: Sequence[str]) -> None:
    """`export` of the command line.

    Raises:
        UserError: the input cannot be used.
    """
    parser = OneLineParser(prog="python -m lit_mnist export", description="Write a checkpoint's network to a file.")
    parser.add_argument("--ckpt_path", required=True, metavar="best|last|PATH", help="the checkpoint")
    parser.add_argument(
        "--output", required=True, type=Path, help="digits.pt2, or with the extra [export] digits.onnx or digits.html"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--data.root", dest="root", default="data", help="folder of the data, for the check (data)")
    parser.add_argument("--root_dir", type=Path, default=Path(), help="the folder of lightning_logs (this one)")
    options = parser.parse_args(args)
    output: Path = options.output
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: the name must end in {', '.join(FORMATS)}")
    needed = {".pt2": (), ".onnx": ONNX, ".html": (*ONNX, "selenium")}[output.suffix]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"--output {output}: needs {' and '.join(missing)}: pip install 'lit_mnist[export]'")
    if output.suffix == ".html":
        try:
            page.check_tools()
        except UserError as error:
            raise UserError(f"--output {output}: {error}") from error
    if output.is_dir():
        raise UserError(f"--output {output}: that is a folder; name a file")
    if os.path.lexists(output) and not options.overwrite:
        raise UserError(f"--output {output}: that file exists; --overwrite replaces it")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"--output {output}: no file can be written to {output.absolute().parent}")
    path, checkpoint = find_and_read(options.ckpt_path, options.root_dir / "lightning_logs")
    print(f"Checkpoint: {path}", flush=True)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    print(export(checkpoint, output, options.root, path.name))
