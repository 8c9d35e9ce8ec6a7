"""What a way is: the protocol of :mod:`fedmpi.meet.ways`, whom messages are from, and what a receiver keeps of senders.

Shape suffixes: N clients of a pass, C of them at a time, W ranks, S summed numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.meet.sums import Sum, Sums
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, Round, State
from fedmpi.ops import fast
from fedmpi.ops.flags import Flag
from fedmpi.phases import phase

T = TypeVar("T")
End = Callable[[], Tensor | None]


class Roster(NamedTuple):
    """Who sends in a pass, the same on every rank."""

    now: Round
    clients: Tensor
    """Ids, int64 ``(N,)``."""
    weights: Tensor
    """Float64 ``(N,)``, with the sum 1."""
    placed: Mapping[int, Tensor]
    """Positions in ``clients`` of each rank's."""
    shared: State
    """What they know of the far end."""

    @classmethod
    def of_ranks(cls, comm: Comm, now: Round, shared: State) -> Roster:
        """The ranks themselves, which all count the same; rank r is client r."""
        ranks_W = torch.arange(comm.size)
        weights_W = torch.full((comm.size,), 1 / comm.size, dtype=torch.float64)
        return cls(now, ranks_W, weights_W, dict(enumerate(ranks_W[:, None])), shared)

    def ctx(self, positions: Tensor) -> Context:
        """The context of the messages of the clients at these positions."""
        clients_C = self.clients[positions]
        return Context(self.now, clients_C, torch.ones_like(clients_C), self.shared)


class Peers(Protocol):
    """What a receiver keeps of senders: a store of a federated run's clients, or :class:`Held`."""

    def get(self, clients_C: Tensor, /) -> State: ...

    def put(self, clients_C: Tensor, state: State, /) -> None: ...


class Held:
    """What this rank keeps of all W ranks, one tensor a name with a leading axis W; what is put counts once it is
    :meth:`commit`-ted, so that a step can be taken back."""

    def __init__(self, state: State) -> None:
        self.state = self._next = state

    def get(self, clients_C: Tensor, /) -> State:
        return self.state

    def put(self, clients_C: Tensor, state: State, /) -> None:
        self._next = state

    def commit(self) -> None:
        self.state = self._next

    def rollback(self) -> None:
        self._next = self.state

    def load(self, state: State) -> None:
        """Keep ``state`` from here on."""
        self.state = self._next = state


class Way(ABC):
    """One way for one compressor.

    Attributes:
      peers: what this rank keeps of the senders whose messages it decodes for others; None where it keeps nothing.
      wire: seconds spent in collectives so far.
      reuse: a mean lies where the last one did.
      later: whether a pass came to nothing is not asked of a device that would make the host wait.
      good: of the last pass, once its mean is there: False, or not yet asked and False, where it came to nothing; its
        mean is of no use then.
    """

    name: ClassVar[str]
    reuse = False
    later = False
    good: Flag = True

    def __init__(self, comm: Comm, up: Compressor, sums: Sums, peers: Peers | None = None) -> None:
        self.comm, self.up, self.sums, self.peers = comm, up, sums, peers
        self.wire = 0.0
        self._kept: Sum | None = None

    def init(self) -> State:
        """What this rank would keep of W ranks before their first messages; {} where it keeps nothing of them."""
        return {}

    def open(self, roster: Roster) -> None:
        """A pass begins."""
        self.roster, self.share = roster, 1.0

    @abstractmethod
    def take(
        self, weights_C: Tensor, message: Message, before: State, ctx: Context, usable: Flag = True
    ) -> None:
        """Messages of this rank.

        Args:
          weights_C: float64, what each counts; one message may stand for several clients, with their weights' sum.
          message: some of the rank's clients'; the rank's own, where each has one.
          before: the senders' state before they made it, with axis C; {} for a message that stands for several.
          ctx: theirs.
          usable: False: the pass is to come to nothing, on all ranks.
        """

    def only(self, sent_N: Tensor) -> None:
        """Before :meth:`send`, on all ranks: of the roster only those (bool) sent a message that counts. Their weights
        are renormalised."""
        if not bool(sent_N.all()):
            self.share = float(self.roster.weights[sent_N].sum())
            placed = {rank: at[sent_N[at]] for rank, at in self.roster.placed.items()}
            self.roster = self.roster._replace(placed=placed)

    @abstractmethod
    def send(self) -> End:
        """Send what was taken. What comes back waits for the others, and returns the weighted mean ``(S,)`` (of an
        integer method the sum, or its sign), the same on every rank; None where this rank does not get it, or where a
        rank's message is not usable."""

    def largest(self) -> float:
        """The largest magnitude that a weighted number of a message may have."""
        return self.sums.largest(self.up, len(self.roster.clients))

    def _passed(self, usable: Tensor) -> bool:
        """Sets :attr:`good`. False where the pass is known to come to nothing."""
        self.good = usable if self.later and fast.waits(usable) else bool(usable)
        return self.good is not False

    def _wait(self, collective: Callable[[], T]) -> T:
        started = perf_counter()
        with phase("wire"):
            result = collective()
        self.wire += perf_counter() - started
        return result

    def _zero(self, flag: bool) -> Sum:
        if self._kept is not None:
            self._kept.clear()
            return self._kept
        total = self.sums(self.up, len(self.roster.clients), flag)
        if self.reuse:
            self._kept = total
        return total

    def _add(self, total: Sum, weights_C: Tensor, message: Message, peers: State, ctx: Context) -> State:
        """Add messages' vectors to a sum; returns what their receiver keeps then."""
        with phase("decode"):
            if total.floats:
                rows_CS = total.total_S.expand(message.clients, -1)
                return self.up.add(rows_CS, message, peers, ctx, weights_C.tolist())
            v_CS, peers = self.up.decompress(message, peers, ctx)
        total.add(v_CS, weights_C)
        return peers
