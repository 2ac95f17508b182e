import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import RUN, TINY, Command, assert_same, last_checkpoint, results
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torchvision.io import decode_image

from lit_mnist import MNISTDataModule, board
from lit_mnist.__main__ import main


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


@pytest.fixture
def run(command: Command) -> EventAccumulator:
    assert command("fit", *TINY, "--data.shift", "2") == 0
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    return events(RUN)


def hparams(accumulator: EventAccumulator) -> Any:
    content = accumulator.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    return plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams


def test_what_the_board_shows(run: EventAccumulator, tiny_root: Path) -> None:
    steps = {tag: [event.step for event in run.Images(tag)] for tag in run.Tags()["images"]}
    assert steps == {
        "train/images": [0, 7],
        "answers/confusion matrix": [6, 13],
        "answers/most confident errors": [6, 13],
        "filters/first layer": [6, 13],
    }
    # the very pixels that the first step of the second epoch saw
    data = MNISTDataModule(str(tiny_root), batch_size=50, val_size=50, shift=2)
    data.setup("fit")
    batches = data.train_dataloader()
    batches.sampler.set_epoch(1)
    images, _ = data.augment(*next(iter(batches)))
    png = bytearray(run.Images("train/images")[-1].encoded_image_string)
    shown = decode_image(torch.frombuffer(png, dtype=torch.uint8))
    assert torch.equal(shown, board.grid(images[:32], columns=8, zoom=2))

    scalars = {tag: run.Scalars(tag) for tag in run.Tags()["scalars"]}
    for tag in ("norm/gradients", "norm/weights", "train/loss_step"):
        assert [event.step for event in scalars[tag]] == [1, 3, 5, 7, 9, 11, 13]
        assert all(event.value > 0 for event in scalars[tag])
    accuracy = [scalars[f"val_class_accuracy/{digit}"][-1].value for digit in range(10)]
    assert np.mean(accuracy) == pytest.approx(scalars["val/accuracy"][-1].value, abs=1e-6)  # 5 images of each
    assert {f"val_class/{digit}" for digit in range(10)} <= set(run.Tags()["tensors"])
    assert run.Tags()["graph"]
    texts = {"command": "python -m lit_mnist fit", "conditions": torch.__version__.split("+")[0], "model": "DigitNet"}
    texts = {f"{title}/text_summary": part for title, part in texts.items()}
    for tag, part in (texts | {"custom_scalars__config__": "^(train|val)/loss$"}).items():
        assert part.encode() in run.Tensors(tag)[0].tensor_proto.string_val[0]

    # the tab of the hyperparameters: all settings, of one type in all runs; TensorBoard finds those that differ
    settings = hparams(run)
    assert [settings[name].number_value for name in ("lr", "max_epochs", "seed")] == [0.05, 2, 1]
    assert settings["layers"].string_value == "4x5/2 8/2"
    assert settings["limit_train_batches"].string_value == "None"
    assert {"ema_decay", "network", "dropout", "recipe"} <= settings.keys()
    assert "_hparams_/experiment" not in run.PluginTagToContent("hparams")
    assert "hp_metric" not in scalars

    embedding = RUN / "00014" / "test"
    assert len((embedding / "metadata.tsv").read_text().split()) == 100
    assert np.loadtxt(embedding / "tensors.tsv").shape == (100, 8)
    assert (embedding / "sprite.png").exists()


def test_a_resumed_run_shows_its_present_settings_and_each_score_once(command: Command) -> None:
    assert command("fit", *TINY, "--trainer.max_epochs", "1") == 0
    (first,) = RUN.glob("checkpoints/best-*")
    kept = shutil.copy(first, "kept.ckpt")
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", "--model.lr", "0.1") == 0
    shutil.copy(kept, first)
    cpu = ["--trainer.accelerator", "cpu"]
    for path, *fewer in (("last",), (str(first),), ("last",), ("last", "--trainer.limit_test_batches", "1")):
        assert command("test", "--ckpt_path", path, *cpu, *fewer) == 0
    shown = events(RUN)
    scores = {test["step"]: pytest.approx(test["test/loss"]) for test in results()["test"] if test["whole"]}
    assert {event.step: event.value for event in shown.Scalars("test/loss")} == scores
    assert len(shown.Scalars("test/loss")) == 2
    assert len(list(RUN.glob("0tests*"))) == 1
    assert max(event.step for event in shown.Scalars("epoch")) == 20
    settings = hparams(shown)
    assert (settings["lr"].number_value, settings["max_epochs"].number_value) == (0.1, 3)
    (text,) = shown.Tensors("command/text_summary")
    assert text.tensor_proto.string_val[0].count(b"python -m lit_mnist fit") == 2
    assert "lr: 0.1\n" in (RUN / "hparams.yaml").read_text()


