from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from test_report import Mean
from torch import Tensor

from lit_mnist.data import datasets
from lit_mnist.exact.console import UserError
from lit_mnist.pictures.prepare import Pixels, find_one, grey_levels, split
from lit_mnist.pictures.report import read

TURNED = Image.Exif()
TURNED[0x0112] = 6  # by a quarter: a viewer turns it back
CLOSE = 4  # grey levels of 0..255, on average
SEVEN = np.zeros((60, 40), np.float32)  # white on black, tight in its frame: its bar on top, an upright on the right
SEVEN[:8] = SEVEN[:, -8:] = 1


def drawn(*places: tuple[int, int], height: int = 200, width: int = 200) -> Pixels:
    """Sevens of 40x60 pixels with their left upper corners at (x, y), white on black."""
    levels = np.zeros((height, width), np.float32)
    for x, y in places or [(90, 30)]:
        levels[y : y + 60, x : x + 40] = SEVEN
    return levels


def digit(levels: Pixels) -> Tensor:
    return find_one(levels)[0]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """At the best of all shifts by a pixel: a centre of mass may be rounded either way."""
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return min(float((ours.roll(shift, (1, 2)).float() - theirs.float()).abs().mean()) for shift in shifts)


def save(path: Path, levels: Pixels, mode: str = "L", **options: Any) -> Path:
    Image.fromarray((levels * 255).round().astype(np.uint8)).convert(mode).save(path, **options)
    return path


def test_what_does_not_matter() -> None:
    """The same digit in another light, place or surroundings."""
    names = ("box", "cell", "desk", "strip", "ruled", "squared", "hard shadow", "strokes that do not touch", "print")
    pictures = {name: 0.85 - 0.65 * drawn() for name in (*names, "uneven light", "paper", "specks", "canvas", "askew")}
    framed = pictures["box"]
    framed[15:105, 75:78] = framed[15:105, 147:150] = framed[15:18, 75:150] = framed[102:105, 75:150] = 0.2
    pictures["a box that it touches"] = framed.copy()
    pictures["a box that it touches"][27:30, 75:150] = 0.2
    pictures["print"][110:120, 20:30] = pictures["print"][110:120, 40:50] = 0.2
    pictures["cell"][:, 190:193] = pictures["cell"][6:9] = 0.2
    pictures["desk"][:, :60] = 0.3
    pictures["strip"][188:] = 0.05
    pictures["specks"][180:183, 10:13] = 0.2
    for pitch in range(12, 200, 31):
        lines = [pictures[name][pitch : pitch + 2] for name in ("ruled", "squared")]
        for line in (*lines, pictures["squared"][:, pitch : pitch + 2]):
            line.clip(max=0.5, out=line)
    y, x = np.indices((200, 200))
    pictures["askew"][(y + 0.2 * x) % 31 < 2] = 0.5
    pictures["hard shadow"] *= np.where(x + y < 190, 0.5, 1.0).astype(np.float32)
    pictures["uneven light"] *= (0.5 + 0.4 * x * y / 200**2).astype(np.float32)
    pictures["strokes that do not touch"][38:40, 90:122] = 0.85
    pictures["paper"] += 0.02 * np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)
    pictures["canvas"][:] = np.pad(drawn()[12:188, 30:190], ((12, 12), (30, 10)), constant_values=1)
    pictures["a sheet's corner"] = np.pad(0.85 - 0.65 * drawn((100, 90), height=300, width=300), ((30, 0), (30, 0)))
    pictures["far away"] = 1 - drawn((300, 700), height=900, width=1200)
    pictures |= {"place": drawn((150, 5)), "size": drawn().repeat(3, 0).repeat(3, 1), "tight": np.pad(SEVEN, 6)}
    differences = {name: difference(digit(levels), digit(drawn())) for name, levels in pictures.items()}
    assert {name: value for name, value in differences.items() if value >= CLOSE} == {}


