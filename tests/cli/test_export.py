from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_cli import TINY, only
from torch import Tensor
from torch.testing import assert_close

from lit_mnist import LitMNIST
from lit_mnist.__main__ import main
from lit_mnist.cli import export, page
from lit_mnist.data import datasets
from lit_mnist.exact.errors import UserError
from lit_mnist.pictures import prepare as images

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


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
    pixels, targets = datasets.load(trained, train=False)
    checkpoint = only("lightning_logs/version_0/checkpoints/best-*.ckpt")
    network = LitMNIST.load_from_checkpoint(checkpoint, weights_only=True).network.cpu().eval()
    with torch.inference_mode():
        expected = network(pixels).softmax(1)
    correct = int((expected.argmax(1) == targets).sum())
    assert f"Exported: {path}, " in out
    assert f"accuracy {correct}/100 (" in out
    with export.FORMATS[suffix][1](path) as answer:
        for batch in (pixels, pixels[:1], pixels[:7]):
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
        (["--output", "digits.txt"], "--output digits.txt: the name must end in .pt2, .onnx, .html"),
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


@pytest.mark.parametrize("suffix", [".onnx", ".html"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(["export", "--ckpt_path", "best", "--output", f"digits{suffix}"]) == 2
    assert "pip install 'lit_mnist[export]'" in capsys.readouterr().err


def test_a_page_without_npm(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["export", "--ckpt_path", "best", "--output", "digits.html", "--data.root", str(trained)]
    if shutil.which("npm"):
        for name, value in {"registry": "http://127.0.0.1:9", "fetch_retries": "0", "cache": "npm-cache"}.items():
            monkeypatch.setenv(f"npm_config_{name}", value)
        with pytest.raises(UserError, match=r"^npm cannot fetch onnxruntime-web@.*ECONNREFUSED"):
            page.runtime()
    capsys.readouterr()
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "npm" else name)
    assert main(flags) == 2
    reason = "a page needs npm: apt-get install npm, or as your system has it"
    assert capsys.readouterr().err == f"lit_mnist: error: --output digits.html: {reason}\n"
    assert not Path("digits.html").exists()


def drawing(strokes: int) -> Tensor:
    """Ink of random strokes, uint8 (CANVAS, CANVAS), with smooth edges."""
    generator = np.random.default_rng(strokes)
    sheet = Image.new("L", (4 * page.CANVAS, 4 * page.CANVAS))
    corners = [(float(x), float(y)) for x, y in generator.uniform(150, 850, (strokes + 1, 2))]
    ImageDraw.Draw(sheet).line(corners, 255, 72, joint="curve")
    return torch.from_numpy(np.array(sheet.resize((page.CANVAS, page.CANVAS), Image.Resampling.BOX)))


@pytest.mark.parametrize("strokes", range(1, 9))
def test_a_drawing_is_prepared_as_a_picture_is(strokes: int) -> None:
    ink = drawing(strokes)
    difference = page.Drawing()(ink)[0].int() - images.digit(1 - ink / 255).int()
    assert difference.abs().max() <= 2
    assert difference.float().abs().mean() < 0.05


def test_a_page(
    trained: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        page.check_tools()
        runtime = page.runtime()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(page, "runtime", lambda: runtime)
    flags = ["--ckpt_path", "best", "--output", "digits.html", "--data.root", str(trained)]
    assert main(["export", *flags]) == 0
    assert "every digit as the checkpoint's" in capsys.readouterr().out
    assert Path("digits.html").stat().st_size < 6_000_000
    assert "Copyright (c) Microsoft Corporation" in Path("digits.html").read_text()

    browser.get(Path("digits.html").resolve().as_uri())
    sheet = browser.find_element(By.ID, "sheet")
    pointer = ActionChains(browser, duration=50).move_to_element_with_offset(sheet, -60, -90).click_and_hold()
    pointer.move_by_offset(120, 0).move_by_offset(-60, 180).release().perform()
    digit = browser.find_element(By.ID, "digit")
    WebDriverWait(browser, 60).until_not(lambda _: digit.text == "" or browser.find_elements(By.ID, "state"))
    time.sleep(1)  # it looks again while the pointer moves
    pixels = [
        torch.tensor(
            browser.execute_script(f"return Array.from({name}.getContext('2d').getImageData(0, 0, {n}, {n}).data)")
        )
        for name, n in (("sheet", page.CANVAS), ("seen", 28))
    ]
    ink, seen = pixels[0].view(page.CANVAS, page.CANVAS, 4)[:, :, 3], pixels[1].view(28, 28, 4)[:, :, 0]
    assert (seen - images.digit(1 - ink / 255)[0].int()).abs().max() <= 2
    checkpoint = only("lightning_logs/version_0/checkpoints/best-*.ckpt")
    network = LitMNIST.load_from_checkpoint(checkpoint, weights_only=True).network.cpu().eval()
    with torch.inference_mode():
        probabilities = network(seen[None, None].to(torch.uint8)).softmax(1)[0]
    assert digit.text == str(int(probabilities.argmax()))
    percent = [float(bar.text.removesuffix(" %")) for bar in browser.find_elements(By.CSS_SELECTOR, "#bars b")]
    assert percent == pytest.approx([100 * p for p in probabilities.tolist()], abs=0.06)
    browser.find_element(By.ID, "clear").click()
    WebDriverWait(browser, 60).until(lambda _: digit.text == "")
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    assert any(address.startswith("blob:") for address in addresses)
    assert not [address for address in addresses if not address.startswith(("file:", "blob:", "data:", "chrome:"))]
