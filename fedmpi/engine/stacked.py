"""Losses and gradients of many copies of a model at once, each with parameters and samples of its own.

A step of a small model is mostly the time that starting its operations takes. The copies' step is mapped over them
(``torch.func.vmap``) and traced once for each shape to a plain list of batched operations, which starts each of them
once for all copies, and neither a module nor autograd.

Shape suffixes: C copies, D parameters, B samples of a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fedmpi.engine.batches import Batches, padded
from fedmpi.engine.device import Samples
from fedmpi.engine.gradient import LEAST
from fedmpi.engine.rules import Rule
from fedmpi.message import CPU
from fedmpi.phases import phase
from fedmpi.spec import Spec
from fedmpi.tasks.objectives import Objective

_Program = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]

_TRACING = threading.Lock()  # torch.fx patches modules for all threads meanwhile; ranks may be threads
_WORTH = 1 << 22  # operations of a step; one with more takes longer than starting it does


class Stacked:
    """``loss`` of copies of ``model``, mean over samples, and its gradients."""

    def __init__(self, model: nn.Module, spec: Spec, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        def one(theta: dict[str, Tensor], x_B: Tensor, y_B: Tensor) -> Tensor:
            return loss(functional_call(model, theta, (x_B,)), y_B)

        self._model, self._spec, self._loss = model, spec, loss
        self._step = vmap(grad_and_value(one))
        self._programs: dict[tuple[torch.Size, ...], _Program] = {}

    def worth(self, x_B: Tensor, y_B: Tensor) -> bool:
        """A step on such samples is small, has no convolutions (which are slower with a kernel for each copy), and can
        be mapped. Counted rather than timed: a run takes the same way whenever it is run."""
        with FlopCounterMode(display=False) as counter:
            self._loss(self._model(x_B), y_B).backward()
        kinds = {
            str(operation) for operations in counter.get_flop_counts().values() for operation in operations
        }
        if counter.get_total_flops() > _WORTH or any("conv" in kind for kind in kinds):
            return False
        theta_CD = torch.zeros(2, self._spec.size, device=x_B.device)
        try:
            self(theta_CD, torch.stack([x_B, x_B]), torch.stack([y_B, y_B]), torch.empty_like(theta_CD))
        except Exception:  # whatever a user's model does that cannot be mapped: it is trained as it is
            return False
        return True

    def __call__(self, theta_CD: Tensor, x_CB: Tensor, y_CB: Tensor, grad_CD: Tensor) -> Tensor:
        """Fill ``grad_CD``; returns the losses ``(C,)``."""
        shapes = theta_CD.shape, x_CB.shape, y_CB.shape
        theta = self._spec.views(theta_CD)
        with torch.no_grad():
            if shapes not in self._programs:
                with _TRACING:
                    self._programs[shapes] = make_fx(self._step)(theta, x_CB, y_CB)
            grad, loss_C = self._programs[shapes](theta, x_CB, y_CB)
            torch.cat([grad[name].flatten(1) for name in self._spec.names], 1, out=grad_CD)
        return loss_C


def at_once(
    stacked: Stacked,
    rule: Rule,
    objective: Objective,
    lr: float,
    theta_D: Tensor,
    data: Samples,
    batches_of: Callable[[Tensor], Batches],
    clients_C: Tensor,
    steps_C: Tensor,
    frozen_D: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Accumulated gradients ``(C, D)``, and losses ``(C,)`` on the CPU, of clients that train from ``theta_D``: first
    steps, then second ones, and so on. Who makes most of them stands first, and from step to step fewer are left.

    Args:
      batches_of: the batches of clients in some order.
      steps_C: int64, how many each makes.
    """
    order = steps_C.argsort(descending=True, stable=True)
    steps_C, back, batches = steps_C[order], order.argsort(), batches_of(clients_C[order])
    theta_CD = theta_D.expand(padded(len(order)), -1).clone()
    grad_CD, g_CD = torch.empty_like(theta_CD), theta_D.new_zeros(len(order), len(theta_D))
    memory = rule.init(g_CD)
    loss_C, seen_C = (theta_D.new_zeros(len(order), dtype=torch.float64) for _ in range(2))
    for step in range(int(steps_C[0])):
        on = int((steps_C > step).sum())
        with phase("load"):
            taken, rows = batches.step(step, on), padded(on)
            x_CB, y_CB = taken.first(rows).of(data)
        losses_C = stacked(theta_CD[:rows], x_CB, y_CB, grad_CD[:rows])[:on]
        own = {name: value[:on] for name, value in memory.items()}
        direction_CD = rule.direction(own, grad_CD[:on], theta_CD[:on], theta_D, frozen_D)
        g_CD[:on] += direction_CD
        if rule.plain:  # θ_s = θ₀ − η Σ g
            torch.add(theta_D, g_CD[:on], alpha=-lr, out=theta_CD[:on])
        else:
            theta_CD[:on].add_(direction_CD, alpha=-lr)
        weight_C = objective.weights(y_CB[:on])
        loss_C[:on] += losses_C * weight_C
        seen_C[:on] += weight_C
    ordered = bool((steps_C[:-1] == steps_C[1:]).all())
    return (g_CD if ordered else g_CD[back.to(g_CD.device)]), (loss_C / seen_C.clamp(min=LEAST)).to(CPU)[back]