def test_noughts() -> None:
    """No box, even with a speck in it; and with more ink than paper in the frame."""
    y, x = np.mgrid[-1:1:100j, -1:1:60j]
    nought, bold = ((((distance := x * x + y * y) < 1) & (distance > least)).astype(np.float32) for least in (0.7, 0.4))
    speck = np.pad(nought, 50)
    speck[96:104, 76:84] = 1
    assert difference(digit(speck), digit(np.pad(nought, 50))) < CLOSE
    assert difference(digit(0.9 - 0.5 * bold), digit(np.pad(bold, 100))) < CLOSE
    tiny, step = np.eye(5), (y > 0.9) | ((y > 0.7) & (x > 0.6))  # along the border of a black screen
    assert [int(digit(levels.astype(np.float32)).max()) for levels in (tiny, step)] == [255, 255]


def test_real_digits_stay_as_they_are(real_root: Path) -> None:
    originals, _ = datasets.load(real_root, train=False)
    differences = [difference(digit(original[0].numpy() / np.float32(255)), original) for original in originals[:200]]
    assert max(differences) < 2
    assert sum(differences) / 200 < 0.5


def test_files(tmp_path: Path) -> None:
    """Formats, colours, transparency, 16 bits and orientation: all the same digit."""
    expected = digit(drawn())
    names = ["L.png", "1.png", "P.png", "RGB.jpg", "RGB.bmp", "P.gif", "CMYK.tif", "RGB.webp", "L.jp2", "L.ppm"]
    names += ["RGB.avif"] * bool(features.check("avif")) + ["RGB.heic"] * ("HEIF" in Image.ID)
    files = [save(tmp_path / name, 1 - drawn(), name.partition(".")[0]) for name in names]
    part, alpha = drawn()[..., None], (drawn() * 255).astype(np.uint8)
    colours = [((255, 255, 0), (255, 255, 255)), ((200, 60, 60), (60, 130, 60)), ((40, 40, 160), (250, 240, 120))]
    pictures = [Image.fromarray((part * ink + (1 - part) * np.array(paper)).astype(np.uint8)) for ink, paper in colours]
    for level in (0, 40, 215, 255):  # the paper is nothing, the ink any colour
        pictures.append(Image.fromarray(np.dstack([np.full_like(alpha, level)] * 3 + [alpha]), "RGBA"))
    pictures.append(Image.fromarray(((1 - drawn()) * 3000 + 500).astype(np.uint16)))
    for number, picture in enumerate(pictures):
        files.append(tmp_path / f"{number}.png")
        picture.save(files[-1])
    files.append(save(tmp_path / "turned.jpg", np.rot90(1 - drawn()), exif=TURNED))
    for file in files:
        assert difference(digit(grey_levels(file)), expected) < CLOSE, file.name


