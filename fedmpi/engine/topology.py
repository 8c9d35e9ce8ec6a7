"""Who aggregates: all ranks alike, or rank 0 for the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, together
from fedmpi.engine.downloads import receive
from fedmpi.engine.exchange import build as build_exchange
from fedmpi.engine.store import ClientStore, Kept, everybody, nobody
from fedmpi.engine.sums import Sum, largest_term
from fedmpi.engine.updates import check_server
from fedmpi.message import Message, concat, from_bytes, to_bytes
from fedmpi.method import Compressor, Context, Method, Round, State, believed

_CHUNK_VALUES = 1 << 24  # decoded numbers at a time when rank 0 decodes many clients


class Topology(ABC):
    """One rank's part in a round: :meth:`start` a pass, :meth:`take` its clients' messages, then
    :meth:`finish` (or, after the first of two passes, :meth:`between`).

    Attributes:
      state: the server's state where this rank aggregates, else the view of it.
      workers: the ranks that train clients.
      fuses: clients' messages may be taken as one (:meth:`AllReduce.take_sum`).
    """

    state: State
    workers: list[int]
    fuses: bool = False

    def __init__(self, comm: Comm, method: Method, exact: bool) -> None:
        self.comm, self.method, self.exact = comm, method, exact
        self.workers = self.crew()

    def kept(self) -> dict[str, Kept]:
        """What this rank keeps of each client as a receiver, by a name of lower-case letters. With ``state``, which
        rank 0 always aggregates, it is all that a checkpoint saves of a topology."""
        return {}

    def held(self) -> dict[str, Any]:
        """What this rank holds between rounds besides :meth:`kept`, by its attributes' names: for :meth:`take_back`."""
        return {"state": self.state}

    def take_back(self, held: dict[str, Any]) -> None:
        """Hold again what was :meth:`held` earlier."""
        for name, value in held.items():
            setattr(self, name, value)

    @abstractmethod
    def crew(self) -> list[int]:
        """The ranks that train clients, of those that there are."""

    def fit(self) -> None:
        """There are fewer ranks than before."""
        self.workers = self.crew()

    def load(self, state: State) -> None:
        """Continue from what rank 0's ``state`` was; this rank's own is still that of θ₀, and what the stores of the
        last :meth:`kept` hold has been loaded."""
        self.state = state

    def parameters(self) -> Tensor:
        return self.method.server.parameters(self.state)

    def shared(self) -> State:
        return self.method.server.shared(self.state)

    def start(
        self, up: Compressor, clients: Tensor, weights: Tensor, placed: dict[int, Tensor], round: Round
    ) -> None:
        """A pass begins: ``clients`` will send ``up``'s messages; ``placed`` are each worker's positions there."""
        self.up, self.clients, self.weights, self.placed, self.now = up, clients, weights, placed, round
        self.share = 1.0

    def only(self, sent_C: Tensor) -> None:
        """Before the pass ends: of its clients only those (bool) sent a message that counts. Their weights are
        renormalised."""
        if bool(sent_C.all()):
            return
        self.share = float(self.weights[sent_C].sum())
        self.placed = {rank: positions[sent_C[positions]] for rank, positions in self.placed.items()}

    def largest(self) -> float:
        """The largest magnitude that a weighted number of a message may have."""
        exact = self.exact and not self.up.integer
        return largest_term(len(self.clients)) if exact else torch.finfo(torch.float32).max

    def sum(self) -> Sum:
        up = self.up
        return Sum(up.size, integer=up.integer, exact=self.exact, terms=len(self.clients))

    def _after(self, rule: Callable[[State, Tensor, Round], State], mean_S: Tensor) -> State:
        """The state after a ``rule`` of the server.

        Raises:
          NumericalError: it overflows.
        """
        state = rule(self.state, mean_S, self.now)
        check_server(state, self.state, mean_S, self.now.t)
        return state

    @abstractmethod
    def prepare(self, g_D: Tensor) -> None:
        """The server's own gradient, before round 0."""

    @abstractmethod
    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        """This rank's clients at ``positions`` sent ``message``; ``before`` was their state."""

    @abstractmethod
    def between(self) -> Tensor:
        """The first pass is over: make its mean known to all ranks, and return it ``(S,)``."""

    @abstractmethod
    def finish(self) -> None:
        """All have sent: aggregate, and bring this rank's parameters up to date."""

    @abstractmethod
    def skip(self, state: State, round: Round) -> None:
        """Nobody sent a message that counts: go on from ``state``, which was this rank's before the round."""

    @abstractmethod
    def served(self, clients: int) -> Tensor:
        """Positions among so many clients whose downloads this rank makes (and counts)."""


