import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, Capsys, Command, Patch, fails
from PIL import Image
from test_cli import only, run_without
from torch import nn

from lit_mnist.__main__ import main
from lit_mnist.cli import export
from lit_mnist.cli.predict import find_pictures
from lit_mnist.data import datasets
from lit_mnist.module import LitMNIST
from lit_mnist.pictures.prepare import NO_PICTURE

BEST = "lightning_logs/version_0/checkpoints/best-epoch=00-accuracy=0.1000.ckpt"


def picture(path: Path, colour: int = 0, places: tuple[int, ...] = (40,), width: int = 90) -> Path:
    """Thick strokes on paper of another grey."""
    image = Image.new("L", (width, 90), 255 - colour)
    for left in places:
        image.paste(colour, (left, 10, left + 8, 70))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_test_set(command: Command, tiny_root: Path) -> None:
    assert command("fit", *TINY) == 0
    for _ in range(2):
        assert command("predict", "--ckpt_path", "best") == 0
    only("lightning_logs/version_0/predictions-best-*-2.csv").unlink()  # not in place of the first
    checkpoint = only("lightning_logs/version_0/checkpoints/best-*.ckpt")
    rows = read(only("lightning_logs/version_0/predictions-best-*.csv"))
    module = LitMNIST.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    with torch.inference_mode():
        expected = module(datasets.load(tiny_root, train=False)[0]).softmax(1)
    assert [row["index"] for row in rows] == [str(index) for index in range(100)]
    assert [int(row["digit"]) for row in rows] == expected.argmax(1).tolist()
    found = torch.tensor([[float(row[f"p{label}"]) for label in range(10)] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_find_pictures(network: nn.Module) -> None:  # which makes a folder the current one
    expected = [".DS_Store", "a.JPG", "b.png", "inner/c.tiff", "notes.txt", "photo.HEIC"]
    for name in (*expected, ".cache/d.png", "lightning_logs/version_0/pictures-best.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    assert [str(path) for path in find_pictures([".DS_Store", "."])] == expected  # a file that is named is read


def test_pictures(network: nn.Module, capsys: Capsys) -> None:
    """Files and folders, flags before, between and after them; names of any bytes, pictures of 16 bits."""
    odd = picture(Path(os.fsdecode(b"odd\xff[bold],\n.png")))
    inside = picture(Path("folder/white.gif"), 255)
    levels = np.full((90, 90), 60_000, np.uint16)
    levels[10:70, 40:48] = 300
    Image.fromarray(levels.astype(">u2")).save("folder/deep.tif")
    (broken := Path("folder/broken.jpg")).write_bytes(b"no picture")
    assert main(["predict", str(odd), "--ckpt_path", "best", "folder"]) == 0
    out = capsys.readouterr().out
    run = Path("lightning_logs/version_0")
    rows = read(run / f"pictures-{Path(BEST).stem}.csv")
    assert [row["file"] for row in rows] == [str(odd), str(broken), "folder/deep.tif", str(inside)]
    assert rows[1]["problem"] == NO_PICTURE
    assert rows[1]["digit"] == rows[1]["confidence"] == rows[1]["p0"] == ""
    for row in (rows[0], *rows[2:]):
        probabilities = [float(row[f"p{digit}"]) for digit in range(10)]
        assert float(row["confidence"]) == max(probabilities) == probabilities[int(row["digit"])]
        assert row["p3"] == rows[0]["p3"]  # the same digit to the network
    line = ["folder/white.gif", rows[3]["digit"], rows[3]["confidence"], "unsure"]  # as the CSV says, too
    assert line in [each.split() for each in out.splitlines()]
    assert rows[3]["unsure"] == line[-1]
    with Image.open(run / f"pictures-{Path(BEST).stem}.png") as sheet:
        seen = np.asarray(sheet.convert("L"))[12 + 2 : 12 + 112 : 4, 12 + 112 + 2 : 12 + 224 : 4]  # each pixel is 4x4
    with torch.inference_mode():
        expected = network(torch.from_numpy(seen.copy())[None, None]).softmax(1)[0]
    assert [float(rows[0][f"p{label}"]) for label in range(10)] == pytest.approx(expected.tolist(), abs=1e-6)
    assert main(["predict", "--ckpt_path", "best", str(inside)]) == 0
    assert [row["file"] for row in read(run / f"pictures-{Path(BEST).stem}-2.csv")] == [str(inside)]
    assert "none of the files shows a digit" in fails(capsys, "predict", "--ckpt_path", "best", str(broken))
    assert len(list(run.glob("pictures-*"))) == 4


@pytest.mark.usefixtures("network")
def test_several_digits() -> None:
    picture(Path("number.png"), 0, (40, 140, 240), 300)
    picture(Path("blank.png"), places=())
    assert main(["predict", "number.png", "blank.png", "--split", "--ckpt_path", BEST, "--output", "a.csv"]) == 0
    rows = read(Path("a.csv"))
    assert [tuple(row[key] for key in ("file", "box", "x", "y", "width", "height", "problem")) for row in rows] == [
        *(("number.png", str(number), str(x), "10", "8", "60", "") for number, x in ((1, 40), (2, 140), (3, 240))),
        ("blank.png", "", "", "", "", "", "nothing stands out from the background"),
    ]
    assert len({row["p3"] for row in rows[:3]}) == 1
    assert Path("a.png").exists()


def test_labels(network: nn.Module, capsys: Capsys) -> None:
    """A subfolder's digit, or else the file's; pictures without a digit are wrong."""
    for name in ("own/7/1.png", "own/3_mine.png", "own/3_blank.png"):
        picture(Path(name), places=() if "blank" in name else (40,))
    network.get_parameter("head.bias").data[3] += 100
    torch.save(torch.load(BEST) | {"state_dict": {f"network.{k}": v for k, v in network.state_dict().items()}}, BEST)
    assert main(["predict", "own", "own/7", "--labels", "--ckpt_path", BEST]) == 0
    out = capsys.readouterr().out
    assert "Accuracy: 33.3% (1 of 3)" in out
    assert [line.split() for line in out.splitlines() if line[:2] in ("3 ", "7 ")] == [["3", "1", "1"], ["7", "1", "0"]]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("predict no/where.png", "'no/where.png' is neither a file nor a folder with files"),
        ("predict ", "'' is neither a file nor a folder with files"),
        ("predict empty", "'empty' is neither a file nor a folder with files"),
        ("predict --split", "--split and --labels need pictures"),
        ("predict one.png --labels", "--labels one.png: no digit begins its name or folder"),
        ("predict --output no/answers.csv", "--output no/answers.csv: there is no folder "),
        ("predict one.png --output mine.csv", "--output mine.png: that file exists; --overwrite replaces it"),
        ("predict mine.png --output mine.csv --overwrite", "--output mine.csv: mine.png is one of the pictures"),
        ("export --output old.pt2", "--output old.pt2: that file exists; --overwrite replaces it"),
        ("export --output a.onnx", "needs onnx and onnxscript and onnxruntime: pip install 'lit_mnist[export]'"),
        ("demo --port 70000", "--host 127.0.0.1 --port 70000: cannot listen there"),
    ],
)
@pytest.mark.usefixtures("network")
def test_bad_input(monkeypatch: Patch, capsys: Capsys, command: str, problem: str) -> None:
    """Of predict, export and demo: one line, and no file is written or changed."""
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    Path("empty").mkdir()
    for name in ("one.png", "mine.png", "old.pt2"):
        Path(name).write_text("mine")
    before = {*Path().rglob("*")}
    assert problem in fails(capsys, *command.split(" "), "--ckpt_path", "best")
    assert {*Path().rglob("*")} == before
    assert all(Path(name).read_text() == "mine" for name in ("one.png", "mine.png", "old.pt2"))


@pytest.mark.usefixtures("network")
def test_a_checkpoint_without_a_network(capsys: Capsys) -> None:
    torch.save(torch.load(BEST) | {"state_dict": {"network.head.bias": "zero"}}, BEST)
    assert "settings and weights make no network (RuntimeError" in fails(capsys, "predict", "--ckpt_path", "best")
    torch.save(torch.load(BEST) | {"hyper_parameters": {"layers": "4", "network": ["digitnet"]}}, BEST)
    assert "settings and weights make no network (KeyError" in fails(capsys, "demo", "--ckpt_path", "best")


@pytest.mark.usefixtures("network")
def test_no_lightning() -> None:
    picture(Path("one.png"))
    unwanted = ["pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision", "pandas"]
    run_without(unwanted, ["predict", "one.png", "--ckpt_path", "best"], 0)
    run_without(unwanted, ["demo", "--ckpt_path", "best", "--port", "70000"], 2)
