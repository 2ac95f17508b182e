import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cli import TINY, only
from torch.testing import assert_close

from lit_mnist import LitMNIST
from lit_mnist.commands import export
from lit_mnist.commands.main import main
from lit_mnist.data import mnist


@pytest.fixture
def trained(command: Callable[..., int], tiny_root: Path) -> Path:
    assert command("fit", *TINY) == 0
    return tiny_root


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_gives_what_the_checkpoint_gives(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = Path(f"digits{suffix}")
    flags = ["--ckpt_path", "best", "--output", str(path), "--data.root", str(trained)]
    assert main(["export", *flags]) == 0
    out = capsys.readouterr().out
    images, targets = mnist.load(trained, train=False)
    checkpoint = only("lightning_logs/version_0/checkpoints/best-*.ckpt")
    network = LitMNIST.load_from_checkpoint(checkpoint, weights_only=True).network.cpu().eval()
    with torch.inference_mode():
        expected = network(images).softmax(1)
    correct = int((expected.argmax(1) == targets).sum())
    assert f"Exported: {path}, " in out
    assert f"accuracy {correct}/100 (" in out
    answer = export.FORMATS[suffix][1](path)
    for batch in (images, images[:1], images[:7]):
        assert_close(answer(batch).detach(), expected[: len(batch)], atol=1e-5, rtol=0)

    if suffix == ".onnx":
        import onnx

        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    else:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("metadata.json")]
            metadata = json.loads(archive.read(name))
    assert metadata["parameters"] == str(100 + 8 + 288 + 16 + 90)
    assert metadata["test_accuracy"] == str(correct / 100)
    assert metadata["checkpoint"] == checkpoint.name
    assert {"commit", "lit_mnist", "layers"} <= metadata.keys()

    before = path.read_bytes()
    assert main(["export", *flags]) == 2
    assert f"--output {path}: that file exists; --overwrite replaces it" in capsys.readouterr().err
    # a file that is wrong does not take the place of one that is right
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert main(["export", *flags, "--overwrite"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [path.name for path in Path().iterdir() if "digits" in path.name] == [path.name]
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--output", "digits.onnx"], "--ckpt_path best: no run under lightning_logs has a best checkpoint"),
        (["--output", "digits.txt"], "--output digits.txt: the name must end in .pt2 or .onnx"),
        (["--output", "nowhere/digits.pt2"], "--output nowhere/digits.pt2: there is no folder nowhere"),
        ([], "the following arguments are required: --output"),
    ],
)
def test_told_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--ckpt_path", "best", *flags]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(["export", "--ckpt_path", "best", "--output", "digits.onnx"]) == 2
    assert "pip install 'lit_mnist[export]'" in capsys.readouterr().err
