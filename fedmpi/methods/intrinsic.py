"""Intrinsic gradient compression: gradients as coordinates in a random subspace known to all.

Source: Melas-Kyriazi and Wang, "Intrinsic Gradient Compression for Scalable and Efficient Federated
Learning", Algorithm 1 (static). Clients send S = Aᵀg, the server keeps Σ ∈ R^d with Σ ← Σ − η·mean(S), and
θ = θ₀ + AΣ is evaluated afresh from Σ by server and client alike: incremental updates would
drift apart in float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, Round, Server, State, nest, unnest
from fedmpi.methods.base import Entry, Options, Setup
from fedmpi.ops.subspace import MATRICES, Embedding
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec


class IntrinsicOptions(Options):
    dim: int = Option(ge=1, description="d, the subspace's dimension")
    schedule: Literal["static"] = Option("static", description="one subspace for the whole run")
    matrix: Literal["fastfood", "dense"] = Option(
        "fastfood", description="A: fastfood, or dense (D·d memory, for small models)"
    )
    scale: Literal["unbiased", "isometry"] = Option(
        "unbiased",
        description="unbiased: E[A Aᵀ] = I, as in the paper; isometry: A·√(d/D), whose learning rate is "
        "about D/d larger",
    )


class Coordinates(Compressor):
    """Sends Aᵀg: d numbers."""

    additive = True

    def __init__(self, spec: Spec, embedding: Embedding) -> None:
        super().__init__(spec, embedding.dim)
        self.embedding = embedding

    def layout(self) -> Layout:
        return {"coordinates": Field(torch.float32, (self.size,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        return Message({"coordinates": self.embedding.project(g_CD)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        return message.arrays["coordinates"], peer

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.embedding.lift(v_CS)


class StaticServer(Server):
    """Algorithm 1's server; its optimizer works on the coordinates. A client downloads Σ, whenever it last came."""

    def __init__(self, embedding: Embedding, optimizer: Optimizer) -> None:
        self.embedding, self.optimizer = embedding, optimizer

    def init(self, theta_D: Tensor) -> State:
        return self.view(theta_D) | nest(self.optimizer.init(self.embedding.dim), "optimizer.")

    def view(self, theta_D: Tensor) -> State:
        sigma_d = torch.zeros(self.embedding.dim)
        return {"theta0": theta_D, "theta": theta_D, "sigma": sigma_d, "version": torch.tensor(0)}

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        u_d, memory = self.optimizer.direction(unnest(state, "optimizer."), mean_S)
        new = self._at(state, state["sigma"].add(u_d, alpha=-round.lr), state["version"] + 1)
        return new | nest(memory, "optimizer.")

    def _at(self, state: State, sigma_d: Tensor, version: Tensor) -> State:
        theta_D = state["theta0"] + self.embedding.lift(sigma_d[None])[0]
        return {"theta0": state["theta0"], "theta": theta_D, "sigma": sigma_d, "version": version}

    def download(self, state: State, seen: int) -> Message:
        return Message({"sigma": state["sigma"][None]})

    def reconcile(self, view: State, message: Message, version: int) -> State:
        return self._at(view, message.arrays["sigma"][0], torch.tensor(version))


def build(options: IntrinsicOptions, spec: Spec, setup: Setup) -> Method:
    if options.dim > spec.size:
        raise ConfigError(
            f"method.dim: expected at most D = {spec.size} (the model's parameters), got {options.dim}"
        )
    factor = math.sqrt(options.dim / spec.size) if options.scale == "isometry" else 1.0
    key = random.key(setup.seed, stream="subspace")
    embedding = MATRICES[options.matrix](spec.size, options.dim, key, factor)
    return Method(Coordinates(spec, embedding), StaticServer(embedding, setup.optimizer))


ENTRY = Entry(
    IntrinsicOptions,
    build,
    summary="d coordinates in a shared random subspace",
    keeps="nothing",
    sums="d",
    source="Melas-Kyriazi and Wang, Algorithm 1",
    example={"dim": 64},
)