class AllReduce(Topology):
    """Ranks are peers: each decodes and sums its own clients, the sums are all-reduced, and every rank
    holds the server. The receiver's per-client state lives beside its sender's, which it equals."""

    fuses = True

    def __init__(self, comm: Comm, method: Method, theta_D: Tensor, exact: bool, peers: ClientStore) -> None:
        super().__init__(comm, method, exact)
        self.state = method.server.init(theta_D)

    def crew(self) -> list[int]:
        return list(range(self.comm.size))

    def start(
        self, up: Compressor, clients: Tensor, weights: Tensor, placed: dict[int, Tensor], round: Round
    ) -> None:
        super().start(up, clients, weights, placed, round)
        self._total = self.sum()

    def prepare(self, g_D: Tensor) -> None:
        self.state = self.method.server.prepare(self.state, g_D)

    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        v_CS, _ = self.up.decompress(message, believed(self.up, before), ctx)
        self._total.add(v_CS, self.weights[positions])

    def take_sum(self, message: Message, weight: Tensor, ctx: Context) -> None:
        """Take the message that one client would send for the weighted mean of several, with their ``weight`` ``(1,)``
        in all."""
        v_1S, _ = self.up.decompress(message, {}, ctx)
        self._total.add(v_1S, weight)

    def _mean(self) -> Tensor:
        self._total.over(self.comm)
        return self._total.value(self.share)

    def between(self) -> Tensor:
        mean_S = self._mean()
        self.state = self._after(self.method.server.first, mean_S)
        return mean_S

    def finish(self) -> None:
        self.state = self._after(self.method.server.finish, self._mean())

    def skip(self, state: State, round: Round) -> None:
        self.state = self.method.server.skip(state, round)

    def served(self, clients: int) -> Tensor:
        return torch.arange(min(self.comm.rank, clients), clients, self.comm.size)


class Workers(AllReduce):
    """Data-parallel training: in every round each rank trains the client of its own number, and their messages meet
    in the way that sends least (:mod:`fedmpi.engine.exchange`)."""

    fuses = False

    def __init__(self, comm: Comm, method: Method, theta_D: Tensor, exact: bool, peers: ClientStore) -> None:
        super().__init__(comm, method, theta_D, exact, peers)
        self._ways = {
            codec: build_exchange(comm, codec, exact=exact) for codec in (method.first, method.up) if codec
        }
        self._peers = {codec: way.init() for codec, way in self._ways.items()}

    def kept(self) -> dict[str, Kept]:
        """Every rank keeps the same of all ranks; rank 0 writes it."""
        peers, up = self._peers[self.method.up], self.method.up
        self._copy = ClientStore(up.init_peer if peers else dict)
        self._copy.put(torch.arange(self.comm.size), peers)
        return {"peers": Kept(self._copy, everybody if self.comm.rank == 0 else nobody, everybody)}

    def load(self, state: State) -> None:
        super().load(state)
        self._peers[self.method.up] = self._copy.get(torch.arange(self.comm.size))

    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        self._sent = message, before, ctx

    def _mean(self) -> Tensor:
        message, before, ctx = self._sent
        way = self._ways[self.up]
        mean_S, self._peers[self.up] = way.mean(message, before, self._peers[self.up], ctx)
        assert mean_S is not None  # every message was usable
        return mean_S


