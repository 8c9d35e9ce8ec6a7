"""Who aggregates: all ranks alike, or rank 0 for the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.engine.clients import ClientStore
from fedmpi.engine.sums import Sum
from fedmpi.message import Message, concat, from_bytes, to_bytes
from fedmpi.method import Context, Method, Round, State, believed

_CHUNK_VALUES = 1 << 24  # decoded numbers at a time when rank 0 decodes many clients


class Topology(ABC):
    """One rank's part in a round: :meth:`take` its clients' messages, then :meth:`finish`.

    Attributes:
      state: the server's state where this rank aggregates, else the view of it.
      workers: the ranks that train clients.
    """

    state: State
    workers: list[int]

    def __init__(self, comm: Comm, method: Method, exact: bool) -> None:
        self.comm, self.method, self.exact = comm, method, exact

    def parameters(self) -> Tensor:
        return self.method.server.parameters(self.state)

    def shared(self) -> State:
        return self.method.server.shared(self.state)

    def sum(self, terms: int) -> Sum:
        up = self.method.up
        return Sum(up.size, integer=up.integer, exact=self.exact, terms=terms)

    @abstractmethod
    def start(self, cohort: Tensor, weights: Tensor, placed: dict[int, Tensor]) -> None:
        """A round begins; ``placed`` are each worker's positions in ``cohort``."""

    @abstractmethod
    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        """This rank's clients at ``positions`` of the cohort sent ``message``; ``before`` was their state."""

    @abstractmethod
    def finish(self, round: Round) -> None:
        """All have sent: aggregate, and bring this rank's parameters up to date."""

    @abstractmethod
    def serves(self, placed: dict[int, Tensor]) -> Tensor:
        """Positions in the cohort whose downloads this rank makes (and counts)."""


class AllReduce(Topology):
    """Ranks are peers: each decodes and sums its own clients, the sums are all-reduced, and every rank
    holds the server. The receiver's per-client state lives beside its sender's, which it equals."""

    def __init__(self, comm: Comm, method: Method, theta_D: Tensor, exact: bool) -> None:
        super().__init__(comm, method, exact)
        self.state, self.workers = method.server.init(theta_D), list(range(comm.size))

    def start(self, cohort: Tensor, weights: Tensor, placed: dict[int, Tensor]) -> None:
        self._weights, self._sum = weights, self.sum(len(cohort))

    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        peer = believed(self.method.up, before)
        v_CS, _ = self.method.up.decompress(message, peer, ctx)
        self._sum.add(v_CS, self._weights[positions])

    def finish(self, round: Round) -> None:
        self._sum.over(self.comm)
        self.state = self.method.server.finish(self.state, self._sum.value(), round)

    def serves(self, placed: dict[int, Tensor]) -> Tensor:
        return placed[self.comm.rank]


class Aggregator(Topology):
    """Rank 0 aggregates and trains nobody (alone, it does both); the others send it their clients'
    messages and get the download of a client that has seen every round."""

    def __init__(self, comm: Comm, method: Method, theta_D: Tensor, exact: bool) -> None:
        super().__init__(comm, method, exact)
        server = method.server
        self.workers = list(range(1, comm.size)) or [0]
        self.state = server.init(theta_D) if comm.rank == 0 else server.view(theta_D)
        self.peers = ClientStore(method.up.init_peer)

    def start(self, cohort: Tensor, weights: Tensor, placed: dict[int, Tensor]) -> None:
        self._cohort, self._weights, self._placed = cohort, weights, placed
        self._outbox: list[tuple[Tensor, Message, Context]] = []

    def take(self, positions: Tensor, message: Message, before: State, ctx: Context) -> None:
        self._outbox.append((positions, message, ctx))

    def finish(self, round: Round) -> None:
        sent = to_bytes(concat([m for _, m, _ in self._outbox])) if self._outbox else b""
        inbox = self.comm.gather(sent)
        version = int(self.state["version"])
        download = b""
        if self.comm.rank == 0:
            total = self.sum(len(self._cohort))
            for rank, frame in enumerate(inbox):
                self._absorb(total, frame, self._placed.get(rank), round)
            self.state = self.method.server.finish(self.state, total.value(), round)
            download = to_bytes(self.method.server.download(self.state, version))
        download = self.comm.broadcast(download)
        if self.comm.rank != 0:
            self.state = self.method.server.reconcile(self.state, from_bytes(download), version + 1)

    def _absorb(self, total: Sum, frame: bytes, positions: Tensor | None, round: Round) -> None:
        if positions is None or not len(positions):
            return
        up = self.method.up
        message = from_bytes(frame, up.layout(), clients=len(positions))
        step = 1 if self.exact else max(1, _CHUNK_VALUES // up.size)
        for rows in torch.arange(len(positions)).split(step):
            clients_C = self._cohort[positions[rows]]
            ctx = Context(round, clients_C, torch.ones_like(clients_C), self.shared())
            v_CS, peer = up.decompress(message.select(rows), self.peers.get(clients_C), ctx)
            self.peers.put(clients_C, peer)
            total.add(v_CS, self._weights[positions[rows]])

    def serves(self, placed: dict[int, Tensor]) -> Tensor:
        everybody = torch.arange(len(self._cohort))
        return everybody if self.comm.rank == 0 else everybody[:0]


TOPOLOGIES: dict[str, type[AllReduce] | type[Aggregator]] = {"allreduce": AllReduce, "aggregator": Aggregator}
