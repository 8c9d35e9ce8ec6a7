"""A user's own partition, by import path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpi import own
from fedmpi.errors import ConfigError
from fedmpi.tasks.dataset import Split

USAGE = "divide(targets, clients: int, seed: int, groups, **options) -> the client of each sample, (N,)"


def owners(path: str, train: Split, clients: int, seed: int, options: Mapping[str, object]) -> Tensor:
    """The client of each sample, int64 ``(N,)`` in [0, clients).

    Raises:
      ConfigError: there is no such function, it does not take these options, or it returned something else.
    """
    arguments: tuple[Any, ...] = train.y, clients, seed, train.groups
    found = own.call("partition.name", path, *arguments, options=options, usage=USAGE)
    try:
        owner_N = found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"partition.name: {path} returned a {type(found).__name__}, expected {USAGE}"
        ) from None
    kind = owner_N.dtype
    whole = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if owner_N.shape != (len(train.y),) or not whole:
        raise ConfigError(
            f"partition.name: {path} returned shape {tuple(owner_N.shape)} of {kind}, expected {USAGE}: "
            f"({len(train.y)},) whole numbers"
        )
    owner_N = owner_N.long()
    wrong = owner_N[(owner_N < 0) | (owner_N >= clients)]
    if len(wrong):
        raise ConfigError(
            f"partition.name: {path}: expected clients from 0 to {clients - 1}, got {int(wrong[0])}"
        )
    return owner_N