def test_files_that_show_nothing(tmp_path: Path) -> None:
    whole, large = save(tmp_path / "whole.png", drawn()).read_bytes(), BytesIO()
    Image.new("1", (20_000, 20_000)).save(large, "PNG")
    for content, problem in (
        (b"a letter to a friend", "no picture that Pillow reads"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no picture"),  # a program
        (whole[: len(whole) // 2], "cannot be read: "),
        (large.getvalue(), "cannot be read: Image size .400000000 pixels. exceeds limit of 50000000"),
    ):
        (tmp_path / "file.png").write_bytes(content)
        with pytest.raises(UserError, match=f"^{problem}"):
            grey_levels(tmp_path / "file.png")
    noise = (0.8 + 0.03 * np.random.default_rng(0).standard_normal((200, 200))).clip(0, 1)
    for levels in (np.zeros((50, 50)), np.full((50, 50), 0.6), np.ones((50, 50)), np.ones((1, 1)), noise):
        with pytest.raises(UserError, match="nothing stands out"):
            digit(levels.astype(np.float32))


def sheet(places: list[tuple[int, int]], height: int = 300, width: int = 500) -> Pixels:
    return 0.9 - 0.7 * drawn(*places, height=height, width=width)


def test_order_of_reading() -> None:
    """Two lines, each not quite level; a stroke that does not touch its digit. And a number that rises."""
    places = [(60 * index + 20, 170 - 18 * index) for index in range(7)]
    assert [box[0] for box, *_ in split(sheet(places))] == pytest.approx([x for x, _ in places], abs=3)
    places = [(40, 30), (120, 45), (300, 25), (30, 190), (200, 175)]
    levels = sheet(places)
    levels[54:57, 120:160] = 0.9
    found = split(levels)
    assert np.array([box for box, *_ in found]) == pytest.approx(np.array([(x, y, 40, 60) for x, y in places]), abs=3)
    for _, seen, _ in found:
        assert seen is not None
        assert difference(seen, digit(drawn())) < CLOSE


def test_what_is_no_digit() -> None:
    """Cells around the digits, the edge of the sheet, specks and dots; a digit that the picture's edge cuts is one."""
    places = [(60, 100), (160, 100), (260, 100), (460, 100)]
    levels = sheet(places)
    for x in (40, 130, 230, 330):
        levels[80:180, x : x + 3] = 0.2
    levels[80:83, 40:333] = levels[177:180, 40:333] = levels[150:156, 400:406] = 0.2
    levels[:, :8] = 0.1
    expected = np.array([(x, y, 40, 60) for x, y in places])
    found = split(levels)
    assert np.array([box for box, seen, _ in found if seen is not None]) == pytest.approx(expected, abs=3)
    problems = {(problem, seen is not None) for _, seen, problem in found[3:]}
    left_out = {(problem, False) for problem in ("touches the border", "too small", "a box")}
    assert problems == {("touches the border", True), *left_out}
    assert [find_one(levels)[1] for levels in (sheet(places), sheet([(60, 100)]))] == ["more than one digit?", ""]


def test_two_that_touch() -> None:
    levels = sheet([(60, 100), (100, 100), (260, 100)])

    def classify(seen: Tensor) -> Tensor:  # each half looks more like a seven than the whole
        return torch.tensor([[1 - difference(each, digit(drawn())) / 255] for each in seen])

    for found, widths in ((split(levels), (80, 40)), (split(levels, classify), (40, 40, 40))):
        assert [box[2] for box, *_ in found] == pytest.approx(widths, abs=3)


def test_a_table_and_light_that_falls_off() -> None:
    places = [(x, y) for y in (50, 170, 290) for x in (60, 180, 300)]
    table, lit = sheet(places, 420, 400), sheet(places, 420, 400)
    for start in (25, 145, 265, 385):
        table[start : start + 3, 25:388] = table[25:388, start : start + 3] = 0.2
    y, x = np.indices(lit.shape) - 200
    lit *= (1 - 0.7 * ((x / 200) ** 8 + (y / 210) ** 8).clip(max=1)).astype(np.float32)
    for levels in (table, lit):
        found = [box for box, seen, _ in split(levels) if seen is not None]
        assert np.array(found) == pytest.approx(np.array([(x, y, 40, 60) for x, y in places]), abs=3)


def test_a_sheet_that_has_too_much() -> None:
    places = [(90 * column + 30, 110 * row + 30) for row in range(21) for column in range(20)]
    with pytest.raises(UserError, match="420 parts of a digit's size, from 1 to 400 are read"):
        split(sheet(places, 21 * 110 + 40, 20 * 90 + 40))


def test_boxes_in_the_files_own_pixels(tmp_path: Path) -> None:
    """A large photograph is read at a fraction of its size, and turned as its camera was."""
    places = [(40, 60), (200, 60)]
    large = sheet(places).repeat(6, 0).repeat(6, 1)
    found = read(Mean(), save(tmp_path / "large.jpg", np.rot90(large), exif=TURNED), several=True)
    assert [picture.row["box"] for picture in found] == [1, 2]
    for picture, (x, y) in zip(found, places, strict=True):
        assert [*picture.row.values()][2:6] == pytest.approx((6 * x, 6 * y, 240, 360), abs=15)
