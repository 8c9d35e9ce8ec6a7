"""A codec by itself, and what goes through the codec of a run: for tests against transcriptions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.engine.rounds import Simulation
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Round
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec


def codec(name: str, size: int, **options: Any) -> Compressor:
    """The compressor of a method for one parameter of ``size`` entries."""
    return methods.build({"name": name, **options}, Spec(("w",), ((size,),)), Setup()).up


def context(clients: int, t: int = 0) -> Context:
    """Clients 0 … of round ``t``."""
    ids = torch.arange(clients)
    return Context(Round(seed=4, t=t, lr=0.1), ids, torch.ones_like(ids))


def sent(simulation: Simulation) -> list[tuple[Tensor, Message]]:
    """Filled from now on: the gradients ``(C, D)`` of each call of the compressor, and the messages."""
    up, calls = simulation.method.up, []
    compress = up.compress

    def spy(g_CD: Tensor, *rest: Any) -> Any:
        message, state = compress(g_CD, *rest)
        calls.append((g_CD.clone(), message))
        return message, state

    up.compress = spy  # type: ignore[method-assign]
    return calls
