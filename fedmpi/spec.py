"""Names, shapes and offsets of a model's parameters over one flat float32 vector.

Everything that travels or is aggregated is one vector of D numbers; a model sees it through views, so
that a step of the optimizer is one operation on the whole vector and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from fedmpi.errors import ConfigError

_ROW = 64  # entries of a row of a tensor of one dimension


@dataclass(frozen=True)
class Spec:
    """The layout of D parameters; ``shapes[i]`` belongs to ``names[i]``, in the model's own order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Spec:
        """The layout of ``module``'s trainable parameters.

        Raises:
          ConfigError: a parameter is not float32, or there is none to train.
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for name, p in named:
            if p.dtype != torch.float32:
                raise ConfigError(
                    f"model: parameter {name} is {p.dtype}, expected torch.float32; local.precision: bfloat16 "
                    f"computes in bfloat16 all the same"
                )
        if not named:
            raise ConfigError("model: expected a parameter with requires_grad, got none")
        return cls(tuple(name for name, _ in named), tuple(tuple(p.shape) for _, p in named))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """D."""
        return sum(self.sizes)

    @cached_property
    def rows(self) -> Tensor:
        """Where its rows begin in the vector, and D: int64 ``(R + 1,)``. A row is a tensor's part of one index of the
        first dimension; a tensor of one dimension has rows of 64 entries, the last one of which may be short."""
        counts: list[int] = []
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            if len(shape) < 2:
                counts += [min(_ROW, size - at) for at in range(0, size, _ROW)]
            elif size:
                counts += [size // shape[0]] * shape[0]
        return torch.tensor([0, *counts], device="cpu").cumsum(0)

    def rows_on(self, device: torch.device) -> Tensor:
        """:attr:`rows` there."""
        return self.rows if device.type == "cpu" else _rows_on(self, device)

    def plain(self) -> dict[str, list[int]]:
        """Name → shape, as JSON types."""
        return {name: list(shape) for name, shape in zip(self.names, self.shapes, strict=True)}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter as a view of ``flat`` ``(..., D)``, shaped ``(..., *shape)``."""
        parts = flat.split(self.sizes, dim=-1)
        lead = flat.shape[:-1]
        return {n: v.view((*lead, *s)) for n, s, v in zip(self.names, self.shapes, parts, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The vector ``(D,)`` of named tensors (a copy)."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])


@lru_cache(maxsize=256)  # a job's groups
def _rows_on(spec: Spec, device: torch.device) -> Tensor:
    return spec.rows.to(device)
