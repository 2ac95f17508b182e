"""The networks that `model.network` names: raw pixels in, logits out."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_mnist.exact.console import UserError, shortened

# Mean and standard deviation of the pixels of MNIST's 60,000 training images, on the scale 0..1. Other data sets get
# the same, and the norm after the first layer corrects for theirs.
MEAN, STD = 0.1307, 0.3081

Batch = tuple[Tensor, Tensor]  # images uint8 (B, 1, 28, 28), and targets int64 (B,)
Shape = tuple[int, int, int]  # of an image: channels, height, width
DIGITS: Shape = (1, 28, 28)
Activation = Literal["relu", "silu"]
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}  # silu: smoother and slower (https://arxiv.org/abs/1702.03118)
CROP = re.compile(r"crop(?P<pixels>[1-9])")
LAYER = re.compile(
    r"(?P<width>[1-9]\d{0,3})(x(?P<kernel>[1357]))?(?P<depthwise>d)?(?P<valid>v)?(?P<halve>/2)?(?P<add>\+)?"
)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring raw pixels, uint8 or float on the scale 0..255, to mean 0 and standard deviation 1 over MNIST."""
    return (images.to(dtype) - 255 * MEAN).mul_(1 / (255 * STD))


def nonlinearity(activation: str, dropout: float) -> list[nn.Module]:
    """Return what follows a layer's norm: the activation, and dropout unless it is 0."""
    return [ACTIVATIONS[activation](inplace=True), *([nn.Dropout(dropout)] if dropout else [])]


class Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)  # type: ignore[no-untyped-call]  # torch 2.15


