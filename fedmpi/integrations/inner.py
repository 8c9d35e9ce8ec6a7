"""The state of the optimizer that a job gives to ``fedmpi.local_sgd``, which makes the steps on each rank."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor


class Inner:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._first = {p: _copied(state) for p, state in optimizer.state.items()}

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """The state of these is as it was when the optimizer was given."""
        for p in parameters:
            self._optimizer.state.pop(p, None)
            if p in self._first:
                self._optimizer.state[p] = _copied(self._first[p])

    def forget_odd(self) -> None:
        """The same for each parameter whose state is not finite."""
        self.forget(
            [
                p
                for p, state in self._optimizer.state.items()
                if not all(bool(v.isfinite().all()) for v in state.values() if _is_floating(v))
            ]
        )


def _is_floating(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for name, v in state.items()}
