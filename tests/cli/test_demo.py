from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import TINY, only
from test_report import picture
from torch.testing import assert_close

from lit_mnist import LitMNIST
from lit_mnist.__main__ import main
from lit_mnist.cli import demo
from lit_mnist.data import datasets
from lit_mnist.pictures import prepare as images

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

# corners of strokes, in shares of the sketchpad's sides
STROKES = {
    "1": [(0.5, 0.2), (0.5, 0.8)],
    "7": [(0.3, 0.22), (0.7, 0.22), (0.45, 0.82)],
    "3": [
        *[(0.34, 0.24), (0.5, 0.18), (0.65, 0.26), (0.63, 0.4), (0.48, 0.48)],
        *[(0.66, 0.57), (0.68, 0.74), (0.52, 0.83), (0.34, 0.78)],
    ],
}


def test_an_answer_is_that_of_predict(command: Callable[..., int]) -> None:
    assert command("fit", *TINY) == 0
    checkpoint = only("lightning_logs/version_0/checkpoints/best-*.ckpt")
    levels = np.full((320, 320), 255, np.uint8)
    levels[60:260, 150:170] = 0
    found = demo.drawn({"composite": levels})
    assert found
    assert found.digit is not None
    Image.fromarray(levels).save("drawing.png")
    read = images.load(Path("drawing.png")).digit
    assert read is not None
    assert torch.equal(found.digit, read)
    probabilities, seen = demo.answer(found, str(checkpoint))
    network = LitMNIST.load_from_checkpoint(checkpoint, weights_only=True).network.cpu().eval()
    with torch.inference_mode():
        expected = network(read[None]).softmax(1)[0]
    assert probabilities
    assert list(probabilities) == list("0123456789")
    assert_close(torch.tensor(list(probabilities.values())), expected)
    content = re.search('src="data:image/png;base64,([^"]+)"', seen)
    assert content
    with Image.open(io.BytesIO(base64.b64decode(content[1]))) as image:
        assert np.array_equal(np.asarray(image), read[0].numpy())
    assert demo.answer(demo.dropped({"path": "drawing.png"}), str(checkpoint)) == (probabilities, seen)

    blank = demo.drawn({"composite": np.full((320, 320), 255, np.uint8)})
    assert demo.answer(blank, str(checkpoint)) == (None, "nothing stands out from the background")
    for nothing in (demo.drawn(None), demo.drawn({"composite": None}), demo.dropped(None)):
        assert demo.answer(nothing, str(checkpoint)) == (None, "")
    assert demo.named(checkpoint) == "version_0: default, best"
    assert demo.named(Path("my own.ckpt")) == "my own.ckpt"
    assert demo.answer(found, "gone<b>.ckpt")[1].startswith("--ckpt_path gone&lt;b&gt;.ckpt: ")


def test_examples(tiny_root: Path, tmp_path: Path) -> None:
    pixels, targets = datasets.load(tiny_root, train=False)
    checkpoint = {"datamodule_hyper_parameters": {"name": "mnist"}}
    for path, target in zip(demo.examples(str(tiny_root), checkpoint, tmp_path), range(10), strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), pixels[(targets == target).nonzero()[0, 0], 0].numpy())
    printed = [images.load(Path(path)).digit for path in demo.examples("nowhere", checkpoint, tmp_path)]
    assert len({digit.numpy().tobytes() for digit in printed if digit is not None}) == 10


