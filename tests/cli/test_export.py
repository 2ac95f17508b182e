import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Capsys, Patch, fails
from onnxruntime import InferenceSession
from test_demo import DIGITS, draw, read
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
        session = InferenceSession(path)
        metadata = session.get_modelmeta().custom_metadata_map
        answers = [session.run(None, {"images": images[:size].numpy()})[0] for size in (100, 1, 7)]
    else:
        extra = {"metadata.json": ""}
        module = torch.export.load(path, extra_files=extra).module()
        metadata = json.loads(extra["metadata.json"])
        answers = [module(images[:size]).detach() for size in (100, 1, 7)]
    for size, answer in zip((100, 1, 7), answers, strict=True):
        assert_close(torch.as_tensor(answer), expected[:size], atol=1e-5, rtol=0)
    known = {"parameters": "502", "test_accuracy": str(correct / 100), "checkpoint": Path(BEST).name}
    assert metadata | known == metadata

    # a file that is wrong does not take the place of one that is right
    before = path.read_bytes()
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert "nothing was written" in fails(capsys, "export", *flags, "--overwrite")
    assert path.read_bytes() == before
    assert [path.name for path in Path().glob("*digits*")] == [path.name]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, real_root: Path) -> Path:
    """A page with a network that reads digits, trained for one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        assert main(["fit", "--data.root", str(real_root), "--trainer.max_epochs", "1"]) == 0
        if main(["export", "--ckpt_path", "best", "--output", "digits.html", "--data.root", str(real_root)]):
            pytest.skip("npm cannot fetch the runtime")
        return Path("digits.html").resolve()


@pytest.mark.slow
def test_a_page(browser: Any, page: Path) -> None:
    """30 drawings, a number, a scribble, and nothing that leaves the page."""
    assert 5e6 < page.stat().st_size < 6e6
    assert "Copyright (c) Microsoft Corporation" in page.read_text(encoding="utf-8")
    browser.get(page.as_uri())
    found = []
    for scale, label in itertools.product((0.6, 0.8, 1), range(10)):
        draw(browser, DIGITS[label], scale=scale)
        found += read(browser)
        browser.find_element("id", "clear").click()
    assert found == 3 * [str(label) for label in range(10)]
    draw(browser, DIGITS[4], -0.2, 0.5)
    draw(browser, DIGITS[2], 0.2, 0.5)
    assert read(browser) == ["4", "2"]
    browser.find_element("id", "clear").click()
    draw(browser, "11 77 17 71 14 74 41 47 25 52 36 63 11 55 72")
    assert len(read(browser)) == len(browser.find_elements("css selector", ".grey")) == 1
    assert browser.find_elements("id", "choose") == []  # photographs are for the demo
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [url for url in fetched if not url.startswith(("blob:", "data:"))] == []


def test_a_page_without_npm(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^npm cannot fetch onnxruntime-web@.*No such file"):
        export.fetch_runtime()
