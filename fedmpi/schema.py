"""What a state may hold: each tensor's name, type and shape, declared once, by the method's own first state.

Whatever comes from outside (a saved hook state, a checkpoint's part, a download) is compared with such a schema
before anything uses it, so that no tensor is broadcast, cut or converted without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from reprlib import Repr
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """One tensor of a state.

    Attributes:
      dtype: its type.
      shape: its shape; None stands for a length that the state itself decides (a history's).
      finite: infinities and NaN are wrong.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    finite: bool = True


Schema = dict[str, Entry]


def schema_of(first: Mapping[str, Tensor], clients: int | None = None, grows: Collection[str] = ()) -> Schema:
    """What a state may hold that began as ``first`` (a compressor's ``init()``, a server's ``memory()`` or
    ``init()``).

    Args:
      first: the first state.
      clients: the states of so many clients lie in one, with a leading axis.
      grows: the names of those whose first axis is a history.
    """
    lead: tuple[int | None, ...] = () if clients is None else (clients,)
    return {
        name: Entry(value.dtype, lead + ((None, *value.shape[1:]) if name in grows else tuple(value.shape)))
        for name, value in first.items()
    }


def differs(schema: Schema, values: object, what: str) -> str | None:
    """What is wrong with ``values``, in a sentence without an end; None if they are such a state.

    Args:
      schema: what they may be.
      values: anything.
      what: how the sentence calls them, e.g. ``groups.0.state``.
    """
    if not isinstance(values, Mapping):
        return f"{what}: expected tensors by name, got {shown(values)}"
    if missing := schema.keys() - values.keys():
        return f"{what}: expected {', '.join(schema)}, {', '.join(sorted(missing))} is missing"
    for name in values:
        if name not in schema:
            return f"{what}: expected {', '.join(schema) or 'nothing'}, got {shown(name)} besides"
    for name, entry in schema.items():
        if wrong := _differs(entry, values[name]):
            return f"{what}.{name}: {wrong}"
    return None


def _differs(entry: Entry, value: object) -> str | None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return f"expected a dense tensor, got {shown(value)}"
    fits = len(value.shape) == len(entry.shape) and all(
        n is None or n == m for n, m in zip(entry.shape, value.shape, strict=True)
    )
    if value.dtype != entry.dtype or not fits:
        shape = "(" + ", ".join("any" if n is None else str(n) for n in entry.shape) + ")"
        return f"expected {_dtype(entry.dtype)} of shape {shape}, got {shown(value)}"
    if entry.finite and entry.dtype.is_floating_point and not bool(value.isfinite().all()):
        return "expected finite numbers, got some that are not"
    return None


def shown(value: object) -> str:
    """Anything, for an error message: never long, and never expensive."""
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided else f"{value.layout} "
        return f"{kind}{_dtype(value.dtype)} of shape ({', '.join(map(str, value.shape))})"
    return _SHORT.repr(value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = 12
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 4, 80, 40, 80

    def repr1(self, x: object, level: int) -> str:
        if isinstance(x, Tensor):
            return shown(x)
        return super().repr1(x, level)


_SHORT = _Short()
