"""Initial values that are the same on any machine, and what layers a model may have."""

from __future__ import annotations

from math import sqrt

import torch
from torch import nn

from fedmpi import random
from fedmpi.errors import ConfigError

_UNIFORM = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ONES = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


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
            raise ConfigError(
                f"{_title(prefix, layer)}: no rule for the initial values of {', '.join(own)}; expected "
                f"{', '.join(kind.__name__ for kind in (*_UNIFORM, *_ONES))}"
            )
        else:
            continue
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(fills[name])
    return module


def _uniform(key: int, like: torch.Tensor, bound: float) -> torch.Tensor:
    return random.uniform(key, like.numel()).mul_(2).sub_(1).mul_(bound).view(like.shape)


def check_supported(module: nn.Module) -> None:
    """ConfigError that names a parameter without values in the processor's memory. (What a model's training depends on,
    :mod:`fedmpi.engine.probe` sees.)"""
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter) or p.device.type != "cpu":
            where = "without a shape yet" if p.device.type == "cpu" else f"on the device {p.device}"
            raise ConfigError(
                f"model: parameter {name} is {where}, expected one with values on the CPU; give lazy layers their "
                "input sizes, and build the model on the CPU"
            )


def _title(prefix: str, layer: nn.Module) -> str:
    return f"module {prefix or '(the root)'} ({type(layer).__name__})"
