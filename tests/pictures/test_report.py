import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import TINY, only

from lit_mnist.__main__ import main
from lit_mnist.pictures import prepare as images
from lit_mnist.pictures.prepare import Picture
from lit_mnist.pictures.report import CELL, MARGIN, contact_sheet


def picture(path: Path, colour: int = 0, size: int = 90) -> Path:
    """A thick stroke on paper of another grey."""
    image = Image.new("L", (size, size), 255 - colour)
    image.paste(colour, (40, 10, 48, 70))
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return path


def test_pictures_of_ones_own(command: Callable[..., int], tiny_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", *TINY) == 0
    capsys.readouterr()
    one, inside = picture(Path("my one.png")), picture(Path("folder/white.gif"), 255)
    broken = Path("folder/broken.jpg")
    broken.write_bytes(b"no picture")
    flags = ["--ckpt_path", "best", "--trainer.accelerator", "cpu"]
    # without MNIST: nothing of it is needed
    assert (
        main(["predict", "--data.root", "nowhere", *flags, "--data.images", str(one), "folder", "--data.val_size", "9"])
        == 0
    )
    out = capsys.readouterr().out
    run = Path("lightning_logs/version_0")
    with only(f"{run}/pictures-best-*.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(one), str(broken), str(inside)]
    assert rows[1]["problem"].startswith("no PNG")
    assert rows[1]["digit"] == rows[1]["confidence"] == rows[1]["p0"] == ""
    for row in (rows[0], rows[2]):
        probabilities = [float(row[f"p{digit}"]) for digit in range(10)]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert float(row["confidence"]) == max(probabilities) == probabilities[int(row["digit"])]
    assert rows[0]["p3"] == rows[2]["p3"]  # black on white, white on black: the same digit to the network
    lines = [line.split() for line in out.splitlines()]
    assert ["my", "one.png", rows[0]["digit"], f"{float(rows[0]['confidence']):.1%}"] in lines
    assert f"Contact sheet: {only(f'{run}/pictures-best-*.png')}" in out
    with Image.open(only(f"{run}/pictures-best-*.png")) as sheet:
        assert sheet.size == (3 * 2 * (CELL + MARGIN) + MARGIN, CELL + 56 + MARGIN)
    assert not Path("nowhere").exists()
    assert not list(run.glob("*.tmp"))

    before = {path.name: path.read_bytes() for path in run.glob("pictures-*")}
    assert main(["predict", *flags, "--data.images", str(broken)]) == 2
    assert "data.images: none of the files shows a digit" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.glob("pictures-*")} == before
    assert main(["predict", *flags, "--data.images", str(one), "--trainer.limit_predict_batches", "0"]) == 2
    assert "trainer.limit_predict_batches and trainer.fast_dev_run leave pictures out" in capsys.readouterr().err
    assert main(["predict", *flags, "--data.images", ""]) == 2
    assert "data.images must be files and folders, got an empty name" in capsys.readouterr().err
    assert main(["predict", *flags, "--data.images", "no/where.png"]) == 2
    assert "data.images: no/where.png does not exist" in capsys.readouterr().err
    assert main(["test", *flags, "--data.images", str(one)]) == 2
    assert "data.images is for predict alone" in capsys.readouterr().err
    assert main(["predict", *flags, "--data.images"]) == 2
    assert "data.images must be at least one file or folder, got []" in capsys.readouterr().err


def test_odd_names_and_deep_pictures(
    command: Callable[..., int], tiny_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of any bytes; every way to write a list; pictures of 16 bits; not the sheets of earlier predictions."""
    assert command("fit", *TINY) == 0
    flags = ["--ckpt_path", "last", "--trainer.accelerator", "cpu"]
    odd = picture(Path(os.fsdecode(b"odd\xff[bold],\n.png")))
    levels = np.full((90, 90), 60_000, np.uint16)
    levels[10:70, 40:48] = 300
    Image.fromarray(levels.astype(">u2")).save("deep.tif")
    assert main(["predict", *flags, f"--data.images={odd}", "--data.images", "deep.tif"]) == 0
    assert "odd\\udcff[bold]," in capsys.readouterr().out
    with only("lightning_logs/version_0/pictures-last-*.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(odd), "deep.tif"]
    assert rows[0]["p3"] == pytest.approx(rows[1]["p3"])
    assert sorted(images.find(["."])) == sorted([Path("deep.tif"), odd])


def test_several_digits(command: Callable[..., int], tiny_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each digit of a picture gets a row with its box; a picture without one, a row that says so."""
    assert command("fit", *TINY) == 0
    image = Image.new("L", (300, 120), 255)
    for left in (40, 140, 240):
        image.paste(0, (left, 20, left + 10, 100))
    image.save("number.png")
    Image.new("L", (90, 90), 255).save("blank.png")
    flags = ["predict", "--ckpt_path", "best", "--trainer.accelerator", "cpu"]
    assert main([*flags, "--data.images", "number.png", "blank.png", "--data.split", "true"]) == 0
    out = capsys.readouterr().out
    with only("lightning_logs/version_0/pictures-best-*.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["box"], row["x"], row["y"], row["width"], row["height"]) for row in rows] == [
        *(("number.png", str(number), str(x), "20", "10", "80") for number, x in ((1, 40), (2, 140), (3, 240))),
        ("blank.png", "", "", "", "", ""),
    ]
    assert rows[3]["problem"] == "nothing stands out from the background"
    assert len({row["p3"] for row in rows[:3]}) == 1
    assert ["number.png", "2", "140,", "20,", "10,", "80"] in [line.split()[:6] for line in out.splitlines()]
    assert only("lightning_logs/version_0/pictures-best-*.png").exists()

    assert main([*flags, "--data.split", "true"]) == 2
    assert "data.split must be false without data.images, got True" in capsys.readouterr().err


def test_contact_sheet(tmp_path: Path) -> None:
    digit = torch.zeros(1, 28, 28, dtype=torch.uint8)
    digit[0, 4:24, 10:18] = 255
    rows: list[tuple[Picture, torch.Tensor | None]] = [
        (Picture(picture(tmp_path / f"{index}.png"), digit), torch.eye(10)[index]) for index in range(5)
    ]
    rows.append((Picture(tmp_path / ("long" * 30), problem="broken: " + "x" * 60), None))
    sheet = contact_sheet(rows)
    assert sheet.size == (4 * 2 * (CELL + MARGIN) + MARGIN, 2 * (CELL + 56) + MARGIN)
    # left the picture, right what the network saw
    assert sheet.getpixel((MARGIN + 5, MARGIN + 5)) == (255, 255, 255)
    assert sheet.getpixel((MARGIN + CELL // 2, MARGIN + CELL // 2)) == (0, 0, 0)
    assert sheet.getpixel((MARGIN + CELL + 5, MARGIN + 5)) == (0, 0, 0)
    assert sheet.getpixel((MARGIN + CELL + CELL // 2, MARGIN + CELL // 2)) == (255, 255, 255)
