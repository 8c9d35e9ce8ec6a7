"""Models of pictures, written out.

No BatchNorm (its running statistics are neither parameters nor gradients, so no method here would
send them) but GroupNorm, and no dropout (its masks would be randomness outside :mod:`fedmpi.random`).

Shape: a sample's shape without the batch, ``(channels, height, width)`` for images.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fedmpi.errors import ConfigError
from fedmpi.tasks.models.initial import ModelOptions

Shape = tuple[int, ...]


class LinearOptions(ModelOptions):
    """None."""


class FcnOptions(ModelOptions):
    hidden: PositiveInt = Field(50, description="units of the hidden layer")


class ResNet9Options(ModelOptions):
    """None."""


class CnnOptions(ModelOptions):
    # A YAML list is no tuple: strict typing is lifted for the outer type only.
    channels: tuple[PositiveInt, PositiveInt] = Field(
        (16, 32), strict=False, description="of the convolutions"
    )
    hidden: PositiveInt = Field(64, description="units of the fully connected layer")


def linear(shape: Shape, classes: int, options: LinearOptions) -> nn.Module:
    """Softmax regression: one affine map of the flattened input."""
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), out=nn.Linear(prod(shape), classes)))


def fcn(shape: Shape, classes: int, options: FcnOptions) -> nn.Module:
    """One hidden layer of ReLU: 784-50-10 (39,760 parameters) on 28×28, 64-50-10 (3,760) on digits."""
    return nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(),
            hidden=nn.Linear(prod(shape), options.hidden),
            relu=nn.ReLU(),
            out=nn.Linear(options.hidden, classes),
        )
    )


def cnn(shape: Shape, classes: int, options: CnnOptions) -> nn.Module:
    """Two 3×3 convolutions, each with 2×2 max pooling and ReLU, and a hidden layer.

    Pooling comes first because it is the same function then, on a quarter of the values (a fifth faster).

    105,866 parameters on 28×28, 13,706 on digits. ConfigError for inputs that are no images of at
    least 4×4.
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ConfigError(f"model cnn: expected inputs (channels, height ≥ 4, width ≥ 4), got {shape}")
    first, second = options.channels
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], first, 3, padding=1),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 3, padding=1),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flat=nn.Flatten(),
            hidden=nn.Linear(second * (shape[1] // 4) * (shape[2] // 4), options.hidden),
            relu3=nn.ReLU(),
            out=nn.Linear(options.hidden, classes),
        )
    )


class _Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.f(x)
        return y


def resnet9(shape: Shape, classes: int, options: ResNet9Options) -> nn.Module:
    """ResNet-9 without batch norm: 6,570,880 parameters on 3×32×32 with 10 classes.

    The model of FetchSGD's and the intrinsic compression paper's CIFAR-10 experiments: eight biased 3×3
    convolutions and an unbiased last layer. ConfigError for inputs that are no images of at least 8×8.
    """
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise ConfigError(f"model resnet9: expected inputs (channels, height ≥ 8, width ≥ 8), got {shape}")

    def block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))

    return nn.Sequential(
        OrderedDict(
            prep=block(shape[0], 64),
            layer1=block(64, 128, pool=True),
            res1=_Residual(nn.Sequential(block(128, 128), block(128, 128))),
            layer2=block(128, 256, pool=True),
            layer3=block(256, 512, pool=True),
            res3=_Residual(nn.Sequential(block(512, 512), block(512, 512))),
            pool=nn.AdaptiveMaxPool2d(1),
            flat=nn.Flatten(),
            out=nn.Linear(512, classes, bias=False),
        )
    )


class Cnn4Options(ModelOptions):
    width: PositiveInt = Field(32, description="channels of the first two convolutions, half of the others'")
    hidden: PositiveInt = Field(128, description="units of the fully connected layer")


class LenetOptions(ModelOptions):
    """None."""


class ResNet18Options(ModelOptions):
    width: PositiveInt = Field(64, description="channels of the first stage")


class VggOptions(ModelOptions):
    width: PositiveInt = Field(64, description="channels of the first stage")


class UnetOptions(ModelOptions):
    width: PositiveInt = Field(16, description="channels at full size")
    depth: PositiveInt = Field(3, le=6, description="how often the size is halved")


def _image(name: str, shape: Shape, least: int) -> None:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ConfigError(
            f"model {name}: expected inputs (channels, height ≥ {least}, width ≥ {least}), got {shape}"
        )


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)


