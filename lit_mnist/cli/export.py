"""export: a checkpoint's network for other runtimes, raw pixels in, probabilities out; or a page to draw on."""

import io
import json
import subprocess
import tarfile
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lit_mnist import __version__
from lit_mnist.cli.demo import fill_page
from lit_mnist.cli.predict import check_output, checkpoint_parser, load_test_set, open_network
from lit_mnist.exact.conditions import commit
from lit_mnist.exact.console import UserError, shortened, shown
from lit_mnist.exact.runs import replaced
from lit_mnist.network import DIGITS
from lit_mnist.pictures.report import classify

ONNX = ("onnx", "onnxscript", "onnxruntime")  # what the extra [export] installs
RUNTIME = "onnxruntime-web@1.30.0"  # on the npm registry
RUNTIME_FILES = {"runtime": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
TOLERANCE = 1e-5  # of a probability
EXAMPLE = torch.zeros(2, *DIGITS, dtype=torch.uint8)
SHAPES = ({0: torch.export.Dim("batch")},)  # any number of images


def to_pt2(model: nn.Module, metadata: dict[str, str]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """Return a file's content, and what its network makes of a batch."""
    file = io.BytesIO()  # torch 2.15 aborts the process if it cannot write a file to its end
    program = torch.export.export(model, (EXAMPLE,), dynamic_shapes=SHAPES)
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def to_onnx(model: nn.Module, metadata: dict[str, str]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    import onnx
    from onnxruntime import InferenceSession

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    program = torch.onnx.export(model, (EXAMPLE,), dynamo=True, verbose=False, dynamic_shapes=SHAPES, **names)
    assert program is not None
    proto = program.model_proto  # another one at each access
    onnx.helper.set_model_props(proto, metadata)
    content = proto.SerializeToString()
    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def fetch_runtime() -> dict[str, bytes]:
    """Fetch ONNX Runtime Web's files from the npm registry; UserError if npm is missing, or cannot."""
    with TemporaryDirectory(prefix="lit_mnist-") as folder:
        command = ["npm", "pack", RUNTIME, "--loglevel=error"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            reason = shortened(str(getattr(error, "stderr", None) or error), 120)
            raise UserError(f"npm cannot fetch {RUNTIME}, which a page needs: {reason}") from error
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
            return {name: packed.extractfile(f"package/dist/{file}").read() for name, file in RUNTIME_FILES.items()}  # type: ignore[union-attr]


def export(args: Sequence[str]) -> None:
    """Run the command with the flags after its name; UserError for these, or if the file does not answer as it must."""
    parser = checkpoint_parser("export", "Write a checkpoint's network to a file.")
    parser.add_argument("--output", required=True, type=Path, help="digits.pt2; with [export] digits.onnx, digits.html")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--data.root", dest="root", default="data", help="folder of the test set, to check with (data)")
    options = parser.parse_args(args)
    output: Path = options.output
    check_output(output, [".pt2", ".onnx", ".html"], options.overwrite)
    if output.suffix != ".pt2" and (missing := [name for name in ONNX if find_spec(name) is None]):
        raise UserError(f"--output {output}: needs {' and '.join(missing)}: pip install 'lit_mnist[export]'")
    path, checkpoint, network = open_network(options)
    name, images, targets = load_test_set(checkpoint, options.root)
    expected = classify(network, images)
    correct, parameters = int((expected.argmax(1) == targets).sum()), sum(p.numel() for p in network.parameters())
    metadata = {
        "description": f"images uint8 (batch, 1, 28, 28), white on black, to {expected.shape[1]} probabilities each",
        **{setting: str(value) for setting, value in checkpoint["hyper_parameters"].items()},
        **{"data": name, "parameters": str(parameters), "test_accuracy": str(correct / len(targets))},
        **{"checkpoint": path.name, "lit_mnist": __version__, "commit": commit() or "unknown"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own deprecations
        write = to_pt2 if output.suffix == ".pt2" else to_onnx
        content, answer = write(nn.Sequential(network, nn.Softmax(dim=1)).eval(), metadata)
    answers = torch.cat([answer(batch).detach() for batch in (images[:1], *images[1:].split(500))])  # of any size
    difference = float((answers - expected).abs().max())
    if not difference <= TOLERANCE or not torch.equal(answers.argmax(1), expected.argmax(1)):  # NaN is refused, too
        raise UserError(f"--output {output}: nothing was written; its probabilities differ by {difference:.1e}")
    if output.suffix == ".html":
        texts = [(files("onnxruntime") / text).read_text("utf-8") for text in ("LICENSE", "ThirdPartyNotices.txt")]
        about = "\n\n".join([json.dumps(metadata, indent=2), f"{RUNTIME}, a part of this page:", *texts])
        content = fill_page(checkpoint, about, fetch_runtime() | {"network": content})
    with replaced(output) as partial:
        partial.write_bytes(content)
    score = f"accuracy {correct}/{len(targets)} ({correct / len(targets):.2%}), probabilities within {difference:.0e}"
    print(f"Exported: {shown(output)}, {len(content):,} bytes, {parameters} parameters; on the test set: {score}")
