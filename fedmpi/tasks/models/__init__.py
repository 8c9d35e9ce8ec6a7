"""Small models, written out, and initial values that are the same on any machine.

No BatchNorm (its running statistics are neither parameters nor gradients, so no method here would
send them) and no dropout (its masks would be randomness outside :mod:`fedmpi.random`).

Shape: a sample's shape without the batch, ``(channels, height, width)`` for images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.tasks import Options, choose, parse_options

Shape = tuple[int, ...]

_UNIFORM = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ONES = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class LinearOptions(Options):
    """None."""


class FcnOptions(Options):
    hidden: PositiveInt = Field(50, description="units of the hidden layer")


class ResNet9Options(Options):
    """None."""


class CnnOptions(Options):
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


class Model(NamedTuple):
    options: type[Options]
    build: Callable[[Shape, int, Any], nn.Module]  # (shape, classes, options)
    summary: str


MODELS: dict[str, Model] = {
    "linear": Model(LinearOptions, linear, "softmax regression"),
    "fcn": Model(FcnOptions, fcn, "one hidden layer"),
    "cnn": Model(CnnOptions, cnn, "two convolutions and a hidden layer"),
    "resnet9": Model(ResNet9Options, resnet9, "ResNet-9 without batch norm"),
}


def build(name: str, shape: Shape, classes: int, key: int, **options: object) -> nn.Module:
    """The model ``name`` on the CPU, with the initial values of ``key`` (see :func:`initialize`).

    Args:
      name: a row of :data:`MODELS`.
      shape: one sample's shape, e.g. ``Data.shape``.
      classes: the number of outputs.
      key: an integer of :func:`fedmpi.random.key`.
      options: fields of the row's options.

    Raises:
      ConfigError: an unknown name or option, or an option's wrong value; names the valid ones.
    """
    row = choose("model", name, MODELS)
    checked = parse_options(f"model {name}", row.options, options)
    with torch.device("meta"):  # torch's own initial values would draw from its global generator
        module = row.build(shape, classes, checked)
    return initialize(module.to_empty(device="cpu"), key)


def initialize(module: nn.Module, key: int) -> nn.Module:
    """Fills every parameter of ``module`` in place as a function of ``key`` and the parameter's name.

    Weights and biases of linear and convolutional layers are uniform in ±1/√fan_in, the distribution
    that torch gives them (``kaiming_uniform_`` with a = √5); norm layers are 1 and 0. The 24-bit
    uniforms times two minus one are exact in float32, so one rounding is left, the same anywhere.

    Raises:
      ConfigError: a parameter of a layer that has no rule here.
    """
    for prefix, layer in module.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, _ONES):
            fills = {name: torch.full(p.shape, float(name == "weight")) for name, p in own.items()}
        elif isinstance(layer, _UNIFORM):
            bound = 1 / sqrt(layer.weight[0].numel())  # not **: a power may differ in its last bit
            fills = {
                name: _uniform(random.key(key, stream=f"{prefix}.{name}".lstrip(".")), p, bound)
                for name, p in own.items()
            }
        elif own:
            raise ConfigError(f"{_title(prefix, layer)}: no rule for the initial values of {', '.join(own)}")
        else:
            continue
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(fills[name])
    return module


def _uniform(key: int, like: torch.Tensor, bound: float) -> torch.Tensor:
    return random.uniform(key, like.numel()).mul_(2).sub_(1).mul_(bound).view(like.shape)


def check_supported(module: nn.Module) -> None:
    """ConfigError that names a layer with batch or running statistics (BatchNorm).

    Running statistics are state that changes outside the parameters, and a batch's statistics make a
    sum of gradients over clients differ from the gradient of the pooled batch.
    """
    for prefix, layer in module.named_modules():
        if isinstance(layer, _BATCH_NORM) or getattr(layer, "running_mean", None) is not None:
            raise ConfigError(
                f"{_title(prefix, layer)}: layers with batch or running statistics are not supported; "
                "use torch.nn.GroupNorm"
            )


def _title(prefix: str, layer: nn.Module) -> str:
    return f"module {prefix or '(the root)'} ({type(layer).__name__})"
