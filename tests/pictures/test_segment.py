from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_prepare import close, drawn, save, seven
from test_report import Mean

from lit_mnist.exact.errors import UserError
from lit_mnist.pictures.prepare import Pixels, digit
from lit_mnist.pictures.report import read
from lit_mnist.pictures.segment import Box, split


def sheet(places: list[tuple[int, int]], height: int = 300, width: int = 500) -> Pixels:
    """Sevens of 40x60 pixels, dark on light."""
    levels = np.zeros((height, width), np.float32)
    for x, y in places:
        levels[y : y + 60, x : x + 40] = seven()
    return 0.9 - 0.7 * levels


def boxes(levels: Pixels) -> list[Box]:
    return [box for box, _ in split(levels)]


def near(found: list[Box], places: list[tuple[int, int]]) -> bool:
    expected = [(x, y, 40, 60) for x, y in places]
    return len(found) == len(expected) and bool(np.abs(np.array(found) - np.array(expected)).max() <= 3)


def test_order_of_reading() -> None:
    """Two lines, each not quite level; given in another order than they are read in."""
    places = [(40, 30), (120, 45), (300, 25), (30, 190), (200, 175)]
    found = split(sheet([places[index] for index in (3, 2, 0, 4, 1)]))
    assert near([box for box, _ in found], places)
    for _, seen in found:
        assert (seen.shape, seen.dtype) == ((1, 28, 28), torch.uint8)
        assert close(seen, digit(drawn()))


def test_strokes_of_one_digit() -> None:
    """The bar of a five that does not touch it, to the right above; what lies further up is another line's."""
    levels = np.zeros((200, 300), np.float32)
    for x in (60, 180):
        levels[60:68, x + 8 : x + 45] = levels[72:120, x : x + 8] = levels[112:120, x : x + 40] = 1
    assert [box[:1] + box[2:3] for box in boxes(1 - levels)] == [(60, 45), (180, 45)]


def test_what_is_no_digit() -> None:
    """Cells around the digits, the edge of the sheet, specks and dots."""
    places = [(60, 100), (160, 100), (260, 100)]
    levels = sheet(places)
    for x in (40, 130, 230, 330):
        levels[80:180, x : x + 3] = 0.2
    levels[80:83, 40:333] = levels[177:180, 40:333] = levels[150:156, 400:406] = 0.2
    levels[:, :8] = 0.1
    assert near(boxes(levels), places)
    with pytest.raises(UserError, match="nothing stands out"):
        split(np.full((50, 50), 0.5, np.float32))


def test_nothing_is_dropped_from_a_sheet_that_has_too_much() -> None:
    places = [(90 * column + 30, 110 * row + 30) for row in range(21) for column in range(20)]
    with pytest.raises(UserError, match="420 parts of a digit's size, at most 400 are read"):
        split(sheet(places, 21 * 110 + 40, 20 * 90 + 40))
    specks = np.ones((1000, 1000), np.float32)
    specks[5::71, 5::67] = 0
    with pytest.raises(UserError, match="nothing stands out"):
        split(specks)


def test_boxes_in_the_files_own_pixels(tmp_path: Path) -> None:
    """A large photograph is read at a fraction of its size, and turned as its camera was."""
    places = [(40, 60), (200, 60)]
    large = sheet(places).repeat(6, 0).repeat(6, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by a quarter
    network = Mean()
    found = read(network, save(tmp_path / "large.jpg", np.rot90(large), exif=exif), several=True)
    assert [picture.number for picture in found] == [1, 2]
    for picture, (x, y) in zip(found, places, strict=True):
        assert picture.box == pytest.approx((6 * x, 6 * y, 240, 360), abs=15)
    (nothing,) = read(network, save(tmp_path / "blank.png", np.ones((50, 50))), several=True)
    assert (nothing.digit, nothing.problem) == (None, "nothing stands out from the background")
