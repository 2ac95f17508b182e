from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lit_mnist import MNISTDataModule, board
from lit_mnist.__main__ import main

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

RUN = Path("lightning_logs/version_0")
Command = Callable[..., int]

TINY = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "2"]
TINY += ["--model.layers", "4x5/2 8/2", "--model.lr", "0.05", "--data.batch_size", "50", "--data.val_size", "50"]


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture
def run(command: Command) -> EventAccumulator:
    assert command("fit", *TINY, "--data.shift", "2") == 0
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu") == 0
    return events(RUN)


def picture(accumulator: EventAccumulator, tag: str, index: int = -1) -> np.ndarray:
    path = Path("picture.png")
    path.write_bytes(accumulator.Images(tag)[index].encoded_image_string)
    with Image.open(path) as image:
        return np.asarray(image)


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
    expected = board.grid(images[:32], columns=8, zoom=2)
    assert np.array_equal(picture(run, "train/images"), expected.permute(1, 2, 0).numpy())

    scalars = {tag: [event.step for event in run.Scalars(tag)] for tag in run.Tags()["scalars"]}
    assert scalars["norm/gradients"] == scalars["norm/weights"] == scalars["train/loss_step"] == [1, 3, 5, 7, 9, 11, 13]
    assert all(event.value > 0 for event in run.Scalars("norm/gradients"))
    accuracy = [run.Scalars(f"val_class_accuracy/{digit}")[-1].value for digit in range(10)]
    assert np.mean(accuracy) == pytest.approx(run.Scalars("val/accuracy")[-1].value, abs=1e-6)  # 5 images of each
    tensors = set(run.Tags()["tensors"])
    assert {f"val_class/{digit}" for digit in range(10)} <= tensors
    assert run.Tags()["graph"]
    (typed,) = run.Tensors("command/text_summary")
    assert "python -m lit_mnist fit" in typed.tensor_proto.string_val[0].decode()
    assert (
        torch.__version__.partition("+")[0]
        in run.Tensors("conditions/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert "DigitNet" in run.Tensors("model/text_summary")[0].tensor_proto.string_val[0].decode()
    layout = run.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^train/loss$" in layout
    assert b"^val/loss$" in layout

    # the tab of the hyperparameters: the run's settings, and its metrics under the names of its scalars
    start = plugin_data_pb2.HParamsPluginData.FromString(
        run.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    )
    settings = start.session_start_info.hparams
    assert settings["lr"].number_value == 0.05
    assert settings["max_epochs"].number_value == 2  # not as it is by default
    assert not {"dropout", "momentum", "accumulate_grad_batches"} & settings.keys()
    assert settings["layers"].string_value == "4x5/2 8/2"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(run.PluginTagToContent("hparams")["_hparams_/experiment"])
    assert [info.name for info in experiment.experiment.hparam_infos][:4] == ["recipe", "lr", "layers", "seed"]
    columns = {info.name.tag for info in experiment.experiment.metric_infos}
    assert columns == set(board.HPARAM_METRICS) <= scalars.keys()
    assert "hp_metric" not in scalars

    embedding = RUN / "00014" / "test"
    assert len((embedding / "metadata.tsv").read_text().split()) == 100
    assert np.loadtxt(embedding / "tensors.tsv").shape == (100, 8)
    assert (embedding / "sprite.png").exists()


def test_switches(command: Command) -> None:
    assert command("fit", *TINY, "--board.every_n_epochs", "0") == 0
    assert command("test", "--ckpt_path", "last", "--trainer.accelerator", "cpu", "--board.every_n_epochs", "0") == 0
    tags = events(RUN).Tags()
    assert tags["images"] == []
    assert not [tag for tag in tags["scalars"] if tag.startswith(("norm", "val_class"))]
    assert not (RUN / "00014").exists()
    more = [*TINY, "--trainer.max_epochs", "4", "--board.every_n_epochs", "2", "--board.histograms", "true"]
    assert command("fit", *more) == 0
    accumulator = events(Path("lightning_logs/version_1"))
    # every second epoch, and the last
    assert [event.step for event in accumulator.Images("answers/confusion matrix")] == [6, 20, 27]
    assert "weights/head.weight" in accumulator.Tags()["histograms"]
    assert main(["fit", "--board.every_n_epochs", "-1"]) == 2


def test_the_training_does_not_depend_on_the_board(command: Command) -> None:
    def weights(number: int) -> dict[str, torch.Tensor]:
        (last,) = Path(f"lightning_logs/version_{number}/checkpoints").glob("last-*.ckpt")
        loaded: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
        return loaded

    more = [*TINY, "--model.dropout", "0.2", "--data.shift", "2"]
    assert command("fit", *more, "--board.every_n_epochs", "0") == 0
    assert command("fit", *more, "--board.histograms", "true") == 0
    ours, theirs = weights(0), weights(1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_grid() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    pixels = board.grid(images, columns=2)
    assert pixels.shape == (3, 16, 16)
    assert [int(pixels[0, y, x]) for y, x in ((4, 4), (5, 11), (10, 4), (0, 0), (6, 4))] == [0, 1, 2, 255, 255]
    assert board.grid(images, columns=2, zoom=3).shape == (3, 24, 24)


def test_confusion_and_wrong_digits() -> None:
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[3, 3], counts[3, 5], counts[7, 7] = 9, 1, 4
    cell = 44

    def colour(truth: int, answer: int) -> list[int]:
        pixel = board.confusion(counts, cell)[30 + cell * (truth + 1) + 2, 30 + cell * (answer + 1) + 2]
        return [int(value) for value in pixel]

    assert colour(3, 3)[2] == 255 > colour(3, 3)[0]  # right: blue
    assert colour(3, 5)[0] == 255 > colour(3, 5)[2]  # wrong: red
    assert colour(5, 3) == [255, 255, 255]

    images = torch.stack([torch.full((1, 28, 28), level, dtype=torch.uint8) for level in (10, 20, 30, 40)])
    targets = torch.tensor([0, 1, 2, 3])
    probabilities = torch.zeros(4, 10)
    probabilities[0, 0], probabilities[1, 7], probabilities[2, 7], probabilities[3, 3] = 0.9, 0.6, 0.8, 0.9
    drawn = board.wrong_digits(images, probabilities, targets)
    # two are wrong; the surest one first
    assert [int(drawn[20, x, 0]) for x in (20, 140, 260)] == [30, 20, 255]
    assert board.wrong_digits(images[:1], probabilities[:1], targets[:1]).shape[0] > 0


TEXT = """
function walk(node) {
  if (node.nodeType == Node.TEXT_NODE) return node.textContent + ' ';
  if (node.nodeName == 'STYLE' || node.nodeName == 'SCRIPT') return '';
  let text = node.shadowRoot ? walk(node.shadowRoot) : '';
  for (const child of node.childNodes) text += walk(child);
  return text;
}
return walk(document.body).replace(/\\s+/g, ' ');
"""


LOADED_IMAGES = """
function count(node) {
  let loaded = node.nodeName == 'IMG' && node.naturalWidth > 0 ? 1 : 0;
  if (node.shadowRoot) loaded += count(node.shadowRoot);
  for (const child of node.childNodes) loaded += count(child);
  return loaded;
}
return count(document.body);
"""


@pytest.fixture
def address(run: EventAccumulator) -> Iterator[str]:
    """Where TensorBoard serves the run."""
    program = [sys.executable, "-m", "tensorboard.main", "--logdir", "lightning_logs", "--port", "0"]
    server = subprocess.Popen([*program, "--load_fast", "false"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        for line in server.stderr:
            if match := re.search(r"http://localhost:\d+", line):
                yield match[0]
                break
    finally:
        server.kill()
        server.communicate()


def test_in_a_browser(run: EventAccumulator, address: str, browser: Chrome) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    def shows(tab: str, *words: str) -> None:
        """Fail unless the tab shows all the words within a while."""
        browser.get("about:blank")
        browser.get(f"{address}/#{tab}")
        missing: list[str] = []
        for _ in range(60):
            text = browser.execute_script(TEXT)
            missing = [word for word in words if word not in text]
            if not missing:
                return
            time.sleep(1)
        pytest.fail(f"{tab}: {', '.join(missing)} not in: {text[:2000]}")

    def counts(script: str, least: int) -> None:
        """Fail unless the script counts as many within a while."""
        WebDriverWait(browser, 60).until(lambda _: browser.execute_script(script) >= least, script)

    accuracy = f"{run.Scalars('val/accuracy')[-1].value:#.5g}"
    shows("timeseries", "by_epoch/train", "/accuracy", "version_0", "Pinned")
    counts("return document.querySelectorAll('card-view').length", 2)
    shows("custom_scalars", "by step", "train/loss (", "val/loss (", "by epoch", "each digit")
    shows("images", "answers/confusion matrix", "answers/most confident errors", "filters/first layer", "step 13")
    counts(LOADED_IMAGES, 2)
    shows("hparams", "Trial ID", "version_0", "batch_size", "50.000", "val/accuracy", accuracy)
