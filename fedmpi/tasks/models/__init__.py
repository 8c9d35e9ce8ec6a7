"""Models by name, built with the initial values of a key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fedmpi import own
from fedmpi.errors import ConfigError
from fedmpi.machine import available_memory
from fedmpi.tasks import Options, choose
from fedmpi.tasks.models import images, language
from fedmpi.tasks.models.images import Shape
from fedmpi.tasks.models.initial import ModelOptions, check_supported, initialize, load_initial
from fedmpi.validation import checked

__all__ = ["MODELS", "SEEDING", "Model", "Shape", "build", "check_supported", "initialize"]

USAGE = "build(shape: tuple[int, ...], classes: int, **options) -> torch.nn.Module"
SEEDING = threading.RLock()  # who seeds the process's generators for a while: ranks may be threads


class Model(NamedTuple):
    options: type[Options]
    build: Callable[[Shape, int, Any], nn.Module]  # (shape, classes, options)
    summary: str
    seeded: bool = False  # has its own initial values or stored ones: torch's generator is seeded meanwhile


MODELS: dict[str, Model] = {
    "linear": Model(
        images.LinearOptions, images.linear, "one affine map: softmax regression, or a linear SVM"
    ),
    "fcn": Model(images.FcnOptions, images.fcn, "one hidden layer"),
    "cnn": Model(images.CnnOptions, images.cnn, "two convolutions and a hidden layer"),
    "cnn4": Model(images.Cnn4Options, images.cnn4, "four convolutions and a hidden layer"),
    "lenet": Model(images.LenetOptions, images.lenet, "two 5×5 convolutions and two hidden layers"),
    "resnet9": Model(images.ResNet9Options, images.resnet9, "ResNet-9 without batch norm"),
    "resnet18": Model(images.ResNet18Options, images.resnet18, "ResNet-18 with GroupNorm"),
    "vgg19": Model(images.VggOptions, images.vgg19, "VGG-19 with GroupNorm"),
    "unet": Model(images.UnetOptions, images.unet, "a small U-Net: a class a pixel"),
    "encoder": Model(language.EncoderOptions, language.encoder, "BERT's kind and a linear layer", True),
    "decoder": Model(language.DecoderOptions, language.decoder, "GPT-2's kind: the next token", True),
}


def build(name: str, shape: Shape, classes: int, key: int, **options: object) -> nn.Module:
    """The model ``name`` on the CPU, with the initial values of ``key`` (see :func:`initialize`).

    Models of transformers and your own fill themselves: then torch's generator is seeded with ``key`` for as
    long, so that their values are the same on every rank, with the same version of torch.

    Args:
      name: a row of :data:`MODELS`, or the import path of your own ``build(shape, classes, **options)``.
      shape: one sample's shape, e.g. ``Data.shape``.
      classes: the number of outputs.
      key: an integer of :func:`fedmpi.random.key`.
      options: fields of the row's options. ``init``, a file of initial values, your own model has too.

    Raises:
      ConfigError: an unknown name or option, or an option's wrong value (names the valid ones), a file that does not
        fit, or your own function failed.
    """
    init = options.get("init")
    if own.is_path(name) and "init" in options and not own.takes("model.name", name, "init", USAGE):
        init = checked(ModelOptions, {"init": init}, "model").init
        options = {key: value for key, value in options.items() if key != "init"}
    elif own.is_path(name):
        init = None  # its own affair
    module = _build(name, shape, classes, key, options)
    return module if init is None else load_initial(name, module, str(init))


def _build(name: str, shape: Shape, classes: int, key: int, options: dict[str, object]) -> nn.Module:
    if own.is_path(name):
        with SEEDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(key % 2**63)
            module = own.call("model.name", name, shape, classes, options=options, usage=USAGE)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model.name: {name} returned a {type(module).__name__}, expected {USAGE}")
        return module
    row = choose("model", name, MODELS)
    given = checked(row.options, options, f"model {name}")
    with (
        SEEDING
    ):  # transformers imports a model's module when it is first built, and not for several threads at once
        _fits(name, row, shape, classes, given)
    if row.seeded:
        with SEEDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(key % 2**63)
            return row.build(shape, classes, given)
    with torch.device("meta"):  # torch's own initial values would draw from its global generator
        module = row.build(shape, classes, given)
    # Not to_empty(): empty_like of a meta tensor on another device imports sympy, 0.7 s of every process.
    return initialize(module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu")), key)


def _fits(name: str, row: Model, shape: Shape, classes: int, given: Any) -> None:
    """Raises:
    ConfigError: the model's parameters would not fit into this machine's memory.
    """
    if getattr(given, "pretrained", None) is not None:
        return
    try:
        with torch.device("meta"):  # shapes, no memory
            size = sum(p.numel() * p.element_size() for p in row.build(shape, classes, given).parameters())
    except (RuntimeError, OverflowError) as error:  # a size that has no 64 bits
        if not any(
            word in str(error).lower() for word in ("overflow", "too large", "too big", "invalid shape")
        ):
            raise
        size = 2**63
    need, there = 2 * size, available_memory()  # it, and θ
    if need > there:
        raise ConfigError(
            f"model {name}: it needs {need / 2**30:,.0f} GiB of memory at the least ({size // 4:,} parameters, held "
            f"twice), {there / 2**30:,.1f} GiB are free; make it smaller: {given!r}"[:400]
        )
