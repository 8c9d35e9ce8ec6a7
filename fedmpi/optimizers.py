"""Server and outer optimizers: from the mean of the clients' vectors to the direction in which the server steps.

Pure functions of a vector and a state, over whatever the method sums: parameters, or coordinates of a
subspace (so that a static subspace is never left). Source of adam and yogi: Reddi et al., "Adaptive
Federated Optimization", ICLR 2021, Algorithm 2 (without bias correction, as there; v starts at τ², its least).
nesterov is the form of Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML
2013, that torch's SGD has: m ← β₁m + g, u = g + β₁m. It is the outer optimizer of DiLoCo (Douillard et al. 2023).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Name = Literal["sgd", "momentum", "nesterov", "adam", "yogi"]


class Optimizer(NamedTuple):
    """One rule with its constants; ``epsilon`` is the papers' τ.

    ``step`` is what a vector of accumulated gradients is multiplied by to be the model difference −Δ that adam and
    yogi act on: the clients' learning rate η_l, or 1 for gradients themselves. The others, which are linear, act on the
    accumulated gradients.
    """

    name: Name = "sgd"
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3
    step: float = 1.0

    def init(self, size: int, device: torch.device) -> dict[str, Tensor]:
        """The state for vectors of ``size`` numbers there."""
        if self.name == "sgd":
            return {}
        if self.name in ("momentum", "nesterov"):
            return {"momentum": torch.zeros(size, device=device)}
        variance = torch.full((size,), self.epsilon**2, device=device)
        return {"momentum": torch.zeros(size, device=device), "variance": variance}

    def direction(self, state: dict[str, Tensor], g: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """u and the new state; the server then does θ ← θ − η u."""
        if self.name == "sgd":
            return g, state
        # What is made here is worked on in place: of long vectors fresh memory takes longer than the sums.
        if self.name in ("momentum", "nesterov"):
            m = (self.beta1 * state["momentum"]).add_(g)
            return (m if self.name == "momentum" else (self.beta1 * m).add_(g)), {"momentum": m}
        g = g if self.step == 1 else g * self.step
        g2 = (1 - self.beta1) * g
        m = (self.beta1 * state["momentum"]).add_(g2)
        torch.mul(g, g, out=g2)
        if self.name == "adam":
            v = (self.beta2 * state["variance"]).add_(g2.mul_(1 - self.beta2))
        else:
            v = (state["variance"] - g2).sign_()
            v = torch.sub(state["variance"], v.mul_(g2.mul_(1 - self.beta2)), out=v)
        return torch.div(m, u := v.sqrt().add_(self.epsilon), out=u), {"momentum": m, "variance": v}
