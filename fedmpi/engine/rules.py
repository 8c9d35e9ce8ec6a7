"""How a client steps: θ ← θ − η u, with the direction u of a rule for a gradient.

Rules work on vectors ``(D,)``, or on those of several clients ``(C, D)``, whose memory they change in place. Sources:
Sutskever et al. 2013 (momentum and Nesterov's, as in torch.optim.SGD); Kingma and Ba 2015 (Adam, with bias correction);
Loshchilov and Hutter 2019 (AdamW); Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (FedProx's
μ); Wang et al., "Tackling the Objective Inconsistency Problem", NeurIPS 2020 (what a rule's steps weigh in FedNova).

Shape suffixes: C clients, D numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.local import Local
from fedmpi.method import State


class Rule(NamedTuple):
    """One rule with its constants.

    Attributes:
      name: sgd, nesterov, adam or adamw; own: a class of torch's kind steps by the u that this one makes.
      mu: FedProx's μ: the gradient of μ/2 ‖θ − θ₀‖², with θ₀ what the client started from, is added.
      clip: the gradient of a step has at most this L2 norm; None: any.
    """

    name: str
    momentum: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    mu: float
    clip: float | None

    @classmethod
    def of(cls, local: Local) -> Rule:
        return cls(
            local.optimizer if isinstance(local.optimizer, str) else "own",
            local.momentum,
            local.weight_decay,
            local.beta1,
            local.beta2,
            local.epsilon,
            local.mu,
            local.clip,
        )

    @property
    def plain(self) -> bool:
        """u is the gradient."""
        return self.first and not self.momentum and not self.weight_decay and not self.mu

    @property
    def first(self) -> bool:
        """The first step's u is the gradient and the weight decay: sums of clients' gradients are sums of their u."""
        return self.name == "sgd" and self.clip is None

    def init(self, like: Tensor) -> State:
        """The memory before the first step, of the shape of the vectors; {} for none."""
        if self.name in ("adam", "adamw"):
            count = like.new_zeros((*like.shape[:-1], 1))
            return {
                "momentum": torch.zeros_like(like),
                "variance": torch.zeros_like(like),
                "count": count,
            }
        return {"momentum": torch.zeros_like(like)} if self.momentum else {}

    def direction(
        self, memory: State, grad: Tensor, theta: Tensor, start: Tensor, frozen_D: Tensor | None = None
    ) -> Tensor:
        """u for a gradient at ``theta``; ``memory`` changes in place, entries ``frozen_D`` of u are 0."""
        if self.mu:
            grad = grad.add(theta - start, alpha=self.mu)
        if self.weight_decay and self.name != "adamw":
            grad = grad.add(theta, alpha=self.weight_decay)
        if frozen_D is not None:
            grad = grad.masked_fill(frozen_D, 0)
        if self.clip is not None:
            norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True, dtype=torch.float64)
            grad = grad * (self.clip / norm.clamp(min=self.clip)).float()
        if self.name in ("adam", "adamw"):
            return self._adam(memory, grad, theta, frozen_D)
        if not self.momentum:
            return grad
        velocity = memory["momentum"].mul_(self.momentum).add_(grad)
        return grad.add(velocity, alpha=self.momentum) if self.name == "nesterov" else velocity

    def _adam(self, memory: State, grad: Tensor, theta: Tensor, frozen_D: Tensor | None) -> Tensor:
        m, v, count = memory["momentum"], memory["variance"], memory["count"]
        m.mul_(self.beta1).add_(grad, alpha=1 - self.beta1)
        v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        count += 1
        times = count.double()
        below = (v / (1 - self.beta2**times).float()).sqrt_().add_(self.epsilon)
        u = (m / (1 - self.beta1**times).float()).div_(below)
        if self.weight_decay and self.name == "adamw":
            u.add_(theta if frozen_D is None else theta.masked_fill(frozen_D, 0), alpha=self.weight_decay)
        return u

    def weight(self, steps_C: Tensor, lr: float) -> Tensor:
        """‖a‖₁ of FedNova: what a client's gradients weigh in the sum of its directions, float64 of τ; section 4.1."""
        tau_C = steps_C.double()
        if self.mu:
            return (1 - (1 - lr * self.mu) ** tau_C) / (lr * self.mu)
        if self.momentum:
            rho = self.momentum
            return (tau_C - rho * (1 - rho**tau_C) / (1 - rho)) / (1 - rho)
        return tau_C

    def factors(self, local: Local, steps_C: Tensor, factor: float) -> Tensor | None:
        """What clients' accumulated gradients are multiplied by at ``factor`` times their rate, float32 ``(C, 1)`` or
        ``(1, 1)``, with FedNova divided by what their steps weigh; None for 1."""
        if local.fednova:
            return (factor / self.weight(steps_C, local.lr * factor)).float()[:, None]
        return None if factor == 1 else torch.full((1, 1), factor)
