"""The methods: one file each, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fedmpi.errors import ConfigError
from fedmpi.method import Method
from fedmpi.methods import (
    atomo,
    dense,
    fetchsgd,
    halves,
    intrinsic,
    lookback,
    powersgd,
    prune,
    qsgd,
    randomk,
    rtopk,
    signsgd,
    topk,
)
from fedmpi.methods.base import Entry, Options, Setup
from fedmpi.spec import Spec
from fedmpi.validation import choose, describe

METHODS: dict[str, Entry] = {
    "dense": dense.ENTRY,
    "signsgd": signsgd.ENTRY,
    "fp16": halves.FP16,
    "bf16": halves.BF16,
    "topk": topk.ENTRY,
    "randomk": randomk.ENTRY,
    "rtopk": rtopk.ENTRY,
    "prune": prune.ENTRY,
    "qsgd": qsgd.ENTRY,
    "intrinsic": intrinsic.ENTRY,
    "fetchsgd": fetchsgd.ENTRY,
    "atomo": atomo.ENTRY,
    "powersgd": powersgd.ENTRY,
    "lookback": lookback.ENTRY,
}


def parse(value: Any, where: str = "method") -> Options:
    """The options of ``{name: topk, ratio: 0.01}`` or of the bare name.

    Raises:
      ConfigError: an unknown method or option, or a value of the wrong type or range.
    """
    if isinstance(value, Options):
        return value
    if isinstance(value, str):
        value = {"name": value}
    entry = METHODS[choose(where, value, METHODS)]
    try:
        return entry.options.model_validate(value)
    except ValidationError as error:
        raise ConfigError(describe(error, entry.options, where)) from None


def parse_inner(value: Any, wrapper: str) -> Options:
    """The options of the method that ``wrapper`` is laid over.

    Raises:
      ConfigError: as :func:`parse`, or the wrapper cannot be laid over it.
    """
    options, allowed = parse(value, "method.inner"), METHODS[wrapper].wraps
    valid: Sequence[str] = allowed
    if allowed == "any":
        valid = [name for name, entry in METHODS.items() if not entry.wraps and not entry.two_passes]
    if options.name not in valid:
        raise ConfigError(
            f"method.inner: {wrapper} does not go over {options.name}; valid: {', '.join(valid)}"
        )
    return options


def build(options: Options | dict[str, Any] | str, spec: Spec, setup: Setup) -> Method:
    """The method for a parameter layout.

    Raises:
      ConfigError: the options are wrong, or do not fit a model of this size.
    """
    options = parse(options)
    return METHODS[options.name].build(options, spec, setup)