class DigitNet(nn.Module):
    """A small CNN that takes raw pixels and normalises them itself.

    Its layers are written as words, read from left to right:

    ========  ==========================================================================================
    `16`      3x3 convolution to 16 channels, batch norm, activation, dropout
    `16x5`    the same with a 5x5 kernel (1, 3, 5 or 7), padded to keep the size
    `16x5v`   unpadded: what follows is 4 pixels smaller, which MNIST's empty borders allow, and cheaper
    `16x5d`   the kernel depthwise, then a pointwise convolution to 16 channels: fewer parameters
    `16/2`    2x2 max pooling right after the convolution: batch norm and activation see a quarter of the pixels
    `16+`     the layer's input is added to its output (https://arxiv.org/abs/1512.03385); their shapes must agree
    `pool`    2x2 max pooling after the dropout, as textbooks draw it
    `crop2`   without the 2 outermost pixels at each edge: all but 0.24 % of MNIST's ink lies within the other 24x24
    `again`   the previous layer once more: the same convolutions with another batch norm, for depth without
              parameters (https://arxiv.org/abs/1702.08782)
    ========  ==========================================================================================

    Then come global average pooling and a linear layer. ValueError for other words, or if the image is pooled away.
    """

    def __init__(self, layers: str, dropout: float, activation: Activation, classes: int, shape: Shape) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels, size = shape[0], min(shape[1:])
        before: list[nn.Module] = []  # the convolutions of the previous layer, if its shape allows to repeat it
        for word in layers.split():
            repeated, before = before, []
            if match := CROP.fullmatch(word):
                blocks.append(nn.ZeroPad2d(-int(match["pixels"])))
                size -= 2 * int(match["pixels"])
            elif word == "again":
                if not repeated:
                    raise ValueError(f"model.layers repeats by 'again' a layer that changes the shape, in {layers!r}")
                again = [*repeated, nn.BatchNorm2d(channels), *nonlinearity(activation, dropout)]
                blocks += [Residual(*again)] if isinstance(blocks[-1], Residual) else again
                before = repeated
            elif word == "pool":
                blocks.append(nn.MaxPool2d(2))
                size //= 2
            elif match := LAYER.fullmatch(word):
                width, kernel = int(match["width"]), int(match["kernel"] or 3)
                padding = 0 if match["valid"] else kernel // 2
                same = width == channels and not match["halve"] and not match["valid"]
                if match["add"] and not same:
                    raise ValueError(f"model.layers adds to {word!r} its input, which has another shape, in {layers!r}")
                groups, out = (channels, channels) if match["depthwise"] else (1, width)
                layer: list[nn.Module] = [nn.Conv2d(channels, out, kernel, 1, padding, groups=groups, bias=False)]
                layer += [nn.Conv2d(channels, width, 1, bias=False)] if match["depthwise"] else []
                before = list(layer) if same else []
                size -= kernel - 1 - 2 * padding
                if match["halve"]:
                    layer.append(nn.MaxPool2d(2))
                    size //= 2
                layer += [nn.BatchNorm2d(width), *nonlinearity(activation, dropout)]
                blocks += [Residual(*layer)] if match["add"] else layer
                channels = width
            else:
                words = "16, 16x5, 16x5v, 16x5d+, 16/2, pool, crop2 or again"
                raise ValueError(f"model.layers must be words such as {words}, got {word!r} in {layers!r}")
        if not any(map(LAYER.fullmatch, layers.split())) or size < 1:
            raise ValueError(f"model.layers must have a convolution and leave a pixel of {shape}, got {layers!r}")
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map raw images, uint8 (B, 1, 28, 28) or float of the same scale 0..255, to logits, float (B, C)."""
        features: Tensor = self.features(normalise(images, self.head.weight.dtype))
        return self.head(features.mean(dim=(2, 3)))


class MLP(nn.Module):
    """A multilayer perceptron: `layers` are widths such as `128 64`, each followed by layer norm and the activation."""

    def __init__(self, layers: str, dropout: float, activation: Activation, classes: int, shape: Shape) -> None:
        super().__init__()
        if not re.fullmatch(r"[1-9]\d{0,3}(\s+[1-9]\d{0,3})*", layers.strip()):
            raise ValueError(f"model.layers must be widths from 1 to 9999 such as 128 64 for mlp, got {layers!r}")
        blocks: list[nn.Module] = []
        inputs = math.prod(shape)
        for width in map(int, layers.split()):
            blocks += [nn.Linear(inputs, width, bias=False), nn.LayerNorm(width), *nonlinearity(activation, dropout)]
            inputs = width
        self.hidden = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map raw images as `DigitNet` does."""
        return self.head(self.hidden(normalise(images, self.head.weight.dtype).flatten(1)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"digitnet": DigitNet, "mlp": MLP}


def average_views(network: nn.Module, inputs: tuple[Tensor], logits: Tensor, views: int) -> Tensor:
    """Forward hook: in eval mode, average the logits over moves by up to a pixel (9 views) or two (25)."""
    if network.training:
        return logits
    (images,), edge, middle = inputs, math.isqrt(views) // 2, views // 2
    windows = F.pad(images, [edge] * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    moved = windows.flatten(2, 3).unbind(2)  # the one in the middle is the image itself
    return torch.stack([logits, *map(network.forward, moved[:middle] + moved[middle + 1 :])]).mean(0)


def make_network(settings: Mapping[str, Any]) -> nn.Module:
    """Build the network of a `LitMNIST`'s hyperparameters."""
    arguments = [settings[name] for name in ("layers", "dropout", "activation", "classes", "image_shape")]
    network = NETWORKS[settings["network"]](*arguments)
    if settings["views"] > 1:
        network.register_forward_hook(partial(average_views, views=settings["views"]))
    return network.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU


def load_network(checkpoint: Mapping[str, Any]) -> nn.Module:
    """Build a checkpoint's network with its weights, in eval mode; UserError if settings and weights do not fit."""
    settings, weights = {"image_shape": DIGITS, "views": 1, **checkpoint["hyper_parameters"]}, checkpoint["state_dict"]
    try:
        network = make_network(settings)
        network.load_state_dict({name[8:]: weights[name] for name in weights if name.startswith("network.")})
    except Exception as error:  # a setting of another type fails wherever it is used first
        reason = shortened(f"{type(error).__name__}: {error}")
        raise UserError(f"the checkpoint's settings and weights make no network ({reason})") from error
    return network.eval()
