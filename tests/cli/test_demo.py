import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from helpers import Capsys, fails
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.support.ui import WebDriverWait
from test_predict import picture
from torch import Tensor, nn

from lit_mnist.pictures.prepare import NO_PICTURE, digit, grey_levels
from lit_mnist.pictures.report import classify

Server = tuple[subprocess.Popen[str], str, int]  # its process, and where it listens


def draw(browser: Chrome) -> None:
    """Draw a seven, and wait for the answer to it."""
    sheet = browser.find_element("id", "sheet")
    WebDriverWait(browser, 60).until(lambda _: not browser.find_element("id", "state").text)
    pointer = ActionChains(browser, duration=50)
    for number, place in enumerate([(0.3, 0.2), (0.7, 0.2), (0.45, 0.8)]):  # in shares of the sheet's side
        across, down = (round((share - 0.5) * sheet.size["width"]) for share in place)
        pointer.move_to_element_with_offset(sheet, across, down)
        if not number:
            pointer.click_and_hold()
    pointer.release().perform()
    browser.execute_async_script("turn.then(arguments[0])")


def bars(browser: Chrome) -> list[float]:
    script = "return Array.from(document.querySelectorAll('#bars b'), (bar) => parseFloat(bar.textContent))"
    return [float(percentage) for percentage in browser.execute_script(script)]  # all at one moment


def pixels(browser: Chrome) -> Tensor:
    """What a page's network sees, uint8 (1, 1, 28, 28)."""
    script = "return Array.from(byId('seen').getContext('2d').getImageData(0, 0, 28, 28).data)"
    levels: list[int] = browser.execute_script(script)
    return torch.tensor(levels[::4], dtype=torch.uint8).view(1, 1, 28, 28)


def stray_requests(browser: Chrome, *allowed: str) -> list[str]:
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = {each["params"]["request"]["url"] for each in entries if each["method"] == "Network.requestWillBeSent"}
    return [url for url in sent if not url.startswith(("data:", "chrome:", *allowed))]


@pytest.fixture
def server(network: nn.Module) -> Iterator[Server]:
    program = [sys.executable, "-m", "lit_mnist", "demo", "--ckpt_path", "best", "--port", "0"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        found = (re.match(r"Draw at http://(127\.0\.0\.1):(\d+) ", line) for line in process.stdout)
        match = next(match for match in found if match)
        yield process, match[1], int(match[2])
    finally:
        process.kill()
        process.communicate()


def ask(host: str, port: int, body: bytes, name: str = "localhost") -> tuple[int, bytes]:
    connection = HTTPConnection(host, port, timeout=60)
    connection.request("POST", "/read", body, {"Host": name})
    response = connection.getresponse()
    return response.status, response.read()


def test_answers_and_refusals(server: Server, tmp_path: Path, capsys: Capsys) -> None:
    process, host, port = server
    before = {*tmp_path.rglob("*")}
    path = picture(tmp_path / "one.png")
    for known in ("localhost", f"{host}:{port}"):
        status, answer = ask(host, port, path.read_bytes(), known)
        assert (status, json.loads(answer)["pixels"]) == (200, digit(grey_levels(path)).flatten().tolist())
        assert sum(json.loads(answer)["probabilities"]) == pytest.approx(1)
    assert ask(host, port, path.read_bytes(), f"{host}.example.org:{port}") == (403, b"")
    nothing = {"pixels": [], "probabilities": [], "problem": NO_PICTURE}
    assert json.loads(ask(host, port, b"no picture")[1]) == nothing
    assert {*tmp_path.rglob("*")} - before == {path}
    taken = fails(capsys, "demo", "--ckpt_path", "best", "--port", str(port))
    assert f"--host {host} --port {port}: cannot listen there (" in taken
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "lit_mnist: stopped by SIGINT\n")
    assert process.returncode == 130


def test_in_a_browser(browser: Chrome, network: nn.Module, server: Server, tmp_path: Path) -> None:
    _, host, port = server
    address = f"http://{host}:{port}/"
    browser.get(address)
    draw(browser)
    probabilities = classify(network, pixels(browser))[0]
    assert bars(browser) == pytest.approx((100 * probabilities).tolist(), abs=0.06)
    assert browser.find_element("id", "digit").text == str(int(probabilities.argmax()))
    browser.find_element("id", "clear").click()
    WebDriverWait(browser, 60).until(lambda _: not bars(browser))
    choose = browser.find_element("id", "file")
    choose.send_keys(str(picture(tmp_path / "one.png")))
    WebDriverWait(browser, 60).until(lambda _: bars(browser))
    assert torch.equal(pixels(browser)[0], digit(grey_levels(tmp_path / "one.png")))
    (tmp_path / "letter.png").write_bytes(b"no picture")
    choose.send_keys(str(tmp_path / "letter.png"))
    WebDriverWait(browser, 60).until(lambda _: browser.find_element("id", "state").text == NO_PICTURE)
    assert not stray_requests(browser, address, f"blob:{address}")
