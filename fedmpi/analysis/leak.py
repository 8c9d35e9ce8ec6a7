"""The gradient-matching attack on one client's message, and the defence against it.

Source: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019: an image whose gradient matches the one that was
sent, found by minimising the squared distance with L-BFGS.

The attacker knows the model, the image's label, and everything that the receiver of the message knows: subspaces,
sketches, masks, look-back gradients, keys. Where the codec is linear it matches in the codec's own space: it compresses
the gradient of its guess and compares payloads. Elsewhere it compares the gradient of its guess with the decoded
one, at the positions where that is not zero and up to its length (a sign has none). The model is made twice
differentiable, as in the source: tanh for ReLU (the source's sigmoid leaves 0.4 % of a small net's gradient to the
image, tanh half of it), average for maximum pooling.

The message is that of the client's second round; its first, of another image and at rate 0, is what masks and
look-back gradients come from.

Shape suffixes: D parameters, S numbers of a payload, K positions, P × H × W an image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmpi import random
from fedmpi.engine.rounds import Simulation
from fedmpi.method import Compressor, Context, Method, Round, State
from fedmpi.methods.play import play
from fedmpi.spec import Spec

_ADJOINT = 1e-3  # relative; float32 sums of some 10⁵ terms agree to about 10⁻⁵
_HISTORY = 50  # steps that L-BFGS remembers


class Observed(NamedTuple):
    """What the attacker holds."""

    mismatch: Callable[[Tensor], Tensor]  # of a gradient (D,), differentiable
    nbytes: int
    how: str


def observe(
    method: Method, spec: Spec, theta_D: Tensor, gradient: Callable[[Tensor, int], Tensor], seed: int
) -> tuple[Tensor, Observed]:
    """Two rounds of one client; returns its model's parameters in the second, and what then is seen.

    Args:
      method: how it sends.
      spec: the parameters' layout.
      theta_D: before the first round.
      gradient: what the client sends of, by its parameters and the round (0, 1).
      seed: of the method's keys.
    """
    up, server = method.up, method.server
    client = torch.tensor([0])
    held = server.init(theta_D)
    if server.samples:
        held = server.prepare(held, gradient(server.parameters(held), 0))
    start, peer = _alone(up.init()), _alone(up.init_peer())
    state = start
    for t in (0, 1):
        now = Round(seed, t, lr=0.0)
        g_1D = gradient(server.parameters(held), t)[None]
        passes = play(method, g_1D, state, held, now, clients_C=client, peers=peer)
        _, ctx, _, state, after, v_1S, mean_S, held = passes[-1]
        if t == 0:
            held, peer = server.finish(held, mean_S, now), after
    nbytes = sum(int(one.message.nbytes()[0]) for one in passes)
    v_1S = v_1S.float()
    theta_D = server.parameters(held)
    if is_linear(up, start, ctx):
        return theta_D, Observed(_payload_mismatch(up, start, ctx, v_1S), nbytes, "payload")
    return theta_D, Observed(_decoded_mismatch(up.lift(v_1S, ctx)[0]), nbytes, "decoded")


def _alone(state: State) -> State:
    return {name: value[None] for name, value in state.items()}


class _Linear(torch.autograd.Function):
    """A linear codec's payload of a gradient, which autograd cannot follow through compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any, g_1D: Tensor, encode: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        return encode(g_1D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        g_1D: Tensor = ctx.adjoint(grads[0].float()).to(grads[0].dtype)
        return g_1D, None, None


def _encoder(up: Compressor, state: State, ctx: Context) -> Callable[[Tensor], Tensor]:
    def encode(g_1D: Tensor) -> Tensor:
        with torch.no_grad():
            message, _ = up.compress(g_1D.float(), state, ctx)
            v_1S, _ = up.decompress(message, {}, ctx)
            return v_1S.to(g_1D.dtype)

    return encode


def is_linear(up: Compressor, state: State, ctx: Context) -> bool:
    """Whether encoding F is linear with the known transpose: ⟨F a, v⟩ = ⟨a, Fᵀ v⟩ for a random a and v."""
    if not up.additive:
        return False
    a_1D = random.normal(random.key(0, stream="adjoint a"), up.spec.size)[None]
    v_1S = random.normal(random.key(0, stream="adjoint v"), up.size)[None]
    left = (_encoder(up, state, ctx)(a_1D) * v_1S).double()
    right = (a_1D * up.transpose(v_1S, ctx)).double()
    scale = max(float(left.norm()), float(right.norm()), 1e-30)
    return abs(float(left.sum() - right.sum())) <= _ADJOINT * scale


