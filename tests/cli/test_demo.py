import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Capsys, fails
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.support.ui import WebDriverWait
from test_predict import picture
from torch import Tensor, nn
from torch.testing import assert_close

from lit_mnist.cli.demo import fill_page
from lit_mnist.pictures import report
from lit_mnist.pictures.prepare import NO_PICTURE

Server = tuple[subprocess.Popen[str], int]  # its process and port
# Their lines, as places across and down in eighths of the sheet
DIGITS = ["41 25 35 47 55 65 63 41", "31 41 47", "23 31 51 63 54 27 67", "21 51 63 44 65 57 37 26", "31 24 64/53 57"]
DIGITS += ["31 34 54 65 57 27/31 61", "51 33 26 47 66 55 36", "21 61 37", "53 41 23 35 57 46 54 62 41"]
DIGITS += ["63 41 23 44 63 67"]


def draw(browser: Any, lines: str, left: float = 0, scale: float = 1, kind: str = "mouse") -> None:
    """Draw lines such as those of DIGITS, moved to the right by LEFT of the sheet."""
    sheet = browser.find_element("id", "sheet")
    for line in lines.split("/"):
        builder = ActionBuilder(browser, mouse=PointerInput(kind, kind), duration=0)
        for number, place in enumerate(line.split()):
            across, down = (scale * (int(digit) / 8 - 0.5) * sheet.size["width"] for digit in place)
            builder.pointer_action.move_to(sheet, round(across + left * sheet.size["width"]), round(down))
            if not number:
                builder.pointer_action.pointer_down()
        builder.pointer_action.pointer_up()
        builder.perform()


def read(browser: Any) -> list[str]:
    """Return the labels that a page shows in the end."""
    script = "return document.getElementById('answers').ariaBusy"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(script) == "false")
    return [label.text for label in browser.find_elements("css selector", "figure b")]


def bars(browser: Any) -> list[float]:
    script = "return Array.from(document.querySelectorAll('#bars b'), (bar) => parseFloat(bar.textContent))"
    return [float(percentage) for percentage in browser.execute_script(script)]  # all at one moment


def pixels(browser: Any) -> Tensor:
    """What a page's network sees, uint8 (1, 28, 28)."""
    brush = "document.querySelector('figure canvas').getContext('2d')"
    levels: list[int] = browser.execute_script(f"return [...{brush}.getImageData(0, 0, 28, 28).data]")
    return torch.tensor(levels[::4], dtype=torch.uint8).view(1, 28, 28)


@pytest.fixture
def server(network: nn.Module) -> Iterator[Server]:
    program = [sys.executable, "-m", "lit_mnist", "demo", "--ckpt_path", "best", "--port", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = (re.match(r"Draw at http://127\.0\.0\.1:(\d+) ", line) for line in process.stdout)
        yield process, next(int(match[1]) for match in found if match)
        process.kill()


def ask(port: int, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, {"Host": "localhost", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read()) if response.status == 200 else None


def test_answers_and_refusals(server: Server, network: nn.Module, tmp_path: Path, capsys: Capsys) -> None:
    process, port = server
    before = {*tmp_path.rglob("*")}
    path = picture(tmp_path / "one.png")
    (seen,) = report.read(network, path)
    assert seen.digit is not None
    for known in ("localhost", f"127.0.0.1:{port}"):
        status, (found,) = ask(port, "/picture", path.read_bytes(), Host=known)
        assert (status, found["pixels"]) == (200, seen.digit.flatten().tolist())
        assert found["probabilities"] == pytest.approx(seen.probabilities)
    assert ask(port, "/digit", seen.digit.numpy().tobytes())[1] == pytest.approx(seen.probabilities)
    assert len(ask(port, "/several", picture(path, 0, (40, 140), 200).read_bytes())[1]) == 2
    nothing = {"pixels": [], "probabilities": [], "problem": NO_PICTURE}
    assert ask(port, "/picture", b"no picture") == (200, [nothing])
    assert ask(port, "/picture", path.read_bytes(), Host=f"127.0.0.1.example.org:{port}")[0] == 403
    for length in ("ten", "-1", "9" * 5000):
        assert ask(port, "/picture", b"", **{"Content-Length": length})[0] == 400
    for asked, body in {"/digit": bytes(783), "/picture": b"", "/no": b"-"}.items():
        assert ask(port, asked, body)[0] == 400
    assert {*tmp_path.rglob("*")} - before == {path}
    taken = fails(capsys, "demo", "--ckpt_path", "best", "--port", str(port))
    assert f"--host 127.0.0.1 --port {port}: cannot listen there (" in taken
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "lit_mnist: stopped by SIGINT\n")  # and no traceback
    assert process.returncode == 130


def test_a_checkpoint_can_end_no_script() -> None:
    settings = {"hyper_parameters": {"classes": 10}, "datamodule_hyper_parameters": {"name": "kmnist"}}
    page = fill_page(settings, "</script>").decode()
    filled = json.loads(page.split("parts } = ")[1].split(";  //")[0])
    assert ("".join(filled["names"]), filled["about"]) == ("おきすつなはまやれを", "</script>")
    assert page.count("</script>") == 1


def test_in_a_browser(browser: Any, network: nn.Module, server: Server, tmp_path: Path) -> None:
    browser.get(f"http://127.0.0.1:{server[1]}/")
    assert read(browser) == []
    assert "(255, 255, 255" in browser.find_element("id", "sheet").value_of_css_property("background-color")
    for kind, lines in {"mouse": DIGITS[5], "touch": DIGITS[8]}.items():
        browser.find_element("id", "clear").click()
        draw(browser, lines, kind=kind)
        answer = read(browser)
        probabilities = report.classify(network, pixels(browser)[None])[0]
        assert bars(browser) == pytest.approx((100 * probabilities).tolist(), abs=0.06)
        assert answer == [str(int(probabilities.argmax()))]
        inked = (pixels(browser)[0] > 25).nonzero()
        assert int((inked.amax(0) - inked.amin(0)).max()) in (19, 20)  # as in MNIST
    draw(browser, "77 77", scale=0.9)
    assert len(read(browser)) == 2
    assert browser.find_element("css selector", ".grey figcaption").text == "not sure"  # a dot
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    assert read(browser) == answer
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert (read(browser), bars(browser)) == ([], [])
    browser.find_element("id", "undo").send_keys(Keys.ENTER)
    assert read(browser) == answer
    choose = browser.find_element("id", "file")
    choose.send_keys(str(picture(tmp_path / "one.png")))
    assert len(read(browser)) == 1
    (seen,) = report.read(network, tmp_path / "one.png")
    assert_close(pixels(browser), seen.digit)
    choose.send_keys(str(picture(tmp_path / "two.png", 0, (40, 140), 200)))
    browser.find_element("id", "several").click()
    assert len(read(browser)) == 2
    (tmp_path / "letter.png").write_bytes(b"no picture")
    choose.send_keys(str(tmp_path / "letter.png"))
    assert (read(browser), browser.find_element("id", "state").text) == ([], NO_PICTURE)
    browser.browsing_context.set_viewport(context=browser.current_window_handle, viewport={"width": 320, "height": 640})
    sizes = "const page = document.documentElement; return [innerWidth, page.scrollWidth - page.clientWidth]"
    assert browser.execute_script(sizes) == [320, 0]
