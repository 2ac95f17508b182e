import json
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import Capsys, Patch, fails
from selenium.webdriver import Chrome
from test_demo import bars, draw, pixels, stray_requests
from test_predict import BEST
from torch import nn
from torch.testing import assert_close

from lit_mnist.__main__ import main
from lit_mnist.cli import export
from lit_mnist.data import datasets
from lit_mnist.exact.console import UserError
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
    assert metadata["parameters"] == "502"
    assert metadata["test_accuracy"] == str(correct / 100)
    assert metadata["checkpoint"] == Path(BEST).name
    assert {"commit", "lit_mnist", "layers"} <= metadata.keys()

    # a file that is wrong does not take the place of one that is right
    before = path.read_bytes()
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert "nothing was written" in fails(capsys, "export", *flags, "--overwrite")
    assert path.read_bytes() == before
    assert [path.name for path in Path().glob("*digits*")] == [path.name]


@pytest.mark.parametrize("npm", ["missing", "offline"])
def test_a_page_without_npm(tmp_path: Path, monkeypatch: Patch, npm: str) -> None:
    if npm == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        for name, value in {"registry": "http://127.0.0.1:9", "fetch_retries": "0", "cache": str(tmp_path)}.items():
            monkeypatch.setenv(f"npm_config_{name}", value)
    with pytest.raises(UserError, match=r"^npm cannot fetch onnxruntime-web@.*(No such file|ECONNREFUSED)"):
        export.fetch_runtime()


def test_a_page(tiny_root: Path, network: nn.Module, browser: Chrome, monkeypatch: Patch) -> None:
    try:
        runtime = export.fetch_runtime()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(export, "fetch_runtime", lambda: runtime)
    assert main(["export", "--ckpt_path", "best", "--output", "digits.html", "--data.root", str(tiny_root)]) == 0
    assert Path("digits.html").stat().st_size < 6_000_000
    assert "Copyright (c) Microsoft Corporation" in Path("digits.html").read_text()
    browser.get(Path("digits.html").resolve().as_uri())
    draw(browser)
    assert bars(browser) == pytest.approx((100 * classify(network, pixels(browser))[0]).tolist(), abs=0.06)
    assert not browser.find_element("id", "file").is_displayed()
    assert browser.find_elements("id", "choose") == []  # photographs are for the demo
    assert not stray_requests(browser, "file:", "blob:")