def test_switches_do_not_change_the_training(command: Command) -> None:
    more = [*TINY, "--model.dropout", "0.2", "--data.shift", "2", "--trainer.max_epochs", "4"]
    assert command("fit", *more, "--board.every_n_epochs", "0") == 0
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu", "--board.every_n_epochs", "0") == 0
    tags = events(RUN).Tags()
    assert tags["images"] == []
    assert not [tag for tag in tags["scalars"] if tag.startswith(("norm", "val_class"))]
    assert not (RUN / "00028").exists()
    assert command("fit", *more, "--board.every_n_epochs", "2", "--board.histograms", "true") == 0
    accumulator = events(RUN.with_name("version_1"))
    # every second epoch, and the last
    assert [event.step for event in accumulator.Images("answers/confusion matrix")] == [6, 20, 27]
    assert "weights/head.weight" in accumulator.Tags()["histograms"]
    assert_same(*(last_checkpoint(run)["state_dict"] for run in (RUN, RUN.with_name("version_1"))))
    assert main(["fit", "--board.every_n_epochs", "-1"]) == 2


def test_grid() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    pixels = board.grid(images, columns=2, zoom=1)
    assert pixels.shape == (3, 16, 16)
    assert [int(pixels[0, y, x]) for y, x in ((4, 4), (5, 11), (10, 4), (0, 0), (6, 4))] == [0, 1, 2, 255, 255]


def test_confusion_and_wrong_digits() -> None:
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[3, 3], counts[3, 5], counts[7, 7] = 9, 1, 4
    colours = board.confusion(counts)[:, 2 + 2 * 44 :: 44, 2 + 44 :: 44]  # rows are the truth, columns the answers
    assert colours[2, 3, 3] == 255 > colours[0, 3, 3]  # right: blue
    assert colours[0, 3, 5] == 255 > colours[2, 3, 5]  # wrong: red
    assert colours[:, 5, 3].tolist() == [255, 255, 255]

    images = torch.tensor([10, 20, 30, 40], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 28, 28)
    probabilities, targets = torch.zeros(4, 10), torch.arange(4)
    probabilities[range(4), [0, 7, 7, 3]] = torch.tensor([0.9, 0.6, 0.8, 0.9])
    drawn = board.wrong_digits(images, probabilities, targets)
    assert drawn[0, 60, [60, 210]].tolist() == [30, 20]  # two are wrong; the surest one first
    assert drawn.shape == (3, 184, 332)
    assert board.wrong_digits(images[:1], probabilities[:1], targets[:1]).float().mean() > 240


# every node of a page, those in the shadow of another too
WALK = r"""
const walk = (node) => [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].flatMap(
  (each) => /STYLE|SCRIPT/.test(each.nodeName) ? [] : [each, ...walk(each)]);
const nodes = walk(document.body), texts = nodes.filter((node) => node.nodeType == Node.TEXT_NODE);
return [texts.map((node) => node.textContent).join(' ').replace(/\s+/g, ' '),
        nodes.filter((node) => node.naturalWidth > 0).length, document.querySelectorAll('card-view').length];
"""


def shows(words: list[str], images: int, cards: int, browser: Chrome) -> bool:
    found = browser.execute_script(WALK)
    return all(word in found[0] for word in words) and found[1] >= images and found[2] >= cards


@pytest.mark.slow
def test_in_a_browser(run: EventAccumulator, browser: Chrome, request: pytest.FixtureRequest) -> None:
    program = [sys.executable, "-m", "tensorboard.main", "--logdir", "lightning_logs", "--port", "0"]
    server = subprocess.Popen([*program, "--load_fast", "false"], stderr=subprocess.PIPE, text=True)
    request.addfinalizer(server.kill)
    assert server.stderr
    address = next(match[0] for line in server.stderr if (match := re.search(r"http://localhost:\d+", line)))
    accuracy = f"{run.Scalars('val/accuracy')[-1].value:#.5g}"
    pictures = ["answers/confusion matrix", "answers/most confident errors", "filters/first layer", "step 13"]
    tabs: dict[str, tuple[list[str], int, int]] = {  # the words, pictures and cards of each
        "timeseries": (["by_epoch/train", "/accuracy", "version_0", "Pinned"], 0, 2),
        "custom_scalars": (["by step", "train/loss (", "val/loss (", "by epoch", "each digit"], 0, 0),
        "images": (pictures, 2, 0),
        "hparams": (["Trial ID", "version_0", "batch_size", "val/accuracy", accuracy], 0, 0),
    }
    for tab, wanted in tabs.items():
        browser.get("about:blank")
        browser.get(f"{address}/#{tab}")
        WebDriverWait(browser, 60).until(partial(shows, *wanted), tab)
