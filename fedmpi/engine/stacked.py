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

from fedmpi.spec import Spec

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
        theta_CD = torch.zeros(2, self._spec.size)
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
