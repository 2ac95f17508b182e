import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_mnist.network import MEAN, MLP, NETWORKS, STD, DigitNet, Residual

SEED_DESIGN = "16 16 16 pool 16 16 16 pool 24"


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def names(network: DigitNet) -> list[str]:
    return [type(layer).__name__ for layer in network.features]


def test_seed_design_has_the_parameters_that_the_documents_tell() -> None:
    network = DigitNet(SEED_DESIGN, dropout=0.05)
    convolutions = 16 * 9 + 5 * 16 * 16 * 9 + 16 * 24 * 9
    batch_norms = 6 * 2 * 16 + 2 * 24
    assert parameters(network) == convolutions + batch_norms + 24 * 10 + 10 == 15_610
    block = ["Conv2d", "BatchNorm2d", "ReLU", "Dropout"]
    assert names(network) == [*block * 3, "MaxPool2d", *block * 3, "MaxPool2d", *block]


def test_leaner_designs() -> None:
    assert names(DigitNet("8x5/2 pool 16")) == [
        *("Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU", "MaxPool2d"),
        *("Conv2d", "BatchNorm2d", "ReLU"),
    ]
    assert parameters(DigitNet("8x5")) == 25 * 8 + 16 + 90
    # depthwise 5x5 of 8 channels, then 8 -> 16 pointwise
    assert parameters(DigitNet("8 16x5d")) - parameters(DigitNet("8")) == 8 * 25 + 8 * 16 + 32 + (160 - 80)


def test_activation() -> None:
    assert names(DigitNet("4/2", activation="silu")) == ["Conv2d", "MaxPool2d", "BatchNorm2d", "SiLU"]
    network = DigitNet("4/2", activation="silu")
    network(torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)).sum().backward()
    gradient = next(network.parameters()).grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    with pytest.raises(ValueError, match=r"model\.activation must be relu or silu, got tanh"):
        DigitNet("4/2", activation="tanh")  # type: ignore[arg-type]


def test_a_layer_that_adds_its_input() -> None:
    torch.manual_seed(0)
    network = DigitNet("4/2 4x5d+").eval()
    (residual,) = [layer for layer in network.features if type(layer).__name__ == "Residual"]
    features = torch.randn(2, 4, 14, 14)
    convolutions = nn.Sequential(*list(residual.children()))
    assert_close(residual(features), features + convolutions(features))
    assert parameters(network) == parameters(DigitNet("4/2 4x5d"))


def test_a_layer_that_is_used_again() -> None:
    torch.manual_seed(0)
    network = DigitNet("4/2 4d+ again").eval()
    first, second = [layer for layer in network.features if isinstance(layer, Residual)]
    assert [first[0], first[1]] == [second[0], second[1]]  # the same weights, and a norm of its own
    assert first[2] is not second[2]
    assert parameters(network) == parameters(DigitNet("4/2 4d+")) + 2 * 4
    nn.init.constant_(second[2].get_parameter("weight"), 2)
    features = torch.randn(2, 4, 14, 14)
    assert not torch.equal(first(features), second(features))
    assert names(DigitNet("4 4 again pool"))[-4:] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    for layers in ("again", "4 again", "4 4/2 again", "4 4v again", "4 4 pool again"):
        with pytest.raises(ValueError, match=r"model\.layers repeats by 'again' a layer that changes the shape"):
            DigitNet(layers)


def test_a_crop() -> None:
    network = DigitNet("crop2 4x5v").eval()
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert network.features(images.float()).shape == (2, 4, 20, 20)
    border = images.clone()
    border[:, :, 2:-2, 2:-2] = 0
    assert torch.equal(network(images), network(images - border))
    assert not torch.equal(network(images), network(torch.zeros_like(images)))
    assert parameters(network) == parameters(DigitNet("4x5v"))


def test_poolings_halve() -> None:
    for layers in ("4/2", "4x5d/2", "4 pool"):
        assert DigitNet(layers).eval().features(torch.zeros(1, 1, 28, 28)).shape == (1, 4, 14, 14)


def test_convolutions_without_padding() -> None:
    for layers, size in (("4x5v", 24), ("4x5v/2", 12), ("4x7v 4v", 20), ("4x5v 4x5dv", 20)):
        assert DigitNet(layers).eval().features(torch.zeros(1, 1, 28, 28)).shape == (1, 4, size, size)
    assert parameters(DigitNet("4x5v 8x3dv")) == parameters(DigitNet("4x5 8x3d"))


def test_logits_of_raw_pixels() -> None:
    torch.manual_seed(0)
    network = DigitNet("4/2 8/2").eval()
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    logits = network(images)
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32
    assert_close(network(images.float()), logits)
    # the same by hand: normalised as the field does it, pooled after the last convolution
    features = network.features((images / 255 - MEAN) / STD)
    by_convolution = nn.functional.conv2d(features, network.head.weight[:, :, None, None], network.head.bias)
    assert_close(by_convolution.mean(dim=(2, 3)), logits, atol=1e-5, rtol=1e-5)


def test_images_are_left_as_they_are() -> None:
    images = torch.full((1, 1, 28, 28), 7.0)
    DigitNet("4/2")(images)
    assert bool((images == 7).all())


@pytest.mark.parametrize(
    "layers",
    [
        "",
        "pool",
        "16a",
        "16x4",
        "0",
        "-3",
        "16 x",
        "16/3",
        "8 pool pool pool pool pool",
        "8 16+",
        "8 8/2+",
        "8 8s2+",
        "crop0 4",
        "4 crop9 crop5",
    ],
)
def test_bad_layers(layers: str) -> None:
    with pytest.raises(ValueError, match=r"model\.layers"):
        DigitNet(layers)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_bad_dropout(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"model\.dropout must be in \[0, 1\)"):
        DigitNet("8", dropout)


def test_mlp() -> None:
    torch.manual_seed(0)
    network = MLP("32 16", dropout=0.5, activation="silu", classes=26)
    assert parameters(network) == 784 * 32 + 2 * 32 + 32 * 16 + 2 * 16 + 16 * 26 + 26
    block = ["Linear", "LayerNorm", "SiLU", "Dropout"]
    assert [type(layer).__name__ for layer in network.hidden] == [*block, *block]
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    network.eval()
    expected = network.head(network.hidden(((images / 255 - MEAN) / STD).view(3, 784)))
    assert expected.shape == (3, 26)
    assert_close(network(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", ["", "16x5", "0", "-3", "16,8", "16 pool", "99999"])
def test_bad_widths(layers: str) -> None:
    with pytest.raises(ValueError, match=r"model\.layers must be widths from 1 to 9999"):
        MLP(layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_networks_are_made_alike(name: str) -> None:
    network = NETWORKS[name]("8 4", 0.1, "silu", 3)
    assert network(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"model\.dropout must be in \[0, 1\), got 1"):
        NETWORKS[name]("8 4", 1.0, "relu", 3)
    with pytest.raises(ValueError, match=r"model\.activation must be relu or silu, got tanh"):
        NETWORKS[name]("8 4", 0.0, "tanh", 3)  # type: ignore[arg-type]
