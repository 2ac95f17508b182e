import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lit_mnist.module import LitMNIST
from lit_mnist.network import DIGITS, MEAN, MLP, NETWORKS, STD, Activation, DigitNet, Residual


def digitnet(layers: str, dropout: float = 0, activation: Activation = "relu") -> DigitNet:
    return DigitNet(layers, dropout, activation, 10, DIGITS)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def names(network: DigitNet) -> list[str]:
    return [type(layer).__name__ for layer in network.features]


def images(count: int = 3) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)


def test_designs() -> None:
    network = digitnet("16 16 16 pool 16 16 16 pool 24", dropout=0.05)
    convolutions, batch_norms = 16 * 9 + 5 * 16 * 16 * 9 + 16 * 24 * 9, 6 * 2 * 16 + 2 * 24
    assert parameters(network) == convolutions + batch_norms + 24 * 10 + 10 == 15_610
    block = ["Conv2d", "BatchNorm2d", "ReLU", "Dropout"]
    assert names(network) == [*block * 3, "MaxPool2d", *block * 3, "MaxPool2d", *block]
    pooled = ["Conv2d", "MaxPool2d", "BatchNorm2d", "SiLU"]
    assert names(digitnet("8x5/2 pool 16", activation="silu")) == [*pooled, "MaxPool2d", *pooled[:1], *pooled[2:]]
    # depthwise 5x5 of 8 channels, then 8 -> 16 pointwise
    assert parameters(digitnet("8 16x5d")) - parameters(digitnet("8")) == 8 * 25 + 8 * 16 + 32 + (160 - 80)


def test_layers_that_add_their_input_and_are_used_again() -> None:
    network, features = digitnet("4/2 4x5d+ again").eval(), torch.randn(2, 4, 14, 14)
    first, second = (layer for layer in network.features if isinstance(layer, Residual))
    assert_close(first(features), features + nn.Sequential(*first.children())(features))
    assert [first[0], first[1]] == [second[0], second[1]]  # the same weights, and another norm
    assert first[2] is not second[2]
    assert parameters(network) == parameters(digitnet("4/2 4x5d")) + 2 * 4


def test_sizes() -> None:
    sizes = {"4/2": 14, "4x5d/2": 14, "4 pool": 14, "4x5v": 24, "4x5v/2": 12, "4x7v 4v": 20, "4x5v 4x5dv": 20}
    for layers, size in (sizes | {"crop2 4x5v": 20}).items():
        network = digitnet(layers).eval()
        assert network.features(images().float()).shape == (3, 4, size, size), layers
    assert torch.equal(network(images()), network(nn.functional.pad(images()[:, :, 2:-2, 2:-2], [2] * 4)))


def test_logits_of_raw_pixels() -> None:
    network, pixels = digitnet("4/2 8/2").eval(), images()
    logits, real = network(pixels), pixels.float()
    assert_close(network(real), logits)
    assert torch.equal(real, pixels.float())  # left as they are
    # the same by hand: normalised as the field does it, pooled after the last convolution
    features = network.features((pixels / 255 - MEAN) / STD)
    by_convolution = nn.functional.conv2d(features, network.head.weight[:, :, None, None], network.head.bias)
    assert_close(by_convolution.mean(dim=(2, 3)), logits, atol=1e-5, rtol=1e-5)


def test_mlp() -> None:
    network, pixels = MLP("32 16", 0.5, "silu", 26, DIGITS).eval(), images()
    assert parameters(network) == 784 * 32 + 2 * 32 + 32 * 16 + 2 * 16 + 16 * 26 + 26
    assert [type(layer).__name__ for layer in network.hidden] == ["Linear", "LayerNorm", "SiLU", "Dropout"] * 2
    expected = network.head(network.hidden(((pixels / 255 - MEAN) / STD).view(3, 784)))
    assert_close(network(pixels), expected, atol=1e-5, rtol=1e-5)


BAD = {"digitnet": ["", "pool", "16a", "16x4", "0", "16/3", "8 pool pool pool pool pool", "8 16+", "8 8/2+", "crop0 4"]}
BAD["digitnet"] += ["4 crop9 crop5", "again", "4 again", "4 4/2 again", "4 4v again", "4 4 pool again"]
BAD["mlp"] = ["", "16x5", "0", "16,8", "99999"]


@pytest.mark.parametrize(("network", "layers"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_bad_layers(network: str, layers: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.layers .*{re.escape(repr(layers))}"):
        NETWORKS[network](layers, 0.0, "relu", 10, DIGITS)


def test_views_are_averaged_in_eval_mode() -> None:
    network, plain, pixels = LitMNIST("4/2 8", views=9).network, digitnet("4/2 8", activation="silu"), images()
    plain.load_state_dict(network.state_dict())
    assert_close(network.train()(pixels), plain.train()(pixels))
    moves = [(x, -x, y, -y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    expected = torch.stack([plain.eval()(nn.functional.pad(pixels, move)) for move in moves]).mean(0)
    assert_close(network.eval()(pixels), expected)
