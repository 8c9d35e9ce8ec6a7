"""A codec by itself, and what goes through the codec and the server of a run: for tests against transcriptions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.engine.rounds import Simulation
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Round, State
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .softmax import Array

# A convolution as 4 × 18, a wide and a tall matrix; too small for factors: (2, 3); biases.
# 72 + 4 + 220 + 6 + 175 = 477 parameters, 10 of them dense.
LAYERS = Spec(("conv", "bias", "wide", "small", "tall"), ((4, 2, 3, 3), (4,), (11, 20), (2, 3), (25, 7)))


def codec(name: str, size: int, **options: Any) -> Compressor:
    """The compressor of a method for one parameter of ``size`` entries."""
    return methods.build({"name": name, **options}, Spec(("w",), ((size,),)), Setup()).up


def context(clients: int, t: int = 0, steps: int = 1) -> Context:
    """Clients 0 … of round ``t``."""
    ids = torch.arange(clients)
    return Context(Round(seed=4, t=t, lr=0.1), ids, torch.full_like(ids, steps))


def indices(message: Message, name: str, client: int, k: int, width: int) -> Array:
    """A client's ``k`` integers of ``width`` bits, read from the array's bytes by numpy."""
    bits = np.unpackbits(message.arrays[name][client].numpy(), bitorder="little")
    assert not bits[k * width :].any()
    return bits[: k * width].reshape(k, width) @ (1 << np.arange(width))


class Call(NamedTuple):
    """Of the compressor: gradients ``(C, D)``, what came of them, and whose they are."""

    g_CD: Tensor
    message: Message
    ctx: Context


def sent(simulation: Simulation) -> list[Call]:
    """Filled from now on with each call of the compressor."""
    up, calls = simulation.method.up, []
    compress = up.compress

    def spy(g_CD: Tensor, state: State, ctx: Context) -> Any:
        message, after = compress(g_CD, state, ctx)
        calls.append(Call(g_CD.clone(), message, ctx))
        return message, after

    up.compress = spy  # type: ignore[method-assign]
    return calls


def means(simulation: Simulation) -> list[Tensor]:
    """Filled from now on with what the server gets of each round, ``(S,)``."""
    server, seen = simulation.method.server, []
    finish = server.finish

    def spy(state: State, mean_S: Tensor, round: Round) -> State:
        seen.append(mean_S)
        return finish(state, mean_S, round)

    server.finish = spy  # type: ignore[method-assign]
    return seen