class Aggregator(Topology):
    """Rank 0 aggregates and trains nobody (alone, it does both); the others send it their clients'
    messages and get the download of a client that has seen every round."""

    def __init__(self, comm: Comm, method: Method, theta_D: Tensor, exact: bool, peers: ClientStore) -> None:
        super().__init__(comm, method, exact)
        server = method.server
        self.state = server.init(theta_D) if comm.rank == 0 else server.view(theta_D)
        self.peers = peers

    def crew(self) -> list[int]:
        return list(range(1, self.comm.size)) or [0]

    def kept(self) -> dict[str, Kept]:
        held = everybody if self.comm.rank == 0 else nobody
        return {"peers": Kept(self.peers, held, held)}

    def load(self, state: State) -> None:
        server = self.method.server
        if self.comm.rank == 0:
            self.state = state
        else:  # as a client that has missed all rounds
            self.state = server.reconcile(self.state, server.download(state, 0), int(state["version"]))

    def start(
        self, up: Compressor, clients: Tensor, weights: Tensor, placed: dict[int, Tensor], round: Round
    ) -> None:
        super().start(up, clients, weights, placed, round)
        self._outbox: list[Message] = []

    def prepare(self, g_D: Tensor) -> None:
        version = int(self.state["version"])
        if self.comm.rank == 0:
            self.state = self.method.server.prepare(self.state, g_D)
        self._publish(version)

    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        self._outbox.append(message)

    def _gather(self, use: Callable[[Tensor], None] = lambda mean_S: None) -> Tensor | None:
        """The mean of all ranks' messages on rank 0, and ``use`` of it there; an error of either is everybody's."""
        inbox = self.comm.gather(to_bytes(concat(self._outbox)) if self._outbox else b"")
        total = self.sum() if self.comm.rank == 0 else None
        with together(self.comm, "aggregating"):  # a message that cannot be read must end the senders, too
            for rank, frame in enumerate(inbox):
                assert total is not None  # only rank 0 got frames
                self._absorb(total, frame, self.placed.get(rank, self.clients[:0]))
            mean_S = total.value(self.share) if total else None
            if mean_S is not None:
                use(mean_S)
        return mean_S

    def _absorb(self, total: Sum, frame: bytes, positions: Tensor) -> None:
        if not len(positions):
            return
        message = from_bytes(frame, self.up.layout(), clients=len(positions))
        step = 1 if self.exact else max(1, _CHUNK_VALUES // self.up.size)
        for rows in torch.arange(len(positions)).split(step):
            clients_C = self.clients[positions[rows]]
            ctx = Context(self.now, clients_C, torch.ones_like(clients_C), self.shared())
            peer = self.peers.get(clients_C) if self.up is self.method.up else {}
            v_CS, peer = self.up.decompress(message.select(rows), peer, ctx)
            self.peers.put(clients_C, peer)
            total.add(v_CS, self.weights[positions[rows]])

    def between(self) -> Tensor:
        mean_S = self._gather()
        sent = b"" if mean_S is None else to_bytes(Message({"mean": mean_S[None]}))
        mean_S = from_bytes(self.comm.broadcast(sent)).arrays["mean"][0]
        self.state = self._after(self.method.server.first, mean_S)
        return mean_S

    def finish(self) -> None:
        version = int(self.state["version"])
        self._gather(self._finish)
        self._publish(version)

    def _finish(self, mean_S: Tensor) -> None:
        self.state = self._after(self.method.server.finish, mean_S)

    def skip(self, state: State, round: Round) -> None:
        version = int(state["version"])
        self.state = self.method.server.skip(state, round) if self.comm.rank == 0 else state
        self._publish(version)

    def _publish(self, version: int) -> None:
        """The views of the other ranks catch up from ``version`` with rank 0, which is one ahead (or is not)."""
        server, first, sent = self.method.server, self.comm.rank == 0, b""
        if first and int(self.state["version"]) != version:
            sent = to_bytes(server.download(self.state, version))
        sent = self.comm.broadcast(sent)
        if not first and sent:
            self.state = receive(server, self.state, sent, version + 1)

    def served(self, clients: int) -> Tensor:
        return torch.arange(clients if self.comm.rank == 0 else 0)


TOPOLOGIES: dict[str, type[AllReduce] | type[Aggregator]] = {"allreduce": AllReduce, "aggregator": Aggregator}
