import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import RUN, TINY, Command, assert_same, events, last, last_checkpoint, results
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import decode_image

from lit_mnist import board
from lit_mnist.data.datamodule import MNISTDataModule


def hparams(run: EventAccumulator) -> Any:
    content = run.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    return plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams


def test_what_the_board_shows(command: Command, tiny_root: Path) -> None:
    assert command("fit", *TINY, "--data.shift", "2") == 0
    run = events(RUN)
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
    assert torch.equal(shown, board.grid(images[:32], columns=8, width=56))
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


def test_a_resumed_run_shows_its_present_settings_and_each_score_once(command: Command) -> None:
    assert command("fit", *TINY, "--trainer.max_epochs", "1") == 0
    first = shutil.copy(last(), RUN / "checkpoints" / "first.ckpt")
    assert command("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3", "--model.lr", "0.1") == 0
    for path, *fewer in (("last",), (str(first),), ("last",), ("last", "--trainer.limit_test_batches", "1")):
        assert command("test", "--ckpt_path", path, "--trainer.accelerator", "cpu", *fewer) == 0
    shown = events(RUN)
    scores = {test["step"]: pytest.approx(test["test/loss"]) for test in results()["test"] if test["whole"]}
    assert {event.step: event.value for event in shown.Scalars("test/loss")} == scores
    assert (len(shown.Scalars("test/loss")), len(list(RUN.glob("0tests*")))) == (2, 1)
    settings = hparams(shown)
    assert (settings["lr"].number_value, settings["max_epochs"].number_value) == (0.1, 3)
    (text,) = shown.Tensors("command/text_summary")
    assert text.tensor_proto.string_val[0].count(b"python -m lit_mnist fit") == 2
    assert "lr: 0.1\n" in (RUN / "hparams.yaml").read_text()


def test_switches_do_not_change_the_training(command: Command) -> None:
    more = [*TINY, "--model.dropout", "0.2", "--data.shift", "2", "--trainer.max_epochs", "4"]
    assert command("fit", *more, "--board.every_n_epochs", "0") == 0
    tags = events(RUN).Tags()
    assert tags["images"] == []
    assert not [tag for tag in tags["scalars"] if tag.startswith(("norm", "val_class"))]
    assert command("fit", *more, "--board.every_n_epochs", "2") == 0
    accumulator = events(RUN.with_name("version_1"))
    # every second epoch, and the last
    assert [event.step for event in accumulator.Images("answers/confusion matrix")] == [6, 20, 27]
    assert_same(*(last_checkpoint(run)["state_dict"] for run in (RUN, RUN.with_name("version_1"))))


def test_pictures_that_are_drawn() -> None:
    pixels = board.grid(torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2), columns=2, width=2)
    assert [int(pixels[0, y, x]) for y, x in ((4, 4), (5, 11), (10, 4), (0, 0), (6, 4))] == [0, 1, 2, 255, 255]
    assert board.grid(BYTES, columns=8, width=56).shape == (3, 48, 8 * 28 + 4)  # each 40x24
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


class Anything(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.weight = "a name", nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        size = len(batch["image"] if isinstance(batch, dict) else batch[0])
        return torch.eye(4)[torch.arange(size) % 4]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


BYTES = torch.randint(0, 256, (8, 3, 20, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(8) % 4
ANSWERS, PICTURES = {"answers/confusion matrix"}, {"train/images"}
ERRORS = ANSWERS | {"answers/most confident errors"}
BATCHES: dict[str, tuple[Any, set[str]]] = {
    "classes": ((BYTES, CLASSES), PICTURES | ERRORS),
    "grey, values": ((BYTES[:, :1], torch.rand(8)), PICTURES),
    "masks": ((BYTES, BYTES[:, 0].long()), PICTURES),
    "ignored": ((BYTES, CLASSES - 1), PICTURES),
    "three": ((BYTES, CLASSES, CLASSES), PICTURES | ERRORS),
    "a dict": ({"image": BYTES, "label": CLASSES}, PICTURES),
    "numbers": ((torch.rand(8, 5), CLASSES), ANSWERS),
    "bands": ((torch.rand(8, 4, 9, 9), CLASSES), ANSWERS),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_other_experiments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, expected = BATCHES[name]
    writer = MagicMock()
    monkeypatch.setattr(board.Board, "writer", lambda *_: writer)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[board.Board()], logger=CSVLogger(tmp_path), **options)
    smaller = (batch[0][:, :, :5], *batch[1:]) if name == "bands" else batch  # another size within an epoch
    loaders: Any = [DataLoader(each, batch_size=None) for each in ([batch], [batch, smaller], [batch])]  # type: ignore[arg-type]
    data: Any = LightningDataModule()
    data.train_dataloader, data.val_dataloader = lambda: loaders[0], lambda: loaders[1:]
    if name != "numbers":
        data.plot = lambda batch: batch["image"] if name == "a dict" else batch[0]
    trainer.fit(Anything(), datamodule=data)
    assert {call.args[0] for call in writer.add_image.call_args_list} == expected