def _norm(channels: int) -> nn.GroupNorm:
    """16 channels a group, which Wu and He ("Group normalization", ECCV 2018) find as good as 32 groups."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


def cnn4(shape: Shape, classes: int, options: Cnn4Options) -> nn.Module:
    """Four 3×3 convolutions, max pooling after the second and the fourth, and a hidden layer.

    ConfigError for inputs that are no images of at least 4×4.
    """
    _image("cnn4", shape, 4)
    w = options.width
    return nn.Sequential(
        OrderedDict(
            conv1=_conv(shape[0], w),
            relu1=nn.ReLU(),
            conv2=_conv(w, w),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=_conv(w, 2 * w),
            relu3=nn.ReLU(),
            conv4=_conv(2 * w, 2 * w),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            hidden=nn.Linear(2 * w * (shape[1] // 4) * (shape[2] // 4), options.hidden),
            relu5=nn.ReLU(),
            out=nn.Linear(options.hidden, classes),
        )
    )


def lenet(shape: Shape, classes: int, options: LenetOptions) -> nn.Module:
    """Network 2 of the crucial-gradients paper (its Table 3): 62,006 parameters on 3×32×32 with 10 classes.

    The paper lists one pooling; only two give the 16·5·5 inputs of its first fully connected layer.
    ConfigError for inputs that are no images of at least 16×16.
    """
    _image("lenet", shape, 16)
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], 6, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            hidden1=nn.Linear(16 * height * width, 120),
            relu3=nn.ReLU(),
            hidden2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            out=nn.Linear(84, classes),
        )
    )


class _Basic(nn.Module):
    """ResNet's block of two convolutions; the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, stride),
            _norm(outputs),
            nn.ReLU(),
            _conv(outputs, outputs),
            _norm(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(shape: Shape, classes: int, options: ResNet18Options) -> nn.Module:
    """ResNet-18 (He et al., CVPR 2016) with GroupNorm and, for small pictures, a first convolution of 3×3
    without stride or pooling. ConfigError for inputs that are no images of at least 8×8."""
    _image("resnet18", shape, 8)
    channels = options.width
    layers = OrderedDict[str, nn.Module](
        prep=nn.Sequential(_conv(shape[0], channels), _norm(channels), nn.ReLU())
    )
    for stage in range(4):
        outputs = options.width << stage
        layers[f"stage{stage + 1}"] = nn.Sequential(
            _Basic(channels, outputs, 2 if stage else 1), _Basic(outputs, outputs, 1)
        )
        channels = outputs
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "out": nn.Linear(channels, classes)}
    return nn.Sequential(layers)


def vgg19(shape: Shape, classes: int, options: VggOptions) -> nn.Module:
    """VGG-19 (Simonyan and Zisserman 2014) with GroupNorm: its 16 convolutions, then one linear layer on the mean
    over the picture, as is usual for small pictures. ConfigError for inputs that are no images of at least 8×8.
    """
    _image("vgg19", shape, 8)
    layers, channels = OrderedDict[str, nn.Module](), shape[0]
    for stage, (times, convolutions) in enumerate(((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)), 1):
        for i in range(convolutions):
            outputs = options.width * times
            layers[f"conv{stage}_{i + 1}"] = _conv(channels, outputs)
            layers[f"norm{stage}_{i + 1}"] = _norm(outputs)
            layers[f"relu{stage}_{i + 1}"] = nn.ReLU()
            channels = outputs
        layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)  # up: 28×28 is halved five times too
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "out": nn.Linear(channels, classes)}
    return nn.Sequential(layers)


class _Unet(nn.Module):
    """Down by pooling, up by repetition; each size's way down is laid beside its way up."""

    def __init__(self, inputs: int, classes: int, width: int, depth: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                *(_conv(inputs, outputs), _norm(outputs), nn.ReLU()),
                *(_conv(outputs, outputs), _norm(outputs), nn.ReLU()),
            )

        sizes = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([inputs, *sizes], sizes, strict=False))
        self.up = nn.ModuleList(block(a + b, b) for a, b in zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.out = _conv(width, classes, size=1)

    def forward(self, x: Tensor) -> Tensor:
        beside = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            beside.append(x)
        for block, skip in zip(self.up, reversed(beside[:-1]), strict=True):
            x = block(torch.cat((self.grow(x), skip), 1))
        return cast(Tensor, self.out(x))


def unet(shape: Shape, classes: int, options: UnetOptions) -> nn.Module:
    """U-Net (Ronneberger, Fischer, Brox, MICCAI 2015), small, with GroupNorm: ``(classes, height, width)`` logits.

    ConfigError for inputs that are no images whose sides can be halved ``depth`` times.
    """
    _image("unet", shape, 2**options.depth)
    if any(side % 2**options.depth for side in shape[1:]):
        raise ConfigError(
            f"model unet: expected height and width in multiples of {2**options.depth} (2^depth), got {shape}"
        )
    return _Unet(shape[0], classes, options.width, options.depth)
