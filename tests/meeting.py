"""One message a rank, by a way: for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.meet.base import Held, Roster, Way
from fedmpi.message import Message
from fedmpi.method import Context, State


def met(way: Way, message: Message, before: State, ctx: Context, usable: bool = True) -> Tensor | None:
    """What the ranks' messages come to; what their receivers keep counts unless one was not usable."""
    roster = Roster.of_ranks(way.comm, ctx.round, ctx.shared)
    way.open(roster)
    way.take(roster.weights[torch.tensor([way.comm.rank])], message, before, ctx, usable)
    mean_S = way.send()()
    assert isinstance(way.peers, Held)
    if mean_S is None:
        way.peers.rollback()
    else:
        way.peers.commit()
    return mean_S
