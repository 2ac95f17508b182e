from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lit_mnist.pictures.report import CELL, MARGIN, Picture, columns, contact_sheet, read


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float().mean(1, keepdim=True) * torch.tensor([[0.0, 1.0]])


def test_unsure() -> None:
    """What a smoothed target asks for is sure, and without smoothing is not."""
    smoothed = [0.91, *[0.01] * 9]
    cases = (smoothed, 0.1), (smoothed, 0), ([0.1] * 10, 0.1)
    assert [columns(p, smoothing)["unsure"] for p, smoothing in cases] == ["", "unsure", "unsure"]


def test_contact_sheet(tmp_path: Path) -> None:
    """Left the picture, right what the network saw, below them the answer; of several digits each one's part."""
    levels = np.full((90, 90), 255, np.uint8)
    levels[10:70, 40:48] = 0
    Image.fromarray(levels).save(tmp_path / "one.png")
    pictures = read(Mean(), tmp_path / "one.png") * 4 + read(Mean(), tmp_path / "one.png", several=True)
    pictures.append(Picture({"file": tmp_path / ("long" * 30), "problem": "broken: " + "x" * 60}))
    sheet = np.asarray(contact_sheet(pictures).convert("L"))
    width, height = 2 * (CELL + MARGIN), CELL + 56
    assert sheet.shape == (2 * height + MARGIN, 4 * width + MARGIN)
    picture, seen = (sheet[MARGIN : MARGIN + CELL, MARGIN + left :][:, :CELL] for left in (0, CELL))
    corners = [int(part[at, at]) for part in (picture, seen) for at in (5, CELL // 2)]
    assert corners == pytest.approx([255, 0, 0, 255], abs=1)
    part = sheet[MARGIN + height : MARGIN + height + CELL, MARGIN : MARGIN + CELL]
    assert (picture[CELL // 2] < 128).sum() == pytest.approx(CELL * 8 / 90, abs=1)
    assert (part[CELL // 2] < 128).sum() == pytest.approx(CELL * 8 / 90, abs=1)  # cut to the same height
    texts = sheet[MARGIN + CELL + 2 : MARGIN + height - 2]
    assert all((texts[:, left : left + CELL] < 128).any() for left in range(MARGIN, 4 * width, width))
