import json
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import Capsys, Patch, fails
from test_predict import BEST
from torch import nn
from torch.testing import assert_close

from lit_mnist.__main__ import main
from lit_mnist.cli import export
from lit_mnist.data import datasets
from lit_mnist.pictures.report import classify


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_gives_what_the_checkpoint_gives(
    tiny_root: Path, network: nn.Module, monkeypatch: Patch, capsys: Capsys, suffix: str
) -> None:
    path = Path(f"digits{suffix}")
    flags = ["--ckpt_path", "best", "--output", str(path), "--data.root", str(tiny_root)]
    assert main(["export", *flags]) == 0
    out = capsys.readouterr().out
    images, targets = datasets.load(tiny_root, train=False)
    expected = classify(network, images)
    correct = int((expected.argmax(1) == targets).sum())
    assert f"Exported: {path}, {path.stat().st_size:,} bytes, 502 parameters" in out
    assert f"accuracy {correct}/100 (" in out
    if suffix == ".onnx":
        import onnx
        from onnxruntime import InferenceSession

        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        session = InferenceSession(path)
        answers = [session.run(None, {"images": images[:size].numpy()})[0] for size in (100, 1, 7)]
    else:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("metadata.json")]
            metadata = json.loads(archive.read(name))
        module = torch.export.load(path).module()
        answers = [module(images[:size]).detach().numpy() for size in (100, 1, 7)]
    for answer in answers:
        assert_close(torch.from_numpy(answer), expected[: len(answer)], atol=1e-5, rtol=0)
    assert [len(answer) for answer in answers] == [100, 1, 7]
    known = {"parameters": "502", "test_accuracy": str(correct / 100), "checkpoint": Path(BEST).name}
    assert metadata | known == metadata

    # a file that is wrong does not take the place of one that is right
    before = path.read_bytes()
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert "nothing was written" in fails(capsys, "export", *flags, "--overwrite")
    assert path.read_bytes() == before
    assert [path.name for path in Path().glob("*digits*")] == [path.name]
