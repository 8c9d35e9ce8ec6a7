"""How buffers of a model travel: those of numbers as their exact mean, those of integers as their largest.

A part of buffers is the difference x before − x after, which a server subtracts at the rate 1.

Shape suffixes: C clients, D numbers of integer buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmpi.errors import MessageError, NumericalError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, Segment, State
from fedmpi.methods.base import MeanServer
from fedmpi.methods.dense import Dense
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec

MOST = 1 << 24
"""Integers beyond this are not exact in the float32 vector that they are part of."""


class Largest(Compressor):
    """Counters, say the batches that a norm layer has seen: of all clients' the largest, and never less than before.

    Sends the changes. What is "summed" is the least of x before − x after, beginning with 0.
    """

    def layout(self) -> Layout:
        return {"change": Field(torch.int32, (self.size,))}

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (Segment(self.size, "least"),)

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        if bool((g_CD.abs() > MOST).any()):
            raise NumericalError(
                f"an integer buffer changes by {int(g_CD.abs().max())} in a round, expected at most {MOST}: keep it "
                "with parts: travels: local"
            )
        return Message({"change": g_CD.neg().to(torch.int32)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        change_CD = message.arrays["change"]
        if bool(((change_CD < -MOST) | (change_CD > MOST)).any()):
            raise MessageError(f"message: an integer buffer changes by more than {MOST} in a round")
        return change_CD.neg().float(), peer

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        v_CS, peer = self.decompress(message, peer, ctx)
        for total_S, v_S in zip(total_CS, v_CS, strict=True):
            torch.minimum(total_S, v_S, out=total_S)
        return peer


def averaged(spec: Spec) -> Method:
    """Buffers of float32 numbers, by their mean."""
    return Method((Dense(spec),), MeanServer(spec, Optimizer()))


def largest(spec: Spec) -> Method:
    """Integer buffers, by their largest."""
    return Method((Largest(spec),), MeanServer(spec, Optimizer()))