def test_told_wrong(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def told(*flags: str) -> str:
        assert main(["demo", *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    assert "--ckpt_path last: no run under lightning_logs has a last checkpoint" in told("--ckpt_path", "last")
    assert "the following arguments are required: --ckpt_path" in told()
    assert command("fit", *TINY) == 0
    capsys.readouterr()
    flags = ["--ckpt_path", "last"]
    assert "argument --port: invalid int value: 'http'" in told(*flags, "--port", "http")
    assert "--host 127.0.0.1 --port 70000: cannot listen there (bind(): port" in told(*flags, "--port", "70000")
    assert "--host no.such.invalid --port 0: cannot listen there (" in told(
        *flags, "--host", "no.such.invalid", "--port", "0"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use" in told(
            *flags, "--port", port
        )


def test_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--ckpt_path", "best"]) == 2
    assert capsys.readouterr().err == "lit_mnist: error: demo needs gradio: pip install 'lit_mnist[demo]'\n"


@pytest.fixture
def server(real_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A demo of a network that has seen a part of MNIST, which reads plain digits."""
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--data.root", str(real_root.resolve()), "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    assert main([*fit, "--trainer.limit_train_batches", "150", "--data.val_size", "1000"]) == 0
    (tmp_path / "left").mkdir()
    program = [sys.executable, "-m", "lit_mnist", "demo", "--ckpt_path", "best", "--port", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "left")}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_in_a_browser(browser: Chrome, server: subprocess.Popen[str], tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    assert server.stdout
    assert server.stderr
    address = next(
        match[1] for line in server.stdout if (match := re.match(r"Draw at (http://127\.0\.0\.1:\d+) ", line))
    )
    browser.get(address)

    def visible(selector: str) -> WebElement:
        def find(_: Chrome) -> WebElement | None:
            return next(
                (each for each in browser.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()), None
            )

        found = WebDriverWait(browser, 60).until(find, selector)
        assert found
        return found

    def shows(selector: str, text: str) -> None:
        WebDriverWait(browser, 60).until(lambda _: visible(selector).text == text, f"{selector}: {text}")

    for digit, corners in STROKES.items():
        visible("#sketch [aria-label='Brush Size']")  # the pen is taken
        canvas = visible("#sketch canvas")
        pointer = ActionChains(browser, duration=50)
        for index, (across, down) in enumerate(corners):
            side = demo.SIDE
            pointer.move_to_element_with_offset(canvas, round((across - 0.5) * side), round((down - 0.5) * side))
            if index == 0:
                pointer.click_and_hold()
        pointer.release().perform()
        shows("[data-testid='label-output-value']", digit)
        assert len(browser.find_elements(By.CSS_SELECTOR, "[data-testid$='-confidence-set']")) == 10
        visible("#seen img")
        visible("#sketch [aria-label='Clear canvas']").click()
        WebDriverWait(browser, 60).until_not(lambda _: browser.find_elements(By.CSS_SELECTOR, "#seen img"))

    # an example and a file of one's own, and files that are refused
    label = "[data-testid='label-output-value']"
    browser.find_elements(By.CSS_SELECTOR, "img[src$='/4.png']")[0].click()
    shows(label, "4")
    assert visible("#photograph img").get_attribute("src")
    visible("#photograph [aria-label='Remove Image']").click()

    def drop(path: Path) -> None:
        browser.find_element(By.CSS_SELECTOR, "#photograph input[type=file]").send_keys(str(path))

    drop(picture(tmp_path / "one.png"))
    shows(label, "1")
    visible("#photograph [aria-label='Remove Image']").click()
    Image.new("L", (10_000, 6_000), 255).save(tmp_path / "wide.png")
    drop(tmp_path / "wide.png")
    shows("#seen .prose", "10000x6000 pixels, at most 50,000,000 are read")
    visible("#photograph [aria-label='Remove Image']").click()
    (tmp_path / "heavy.png").write_bytes(bytes(demo.PHOTOGRAPH_LIMIT + 1))
    drop(tmp_path / "heavy.png")
    assert 'exceed the maximum allowed size of 20.0 Mb: "heavy.png"' in visible(".toast-body").text

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"}
    assert len(addresses) > 20
    assert not [each for each in addresses if not each.startswith((address, "data:", f"blob:{address}", "chrome:"))]

    assert len(list((tmp_path / "left").glob("lit_mnist-*/*"))) > 10
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 143
    assert server.stderr.read() == "lit_mnist: stopped by SIGTERM\n"
    assert list((tmp_path / "left").iterdir()) == []
