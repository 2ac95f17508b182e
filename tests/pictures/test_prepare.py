import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_mnist.data import datasets
from lit_mnist.exact.errors import UserError
from lit_mnist.pictures import prepare as images


def seven(height: int = 60, width: int = 40, line: int = 8) -> Tensor:
    """A seven in white on black, tight in its frame: its bar on top and an upright on the right."""
    levels = torch.zeros(height, width)
    levels[:line] = 1
    levels[:, width - line :] = 1
    return levels


def drawn(above: int = 30, left: int = 90, canvas: int = 200) -> Tensor:
    levels = torch.zeros(canvas, canvas)
    levels[above : above + 60, left : left + 40] = seven()
    return levels


def box(digit: Tensor) -> tuple[int, int, int, int]:
    rows, columns = (digit[0] > 25).any(1).nonzero().flatten(), (digit[0] > 25).any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def difference(ours: Tensor, theirs: Tensor) -> float:
    """In grey levels of 0..255, at the best of all shifts by a pixel: a centre of mass may be rounded either way."""
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return min(float((ours.roll(shift, (1, 2)).float() - theirs.float()).abs().mean()) for shift in shifts)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return difference(ours, theirs) < 4


def save(path: Path, levels: Tensor, mode: str = "L", **options: Any) -> Path:
    Image.fromarray((levels * 255).round().to(torch.uint8).numpy()).convert(mode).save(path, **options)
    return path


def test_form_of_mnist() -> None:
    digit = images.digit(drawn())
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == torch.uint8
    top, bottom, left, right = box(digit)
    assert bottom - top == 20  # the longer side fills the box
    assert abs((right - left) - 20 * 40 / 60) <= 1  # with its proportions
    mass, index = digit[0].float(), torch.arange(28.0)
    assert float((mass.sum(1) * index).sum() / mass.sum()) == pytest.approx(14, abs=0.5)
    assert float((mass.sum(0) * index).sum() / mass.sum()) == pytest.approx(14, abs=0.5)
    assert int(digit.max()) == 255
    assert int((digit == 0).sum()) > 400


def test_what_does_not_matter() -> None:
    expected = images.digit(drawn())
    height = torch.linspace(0, 1, 200)
    uneven = 0.5 + 0.4 * height[:, None] * height[None]  # light that falls off to a corner
    generator = torch.Generator().manual_seed(0)
    grain = torch.randn(200, 200, generator=generator)
    variants = {
        "place": drawn(5, 150),
        "dark on light": 1 - drawn(),
        "a pencil's grey": 0.9 - 0.3 * drawn(),
        "size": F.interpolate(drawn()[None, None], scale_factor=3.0)[0, 0],
        "uneven light": uneven * (1 - 0.7 * drawn()),
        "paper": 0.8 - 0.6 * drawn() + 0.02 * grain,
        "tight frame": F.pad(seven(), (6, 6, 6, 6)),
    }
    for name, levels in variants.items():
        assert close(images.digit(levels), expected), name
    specks = 1 - drawn()
    specks[180:183, 10:13] = 0
    assert close(images.digit(specks), expected)


def test_what_lies_around_it() -> None:
    """What is not the digit's: each leaves the digit as it is on clean paper."""
    expected = images.digit(drawn())
    plain = 0.85 - 0.65 * drawn()
    y, x = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    variants = {name: plain.clone() for name in ("box", "cell", "desk", "strip", "ruled", "squared")}
    box = variants["box"]
    box[15:105, 75:78] = box[15:105, 147:150] = box[15:18, 75:150] = box[102:105, 75:150] = 0.2
    cell = variants["cell"]
    cell[:, 190:193] = cell[6:9] = 0.2
    variants["desk"][:, :60] = 0.3
    variants["strip"][188:] = 0.05
    for pitch in range(12, 200, 31):
        for name in ("ruled", "squared"):
            variants[name][pitch : pitch + 2] = variants[name][pitch : pitch + 2].clamp(max=0.5)
        variants["squared"][:, pitch : pitch + 2] = variants["squared"][:, pitch : pitch + 2].clamp(max=0.5)
    variants["hard shadow"] = torch.where(x + y < 190, 0.5, 1.0) * plain
    variants["strokes that do not touch"] = plain.clone()
    variants["strokes that do not touch"][38:40, 90:122] = 0.85
    for name, levels in variants.items():
        assert close(images.digit(levels), expected), name


