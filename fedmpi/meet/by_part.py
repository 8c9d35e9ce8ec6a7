"""Parts of one message that meet each in a way of its own: ranks with one message each, whose parts differ in what is
cheapest to send."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.meet.base import End, Held, Roster, Way
from fedmpi.meet.sums import Sums
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, State, nest, unnest
from fedmpi.methods.joint import Joint
from fedmpi.ops.flags import Flag


class PartWays(Way):
    """A way for each part of a joint compressor; their collectives go out one after the other, in the order of the
    parts.

    Args:
      build: the way of one part's compressor.
    """

    name = "parts"

    def __init__(self, comm: Comm, up: Joint, sums: Sums, build: Callable[[Compressor], Way]) -> None:
        super().__init__(comm, up, sums)
        self._joint = up
        self._ways = [build(own) for own in up.ups]
        self.peers = HeldParts(self)

    def held(self) -> list[tuple[str, Held]]:
        """What each part's way keeps of the ranks, by the part's name."""
        named = zip(self._joint.names, self._ways, strict=True)
        return [(name, way.peers) for name, way in named if isinstance(way.peers, Held)]

    def open(self, roster: Roster) -> None:
        super().open(roster)
        for p, way in zip(self._joint.parts, self._ways, strict=True):
            shared = unnest(roster.shared, f"{p.name}.")
            way.open(roster._replace(now=p.round(roster.now), shared=shared))

    def take(
        self, weights_C: Tensor, message: Message, before: State, ctx: Context, usable: Flag = True
    ) -> None:
        for i, (p, way) in enumerate(zip(self._joint.parts, self._ways, strict=True)):
            own = unnest(before, f"{p.name}.")
            way.take(weights_C, self._joint.own(message, i), own, p.ctx(ctx), usable)

    def send(self) -> End:
        ends = [way.send() for way in self._ways]

        def end() -> Tensor | None:
            means = [mean() for mean in ends]
            self.wire = sum(way.wire for way in self._ways)
            there = [mean.float() for mean in means if mean is not None]
            return torch.cat(there) if len(there) == len(means) else None

        return end


class HeldParts(Held):
    """What all parts' ways keep of the ranks, as one state."""

    def __init__(self, ways: PartWays) -> None:
        self._ways = ways

    @property
    def state(self) -> State:  # type: ignore[override]
        return {k: v for name, held in self._ways.held() for k, v in nest(held.state, f"{name}.").items()}

    def load(self, state: State) -> None:
        for name, held in self._ways.held():
            held.load(unnest(state, f"{name}."))

    def commit(self) -> None:
        for _, held in self._ways.held():
            held.commit()

    def rollback(self) -> None:
        for _, held in self._ways.held():
            held.rollback()
