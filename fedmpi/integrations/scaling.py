"""Gradients that a GradScaler has scaled, in a job that did not say so.

What a method keeps from step to step (a residual) is in units of gradients: when the scale changes, it no longer fits.
So the first step of an optimizer over the job's parameters is looked at: who called it. A scaler that did is used from
there on, what the step before kept is forgotten, and a warning says so.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")
_STEP = torch.amp.GradScaler.step.__code__


def scaler_behind() -> torch.amp.GradScaler | None:
    """The GradScaler that called the optimizer's step()."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(16):  # past the wrappers of hooks and schedulers
        if frame is None:
            return None
        if frame.f_code is _STEP:
            found: torch.amp.GradScaler = frame.f_locals["self"]
            return found
        frame = frame.f_back
    return None


Found = Callable[[Any, torch.amp.GradScaler, torch.optim.Optimizer], None]
_looks: dict[int, tuple[weakref.ref[Any], set[int], Found]] = {}
_hooked: list[Any] = []


def look_for_scaler(owner: T, parameters: Iterable[Tensor], found: Found) -> None:
    """``found`` is called with ``owner``, once, where a scaler makes the first step of an optimizer over some of the
    parameters, while ``owner`` is there, which holds them."""
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_stepped))
    _looks[id(owner)] = weakref.ref(owner), {id(p) for p in parameters}, found
    weakref.finalize(owner, _looks.pop, id(owner), None)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _looks:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, (there, mine, found) in list(_looks.items()):
        owner = there()
        if owner is None or not mine & trained:
            continue
        _looks.pop(key, None)
        scaler = scaler_behind()
        if scaler is not None and scaler.is_enabled():
            found(owner, scaler, optimizer)


def unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """``scaler.unscale_(optimizer)`` was called since the last update."""
    states = getattr(scaler, "_per_optimizer_states", {})
    return id(optimizer) in states and states[id(optimizer)]["stage"] is OptState.UNSCALED


def around_steps(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    around: Callable[[Callable[[], Any]], Any],
) -> None:
    """Each step that the scaler makes with this optimizer, or leaves out, goes through ``around``."""
    step = scaler.step

    def wrapped(given: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if given is not optimizer:
            return step(given, *args, **kwargs)
        return around(lambda: step(given, *args, **kwargs))

    scaler.step = wrapped  # type: ignore[method-assign, assignment]


def warn_of_scaler(who: str) -> None:
    warnings.warn(
        f"fedmpi: scaler: expected the job's GradScaler, by which gradients are scaled, got none; it is used from the "
        f"second step on, and what the method kept in the first is forgotten: {who}(…, scaler=scaler)",
        stacklevel=2,
    )
