"""A round of a method in one process, for whoever looks at methods.

Shape suffixes: C clients, D parameters, S numbers that are summed for one client.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Decoder, Method, Round, Server, State, believed


class Pass(NamedTuple):
    """What one pass of :func:`play` came to."""

    codec: Compressor
    ctx: Context
    message: Message
    after: State
    """The senders' state."""
    peers: State
    """What the receiver keeps of them."""
    v_CS: Tensor
    """Each sender's decoded vector."""
    mean_S: Tensor
    """Their mean; of an integer method their sum; of several parts, what each one's kind comes to."""
    state: State
    """The far end's, when the pass was sent."""


def play(
    method: Method,
    g_CD: Tensor,
    senders: State,
    state: State,
    round: Round,
    *,
    clients_C: Tensor | None = None,
    peers: State | None = None,
    end: Server | Decoder | None = None,
) -> list[Pass]:
    """All passes of a round in this process, without communication: the round of whoever looks at a method (analysis,
    listing, bench, tests). Every client counts the same and has made one step.

    Args:
      g_CD: the gradients ``(C, D)``.
      senders: the clients' states, with axis C; the last pass's :attr:`Pass.after` are those after the round.
      state: the far end's: a server's or, with ``end`` the decoder, its memory. With the last pass's
        :attr:`Pass.state` and :attr:`Pass.mean_S` it ends the round (:meth:`Server.finish`, :meth:`Decoder.direction`).
      clients_C: ids; default: 0 … C − 1.
      peers: what the receiver keeps of the clients; default: what the clients believe that it does.
      end: the far end; default: the method's server.
    """
    end = end or method.server
    clients_C = torch.arange(len(g_CD)) if clients_C is None else clients_C
    passes = []
    for index, codec in enumerate(method.passes):
        ctx = Context(round, clients_C, torch.ones_like(clients_C), end.shared(state))
        message, after = codec.compress(g_CD, senders, ctx)
        last = codec is method.up
        held = {} if not last else believed(codec, senders) if peers is None else peers
        v_CS, held = codec.decompress(message, held, ctx)
        mean_S = v_CS.sum(0, dtype=torch.int32) if codec.integer else _together(codec, v_CS)
        passes.append(Pass(codec, ctx, message, after, held, v_CS, mean_S, state))
        if not last:
            state = end.between(state, index, mean_S, round)
    return passes


def _together(codec: Compressor, v_CS: Tensor) -> Tensor:
    """What vectors of :attr:`Compressor.segments` come to ``(S,)``."""
    if all(kind == "mean" for _, kind in codec.segments):
        return v_CS.mean(0)
    stretches = v_CS.split([size for size, _ in codec.segments], 1)
    return torch.cat(
        [
            v.mean(0) if kind == "mean" else v.amin(0).clamp(max=0) if kind == "least" else v.sum(0)
            for (_, kind), v in zip(codec.segments, stretches, strict=True)
        ]
    )
