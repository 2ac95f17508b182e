"""The networks that `model.network` names: raw pixels in, logits out.

Another one is a class that takes (layers, dropout, activation, classes), and a line in NETWORKS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_mnist.exact.console import shortened
from lit_mnist.exact.errors import UserError

# Mean and standard deviation of the pixels of MNIST's 60,000 training images, on the scale 0..1. Other data sets are
# given the same, and the norm after the first layer makes up for theirs.
MEAN, STD = 0.1307, 0.3081

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}

CROP = re.compile(r"crop(?P<pixels>[1-9])")
LAYER = re.compile(
    r"(?P<width>[1-9]\d{0,3})(x(?P<kernel>[1357]))?(?P<depthwise>d)?(?P<valid>v)?(?P<halve>/2)?(?P<add>\+)?"
)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring raw pixels, uint8 or float on the scale 0..255, to mean 0 and standard deviation 1 over MNIST."""
    return (images.to(dtype) - 255 * MEAN).mul_(1 / (255 * STD))


def nonlinearity(activation: str, dropout: float) -> list[nn.Module]:
    """What follows a layer's norm: the activation, and dropout unless it is 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"model.activation must be {' or '.join(ACTIVATIONS)}, got {activation}")
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout must be in [0, 1), got {dropout}")
    return [ACTIVATIONS[activation](inplace=True), *([nn.Dropout(dropout)] if dropout else [])]


class Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, input: Tensor) -> Tensor:
        output = input
        for layer in self:
            output = layer(output)
        return input + output


class DigitNet(nn.Module):
    """A small CNN that takes raw pixels and normalises them itself.

    Its convolutions are written as words, read from left to right:

    ========  ==========================================================================================
    `16`      3x3 convolution to 16 channels, batch norm, ReLU, dropout
    `16x5`    the same with a 5x5 kernel (1, 3, 5 or 7), padded to keep the size
    `16x5v`   not padded: what follows is 4 pixels smaller, which MNIST's empty borders allow, and as much cheaper
    `16x5d`   the kernel depthwise, then a pointwise convolution to 16 channels: fewer parameters
    `16/2`    2x2 max pooling right after the convolution: batch norm and ReLU see a quarter of the pixels
    `16+`     the layer's input is added to its output (https://arxiv.org/abs/1512.03385); their shapes must agree
    `pool`    2x2 max pooling after the dropout, as text books draw it
    `crop2`   without the 2 outermost pixels at each edge: all but 0.24 % of MNIST's ink lies within the other 24x24
    `again`   the layer before once more: the same convolutions, with a batch norm of its own, for depth
              without parameters (https://arxiv.org/abs/1702.08782)
    ========  ==========================================================================================

    After them come global average pooling and the last convolution, 1x1 to the logits, without batch norm or dropout.
    Both are linear, so the pooling goes first: the same map for a 49th of the work.

    Args:
        layers: the words, separated by spaces.
        activation: `relu`, or `silu` (https://arxiv.org/abs/1702.03118), smoother and slower, in its place.
        dropout: probability that dropout after each convolution but the last zeroes an activation, 0 <= p < 1.
        classes: how many logits there are.

    Raises:
        ValueError: an argument is out of its range, or an image of 28x28 is pooled away.
    """

    def __init__(
        self, layers: str, dropout: float = 0.0, activation: Literal["relu", "silu"] = "relu", classes: int = 10
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels, size = 1, 28
        before: list[nn.Module] = []  # the convolutions of the last layer, where its shape allows to repeat it
        for word in layers.split():
            if match := CROP.fullmatch(word):
                blocks.append(nn.ZeroPad2d(-int(match["pixels"])))
                size -= 2 * int(match["pixels"])
                before = []
            elif word == "again":
                if not before:
                    raise ValueError(f"model.layers repeats by 'again' a layer that changes the shape, in {layers!r}")
                again = [*before, nn.BatchNorm2d(channels), *nonlinearity(activation, dropout)]
                blocks += [Residual(*again)] if isinstance(blocks[-1], Residual) else again
            elif word == "pool":
                blocks.append(nn.MaxPool2d(2))
                size //= 2
                before = []
            elif match := LAYER.fullmatch(word):
                width, kernel = int(match["width"]), int(match["kernel"] or 3)
                padding = 0 if match["valid"] else kernel // 2
                size -= kernel - 1 - 2 * padding
                if match["add"] and (width != channels or match["halve"] or match["valid"]):
                    raise ValueError(f"model.layers adds to {word!r} its input, which has another shape, in {layers!r}")
                layer: list[nn.Module] = []
                if match["depthwise"]:
                    layer.append(nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, bias=False))
                    kernel, padding = 1, 0
                layer.append(nn.Conv2d(channels, width, kernel, padding=padding, bias=False))
                if match["halve"]:
                    layer.append(nn.MaxPool2d(2))
                    size //= 2
                layer += [nn.BatchNorm2d(width), *nonlinearity(activation, dropout)]
                blocks += [Residual(*layer)] if match["add"] else layer
                same = width == channels and not match["halve"] and not match["valid"]
                before = [part for part in layer if isinstance(part, nn.Conv2d)] if same else []
                channels = width
            else:
                raise ValueError(
                    f"model.layers must be words such as 16, 16x5, 16x5v, 16x5d+, 16/2, pool, crop2 or again, got"
                    f" {word!r} in {layers!r}"
                )
        if channels == 1 or size < 1:
            raise ValueError(f"model.layers must have a convolution and leave a pixel of 28x28, got {layers!r}")
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map raw images, uint8 (B, 1, 28, 28) or float of the same scale 0..255, to logits, float (B, C)."""
        features: Tensor = self.features(normalise(images, self.head.weight.dtype))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class MLP(nn.Module):
    """A multilayer perceptron on raw pixels: the example of another network.

    Args:
        layers: the widths of its hidden layers, separated by spaces: `128 64`. Each is followed by layer norm, the
            activation and dropout.
        dropout: probability that dropout after each hidden layer zeroes an activation, 0 <= p < 1.
        activation: `relu` or `silu`.
        classes: how many logits there are.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, layers: str, dropout: float = 0.0, activation: Literal["relu", "silu"] = "relu", classes: int = 10
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[1-9]\d{0,3}(\s+[1-9]\d{0,3})*", layers.strip()):
            raise ValueError(f"model.layers must be widths from 1 to 9999 such as 128 64 for mlp, got {layers!r}")
        blocks: list[nn.Module] = []
        inputs = 28 * 28
        for width in map(int, layers.split()):
            blocks += [nn.Linear(inputs, width, bias=False), nn.LayerNorm(width), *nonlinearity(activation, dropout)]
            inputs = width
        self.hidden = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map raw images, uint8 (B, 1, 28, 28) or float of the same scale 0..255, to logits, float (B, C)."""
        logits: Tensor = self.head(self.hidden(normalise(images, self.head.weight.dtype).flatten(1)))
        return logits


NETWORKS: dict[str, Callable[[str, float, Literal["relu", "silu"], int], nn.Module]] = {
    "digitnet": DigitNet,
    "mlp": MLP,
}


def load_network(checkpoint: Mapping[str, Any]) -> nn.Module:
    """Build the network that a checkpoint's `hyper_parameters` name, in eval mode, with the weights under `network.`.

    Args:
        checkpoint: as `read_checkpoint` returns it.

    Raises:
        UserError: the settings make no network, or the weights do not fit it.
    """
    settings: dict[str, Any] = {"network": "digitnet", "dropout": 0.0, "activation": "relu", "classes": 10}
    settings |= checkpoint["hyper_parameters"]
    try:
        make = NETWORKS[settings["network"]]
        network = make(settings["layers"], settings["dropout"], settings["activation"], settings["classes"])
    except Exception as error:  # a setting of another type fails wherever it is used first
        reason = " ".join(str(error).split())
        raise UserError(
            f"the checkpoint's settings make no network ({type(error).__name__}: {shortened(reason)})"
        ) from error
    weights = checkpoint["state_dict"]
    try:
        network.load_state_dict({name[8:]: weights[name] for name in weights if name.startswith("network.")})
    except Exception as error:  # RuntimeError, and others for entries that are no tensors
        raise UserError("the checkpoint's weights do not fit the network that it names") from error
    return network.to(memory_format=torch.channels_last).eval()  # 1.5 times as fast on a CPU
