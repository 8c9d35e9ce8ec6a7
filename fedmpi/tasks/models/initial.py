"""Initial values that are the same on any machine, or those of a file, and what layers a model may have."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.tasks import Options
from fedmpi.tasks.readers.lines import regular

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


class ModelOptions(Options):
    init: str | None = Field(
        None, description="a file of initial values: safetensors, all names of the model's state_dict"
    )


def load_initial(name: str, module: nn.Module, path: str) -> nn.Module:
    """Fills ``module``'s parameters and buffers from a safetensors file, in place; one name of tied ones will do.

    Raises:
      ConfigError: the file cannot be read, or lacks or has other tensors than the model; names the first.
    """
    if path == "pretrained":
        raise ConfigError(
            f"model.init: expected a file, for there are no pretrained values of model {name} here; save those that "
            "you have, safetensors.torch.save_file(model.state_dict(), FILE), and set model.init: FILE, or let your "
            "own model (model: {name: 'package.module:build'}) load them; text models take pretrained: NAME instead"
        )
    file = Path(path).expanduser()
    title = f"model.init: {file}"
    if file.suffix != ".safetensors":
        raise ConfigError(
            f"model.init: expected the path of a .safetensors file, got {path!r:.200}; text models take "
            "pretrained, the name of a model of transformers, and your own can load what it likes"
        )
    if not file.is_file():
        raise ConfigError(f"{title}: expected a file, there is none in {Path.cwd()}")
    try:
        found = load_file(regular(file))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{title}: expected safetensors: {error}") from None
    wanted = module.state_dict()
    alike: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}  # tied ones, by their memory
    for key, value in wanted.items():
        place = value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape)
        alike.setdefault(place, []).append(key)
    for keys in alike.values():
        there = [key for key in keys if key in found]
        if any(not torch.equal(found[key], found[there[0]]) for key in there[1:]):
            raise ConfigError(
                f"{title}: expected one value of {', '.join(there)}, which are tied, got several"
            )
        found |= {key: found[there[0]] for key in keys if there}
    if lacking := [key for key in wanted if key not in found]:
        raise ConfigError(
            f"{title}: expected the tensors of model {name}, it lacks {len(lacking)}: {lacking[0]}, …"
        )
    if foreign := [key for key in found if key not in wanted]:
        raise ConfigError(
            f"{title}: expected the tensors of model {name}, it has {len(foreign)} others: {foreign[0]!r:.100}, …"
        )
    for key, value in wanted.items():
        _check_initial(f"{title}: {key}", found[key], value)
    module.load_state_dict(found)
    return module


def _check_initial(title: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape or found.is_floating_point() != wanted.is_floating_point():
        raise ConfigError(
            f"{title}: expected {tuple(wanted.shape)} of {wanted.dtype}, got {tuple(found.shape)} of {found.dtype}"
        )
    if found.is_floating_point() and not bool(found.to(wanted.dtype).isfinite().all()):
        raise ConfigError(f"{title}: expected finite numbers, got a NaN or an infinity")


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
