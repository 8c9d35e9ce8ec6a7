"""Losses and gradients of many copies of a model at once, each with parameters and samples of its own.

A step of a small model is mostly the time that starting its operations takes. The copies' step is mapped over them
(``torch.func.vmap``) and traced once for each shape to a plain list of batched operations, which starts each of them
once for all copies, and neither a module nor autograd.

Shape suffixes: C copies, D parameters, N numbers of buffers, B samples of a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fedmpi.engine.apart import Apart
from fedmpi.engine.batches import Batches, padded
from fedmpi.engine.device import Samples
from fedmpi.engine.gradient import LEAST
from fedmpi.engine.rules import Rule
from fedmpi.engine.updates import Update
from fedmpi.message import CPU
from fedmpi.method import State, nest, unnest
from fedmpi.phases import phase
from fedmpi.spec import Spec
from fedmpi.tasks.objectives import Objective

_Values = dict[str, Tensor]
_Program = Callable[[_Values, Tensor, Tensor, Tensor], tuple[_Values, tuple[Tensor, Tensor]]]
_NOTHING = Spec((), ())
_NEAR = 1e-3  # of the largest entry: what a buffer holds after a step of one copy, and of several

_TRACING = threading.Lock()  # torch.fx patches modules for all threads meanwhile; ranks may be threads
_WORTH = 1 << 22  # operations of a step; one with more takes longer than starting it does


class Stacked:
    """``loss`` of copies of ``model``, mean over samples, its gradients, and the buffers after it.

    Args:
      spec: what is stepped.
      buffers: those that a pass in training changes, in place.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        loss: Callable[[Tensor, Tensor], Tensor],
        buffers: Spec = _NOTHING,
    ) -> None:
        kinds = {name: buffer.dtype for name, buffer in model.named_buffers()}

        def one(
            theta: _Values, buffers_N: Tensor, x_B: Tensor, y_B: Tensor
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            values = {n: v.to(kinds[n], copy=True) for n, v in buffers.views(buffers_N).items()}
            value = loss(functional_call(model, {**theta, **values}, (x_B,)), y_B)
            now = [values[name].reshape(-1).float() for name in buffers.names]
            return value, (value, torch.cat(now) if now else buffers_N)

        self._model, self._spec, self._loss, self._buffers = model, spec, loss, buffers
        self._step = vmap(grad(one, has_aux=True))
        self._programs: dict[tuple[torch.Size, ...], _Program] = {}

    def worth(self, x_B: Tensor, y_B: Tensor) -> bool:
        """A step on such samples is small, has no convolutions (which are slower with a kernel for each copy), and can
        be mapped. Counted rather than timed: a run takes the same way whenever it is run."""
        start_N = self._held()
        with FlopCounterMode(display=False) as counter:
            self._loss(self._model(x_B), y_B).backward()
        after_N = self._held()
        kinds = {
            str(operation) for operations in counter.get_flop_counts().values() for operation in operations
        }
        if counter.get_total_flops() > _WORTH or any("conv" in kind for kind in kinds):
            return False
        named = dict(self._model.named_parameters())
        theta_D = self._spec.flatten({name: named[name].detach() for name in self._spec.names})
        buffers_CN, grad_CD = start_N.expand(2, -1).clone(), torch.zeros(2, self._spec.size).to(theta_D)
        try:
            self(theta_D.expand(2, -1), torch.stack([x_B, x_B]), torch.stack([y_B, y_B]), grad_CD, buffers_CN)
        except Exception:  # whatever a user's model does that cannot be mapped: it is trained as it is
            return False
        # A module that assigns a buffer what it computed leaves none in place.
        scale = float(after_N.abs().amax()) if len(after_N) else 0.0
        return bool(torch.allclose(buffers_CN[0], after_N, rtol=0, atol=_NEAR * scale))

    def _held(self) -> Tensor:
        """What the model's buffers hold, ``(N,)``."""
        named = dict(self._model.named_buffers())
        held = [named[name].detach().reshape(-1).float() for name in self._buffers.names]
        return torch.cat(held) if held else torch.zeros(0)

    def __call__(
        self, theta_CD: Tensor, x_CB: Tensor, y_CB: Tensor, grad_CD: Tensor, buffers_CN: Tensor
    ) -> Tensor:
        """Fill ``grad_CD``, and change ``buffers_CN``; returns the losses ``(C,)``."""
        shapes = theta_CD.shape, x_CB.shape, y_CB.shape
        theta = self._spec.views(theta_CD)
        with torch.no_grad():
            if shapes not in self._programs:
                with _TRACING:
                    self._programs[shapes] = make_fx(self._step)(theta, buffers_CN, x_CB, y_CB)
            grads, (loss_C, after_CN) = self._programs[shapes](theta, buffers_CN, x_CB, y_CB)
            torch.cat([grads[name].flatten(1) for name in self._spec.names], 1, out=grad_CD)
            buffers_CN.copy_(after_CN)
        return loss_C


def suits(sizes_C: Tensor, batch: int | None, pads: bool, alone: bool) -> bool:
    """Clients with so many samples can train at once: rows of batches that are not full are left out (``pads``), unless
    they would count for others (not ``alone``; then no batch has a single sample, either)."""
    size = int(sizes_C[0])
    batch = min(batch or size, size)
    equal = bool((sizes_C == size).all())
    return (equal or pads) if alone else equal and 1 not in (batch, size % batch)


def at_once(
    stacked: Stacked,
    apart: Apart,
    rule: Rule,
    objective: Objective,
    lr: float,
    x_X: Tensor,
    data: Samples,
    batches_of: Callable[[Tensor], Batches],
    clients_C: Tensor,
    steps_C: Tensor,
    frozen_X: Tensor | None,
    kept: State,
) -> Update:
    """Clients train from ``x_X``: first steps, then second ones, and so on. Who makes most of them stands first, and
    from step to step fewer are left.

    Args:
      batches_of: the batches of clients in some order.
      steps_C: int64, how many each makes.
      kept: what these clients keep for themselves, by :meth:`Trainer.keeps`.
    """
    start_D, buffers_CN = apart.begin_all(x_X, kept.get("local"), len(clients_C))
    frozen_D, memory = apart.mask(frozen_X), unnest(kept, "optimizer.")
    order = steps_C.argsort(descending=True, stable=True)
    there = order.to(start_D.device)
    steps_C, back, batches = steps_C[order], order.argsort(), batches_of(clients_C[order])
    rows, size = padded(len(order)), start_D.shape[-1]
    start_D = start_D if start_D.dim() == 1 else start_D[there]
    theta_CD = start_D.expand(rows, -1).clone() if start_D.dim() == 1 else _grown(start_D, rows)
    held_CN = _grown(buffers_CN[there], rows)
    grad_CD, g_CD = torch.empty_like(theta_CD), start_D.new_zeros(len(order), size)
    memory = {name: value[there] for name, value in memory.items()} if memory else rule.init(g_CD)
    loss_C, seen_C = (start_D.new_zeros(len(order), dtype=torch.float64) for _ in range(2))
    for step in range(int(steps_C[0])):
        on = int((steps_C > step).sum())
        with phase("load"):
            taken, rows = batches.step(step, on), padded(on)
            x_CB, y_CB = taken.first(rows).of(data)
        losses_C = stacked(theta_CD[:rows], x_CB, y_CB, grad_CD[:rows], held_CN[:rows])[:on]
        own = {name: value[:on] for name, value in memory.items()}
        begun_D = start_D if start_D.dim() == 1 else start_D[:on]
        direction_CD = rule.direction(own, grad_CD[:on], theta_CD[:on], begun_D, frozen_D)
        g_CD[:on] += direction_CD
        if rule.plain:  # θ_s = θ₀ − η Σ g
            torch.add(begun_D, g_CD[:on], alpha=-lr, out=theta_CD[:on])
        else:
            theta_CD[:on].add_(direction_CD, alpha=-lr)
        weight_C = objective.weights(y_CB[:on])
        loss_C[:on] += losses_C * weight_C
        seen_C[:on] += weight_C
    loss_C = (loss_C / seen_C.clamp(min=LEAST)).to(CPU)[back]
    theta_CD, held_CN = theta_CD[: len(order)], held_CN[: len(order)]
    if not bool((steps_C[:-1] == steps_C[1:]).all()):  # else in the order that they came in
        there = back.to(g_CD.device)
        g_CD, theta_CD, held_CN = g_CD[there], theta_CD[there], held_CN[there]
        memory = {name: value[there] for name, value in memory.items()}
    g_CX, kept_CL = apart.end_all(x_X, g_CD, theta_CD, held_CN)
    after = {name: value for name, value in nest(memory, "optimizer.").items() if name in kept}
    return Update(g_CX, loss_C, steps_C[back], after | ({"local": kept_CL} if "local" in kept else {}))


def _grown(rows_CN: Tensor, rows: int) -> Tensor:
    """A copy with so many rows, the last one again and again."""
    return rows_CN[torch.arange(rows, device=rows_CN.device).clamp(max=len(rows_CN) - 1)]