def _payload_mismatch(up: Compressor, state: State, ctx: Context, v_1S: Tensor) -> Callable[[Tensor], Tensor]:
    encode, size = _encoder(up, state, ctx), v_1S.square().sum().clamp(min=1e-30)

    def adjoint(v_1S: Tensor) -> Tensor:
        return up.transpose(v_1S, ctx)

    def mismatch(g_D: Tensor) -> Tensor:
        guess_1S: Tensor = _Linear.apply(g_D[None], encode, adjoint)  # type: ignore[no-untyped-call]
        return (guess_1S - v_1S).square().sum() / size

    return mismatch


def _decoded_mismatch(v_D: Tensor) -> Callable[[Tensor], Tensor]:
    index_K = v_D.nonzero()[:, 0]
    unit_K = _unit(v_D[index_K].double())

    def mismatch(g_D: Tensor) -> Tensor:  # 2 − 2 cos, without its cancellation
        return (_unit(g_D[index_K]) - unit_K).square().sum()

    return mismatch


def _unit(v_K: Tensor) -> Tensor:
    unit_K: Tensor = v_K / v_K.norm().clamp(min=1e-30)
    return unit_K


class Victim:
    """A run's model and the gradient of its loss on one image, in float64: mismatches become tiny in the end."""

    def __init__(self, simulation: Simulation) -> None:
        self.data, self.spec, self.loss = simulation.data, simulation.spec, simulation.measured.objective.loss
        self.theta_D = simulation.replica.parameters()
        self.model = smooth(copy.deepcopy(simulation.trainer.model)).double()
        self.parameters = [dict(self.model.named_parameters())[name] for name in self.spec.names]

    def gradient(self, theta_D: Tensor, x_PHW: Tensor, y: int, graph: bool = False) -> Tensor:
        """∇θ of the loss on the image, ``(D,)``; with ``graph``, a differentiable function of the image."""
        with torch.no_grad():
            for value, parameter in zip(self.spec.views(theta_D).values(), self.parameters, strict=True):
                parameter.copy_(value)
        loss = self.loss(self.model(x_PHW[None].double()), torch.tensor([y]))
        return torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss, self.parameters, create_graph=graph)]
        )


def smooth(module: nn.Module) -> nn.Module:
    """``module`` with tanh for its ReLUs and average for maximum pooling, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Tanh())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        elif isinstance(child, nn.AdaptiveMaxPool2d):
            setattr(module, name, nn.AdaptiveAvgPool2d(child.output_size))
        else:
            smooth(child)
    return module


def attack(
    victim: Victim,
    theta_D: Tensor,
    seen: Observed,
    y: int,
    start_PHW: Tensor,
    iterations: int,
    optimizer: str,
) -> Tensor:
    """The image ``(P, H, W)`` whose gradient fits best after so many iterations from ``start_PHW``."""
    x = start_PHW.double().requires_grad_()
    best, best_PHW, scale = math.inf, start_PHW.clone(), 0.0

    def closure() -> Tensor:
        nonlocal best, best_PHW, scale
        loss = seen.mismatch(victim.gradient(theta_D, x, y, graph=True))
        scale = scale or 1 / max(
            float(loss.detach()), 1e-30
        )  # L-BFGS's first step is as long as the gradient
        loss = loss * scale
        (x.grad,) = torch.autograd.grad(loss, x)
        if float(loss.detach()) < best:  # false for NaN
            best, best_PHW = float(loss.detach()), x.detach().float()
        return loss.detach()

    if optimizer == "lbfgs":
        search = torch.optim.LBFGS(
            [x],
            max_iter=iterations,
            max_eval=2 * iterations,
            history_size=_HISTORY,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        search.step(closure)
    else:
        adam = torch.optim.Adam([x], lr=0.1)
        for _ in range(iterations):
            closure()
            adam.step()
    closure()
    return best_PHW


class Defence(NamedTuple):
    """What a client does to its gradient before it compresses it: clips it to the length ``clip``, and adds normal
    noise of deviation ``noise · clip`` to every entry."""

    clip: float
    noise: float

    def __call__(self, g_D: Tensor, key: int) -> Tensor:
        clipped_D = g_D * min(1.0, self.clip / max(float(g_D.norm()), 1e-30))
        return clipped_D + self.noise * self.clip * random.normal(key, len(g_D))