def test_digits_that_look_like_boxes() -> None:
    """A nought is no box, though there be a speck in it; a box with nothing in it is read as it is."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 200), torch.linspace(-1, 1, 200), indexing="ij")
    distance = (2 * x) ** 2 + y * y
    nought = ((distance < 0.6) & (distance > 0.4)).float()
    speck = nought.clone()
    speck[96:104, 96:104] = 1
    assert close(images.digit(speck), images.digit(nought))
    hollow = torch.zeros(200, 200)
    hollow[50:150, 60:140] = 1
    hollow[56:144, 66:134] = 0
    assert box(images.digit(hollow)) == pytest.approx((4, 24, 6, 22), abs=1)


def test_colours(tmp_path: Path) -> None:
    """Ink of a paper's brightness, and yellow on white."""
    expected = images.digit(drawn())
    for ink, paper in (
        ((255, 255, 0), (255, 255, 255)),
        ((200, 60, 60), (60, 130, 60)),
        ((40, 40, 160), (250, 240, 120)),
    ):
        part = drawn()[..., None].numpy()
        pixels = (part * ink + (1 - part) * np.array(paper)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "colour.png")
        seen = images.load(tmp_path / "colour.png").digit
        assert seen is not None
        assert close(seen, expected), ink


def test_cut_close_and_far_away() -> None:
    """More ink than paper in the frame; a digit so small that reducing the picture would leave nothing of it."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 60), torch.linspace(-1, 1, 40), indexing="ij")
    distance = x * x + y * y
    bold = ((distance < 1) & (distance > 0.4)).float()  # a bold nought
    expected = images.digit(F.pad(bold, (60, 60, 60, 60)))
    assert close(images.digit(bold), expected)
    assert close(images.digit(0.9 - 0.5 * bold), expected)
    far = torch.zeros(900, 1200)
    far[700:760, 300:340] = seven()
    assert close(images.digit(1 - far), images.digit(drawn()))
    noise = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    with pytest.raises(images.UnusableError, match="nothing stands out"):
        images.digit((0.8 + 0.03 * noise).clamp(0, 1))


def test_real_digits_stay_as_they_are(real_root: Path) -> None:
    originals, _ = datasets.load(real_root, train=False)
    differences = [difference(images.digit(original[0] / 255), original) for original in originals[:200]]
    assert max(differences) < 2
    assert sum(differences) / 200 < 0.5


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "L"),
        ("a.png", "1"),
        ("a.png", "P"),
        ("a.jpg", "RGB"),
        ("a.bmp", "RGB"),
        ("a.gif", "P"),
        ("a.tif", "CMYK"),
    ],
)
def test_formats(tmp_path: Path, name: str, mode: str) -> None:
    picture = images.load(save(tmp_path / name, 1 - drawn(), mode))
    assert picture.problem == ""
    assert picture.digit is not None
    assert close(picture.digit, images.digit(drawn()))


def test_transparency_sixteen_bits_and_orientation(tmp_path: Path) -> None:
    expected = images.digit(drawn())
    alpha = (drawn() * 255).to(torch.uint8).numpy()
    for colour in (0, 40, 215, 255):  # the paper is nothing, the ink any colour
        pixels = np.dstack([np.full_like(alpha, colour)] * 3 + [alpha])
        Image.fromarray(pixels, "RGBA").save(tmp_path / "transparent.png")
        transparent = images.load(tmp_path / "transparent.png").digit
        assert transparent is not None
        assert close(transparent, expected), colour
    Image.fromarray(((1 - drawn()) * 3000 + 500).numpy().astype(np.uint16)).save(tmp_path / "deep.png")
    deep = images.load(tmp_path / "deep.png").digit
    assert deep is not None
    assert close(deep, expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: a viewer turns it back
    save(tmp_path / "turned.jpg", torch.rot90(1 - drawn()), exif=exif)
    turned = images.load(tmp_path / "turned.jpg").digit
    assert turned is not None
    assert close(turned, expected)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_files_that_show_nothing(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.png", drawn()).read_bytes()
    contents = {
        "text.png": (b"a letter to a friend", "no PNG, JPEG"),
        "empty.jpg": (b"", "no PNG, JPEG"),
        "half.png": (whole[: len(whole) // 2], "broken: "),
        "bomb.png": (png_header(60_000, 60_000), "too large, at most 50,000,000 pixels are read"),
        "bomb2.png": (png_header(8_000, 8_000), "8000x8000 pixels, at most 50,000,000 are read"),
    }
    for name, (content, problem) in contents.items():
        (tmp_path / name).write_bytes(content)
        picture = images.load(tmp_path / name)
        assert picture.digit is None, name
        assert picture.problem.startswith(problem), (name, picture.problem)
    for level in (0.0, 0.6, 1.0):
        picture = images.load(save(tmp_path / "blank.png", torch.full((50, 50), level)))
        assert picture.digit is None
        assert picture.problem == "nothing stands out from the background"
    one = images.load(save(tmp_path / "one.png", torch.ones(1, 1)))
    assert one.digit is None


def test_find(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", "inner/c.tiff"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"")
    folder = tmp_path / "folder"
    found = images.find([str(folder / "notes.txt"), str(folder)])  # what is named is read whatever its name
    assert [path.name for path in found] == ["notes.txt", "a.JPG", "b.png", "c.tiff"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"the folder .*none has no \.bmp"):
        images.find([str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        images.find([str(tmp_path / "nowhere")])
