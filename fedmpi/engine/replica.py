"""One rank's copy of what a run trains: the server's state where it aggregates, else the view of a client that has seen
every round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, together
from fedmpi.config import Config
from fedmpi.engine.downloads import receive
from fedmpi.engine.store import ClientStore, Kept, everybody, nobody
from fedmpi.engine.updates import check_server
from fedmpi.errors import ConfigError
from fedmpi.meet import ways
from fedmpi.meet.base import Held, Roster, Way
from fedmpi.meet.by_part import PartWays
from fedmpi.meet.sums import Sums
from fedmpi.meet.ways import OwnerWay, SumWay
from fedmpi.message import CPU, Message, concat, from_bytes, to_bytes
from fedmpi.method import Compressor, Method, Round, State, believed
from fedmpi.methods.joint import Joint
from fedmpi.phases import phased

Kind = Literal["allreduce", "aggregator", "data_parallel"]


def sums_of(config: Config, method: Method, device: torch.device = CPU) -> Sums:
    """How the messages of a run are added up, on ``device``.

    Raises:
      ConfigError: ``server.aggregate`` does not work with the method.
    """
    aggregate, up = config.server.aggregate, method.up
    means = all(kind == "mean" for _, kind in up.segments)
    if aggregate != "mean" and (not means or up.size != up.spec.size or len(method.passes) > 1):
        raise ConfigError(
            f"server.aggregate: {aggregate} does not work with {config.method.name}, whose message does not decode to "
            f"a gradient of D numbers in one pass; expected mean, or a method like dense, bf16 or topk"
        )
    return Sums(config.reproducible, aggregate, config.server.trim, device)


class Replica:
    """This rank's part in a round: :meth:`open` a pass, whose way takes its clients' messages, then :meth:`finish`
    (or, after a pass that is not the last, :meth:`between`).

    Attributes:
      owner: the rank that alone aggregates and trains nobody (alone, it does both); the others send it their clients'
        messages and get the download of a client that has seen every round. None: all have the mean, and a copy of
        the server.
      state: with :meth:`kept` it is all that a checkpoint and a rewind need.
      workers: the ranks that train clients.
      fuses: one message may stand for several clients' (the way is a sum).
      way: of the pass that is open.
    """

    way: Way

    def __init__(
        self, comm: Comm, method: Method, theta_D: Tensor, sums: Sums, peers: ClientStore, kind: Kind
    ) -> None:
        """Args:
        peers: what an owner keeps of clients.
        kind: who aggregates: all alike, rank 0, or (one client a rank, all in every round) whoever sends least.
        """
        self.comm, self.method, self.peers = comm, method, peers
        self.owner = 0 if kind == "aggregator" else None
        self.fuses, self.parallel = kind == "allreduce", kind == "data_parallel"
        self.device = theta_D.device
        self.state = method.server.init(theta_D) if self.holds else method.server.view(theta_D)
        self._ways = {codec: self._way(codec, sums) for codec in method.passes}
        self.fit()

    def _way(self, codec: Compressor, sums: Sums) -> Way:
        if self.parallel:

            def build(up: Compressor) -> Way:
                return ways.build(self.comm, up, exact=sums.exact, device=sums.device)

            return PartWays(self.comm, codec, sums, build) if isinstance(codec, Joint) else build(codec)
        if self.owner is None:
            return SumWay(self.comm, codec, sums, flags=False)
        kept = self.peers if codec is self.method.up else None
        return OwnerWay(self.comm, codec, sums, kept, self.owner, answers=False)

    @property
    def holds(self) -> bool:
        """This rank's state is the server's."""
        return self.owner in (None, self.comm.rank)

    def kept(self) -> dict[str, Kept]:
        """What this rank keeps of each client as a receiver, by a name of lower-case letters. With ``state``, which
        rank 0 always aggregates, it is all that a checkpoint saves of a replica."""
        if self.parallel:  # every rank keeps the same of all ranks; rank 0 writes it
            held = self._ways[self.method.up].peers
            assert isinstance(held, Held)
            self._copy = ClientStore(self.method.up.init_peer if held.state else dict, self.device)
            self._copy.put(torch.arange(self.comm.size), held.state)
            return {"peers": Kept(self._copy, everybody if self.comm.rank == 0 else nobody, everybody)}
        if self.owner is None:  # it lies beside the senders' own state, which it equals
            return {}
        mine = everybody if self.holds else nobody
        return {"peers": Kept(self.peers, mine, mine)}

    def held(self) -> dict[str, Any]:
        """What this rank holds between rounds besides :meth:`kept`, by its attributes' names: for :meth:`take_back`."""
        return {"state": self.state}

    def take_back(self, held: dict[str, Any]) -> None:
        """Hold again what was :meth:`held` earlier."""
        for name, value in held.items():
            setattr(self, name, value)

    def believe(self, own: State) -> None:
        """In data-parallel mode: keep of all ranks what their ``own`` states say of it. Called by all ranks."""
        up = self.method.up
        if up.init_peer():
            frames = self.comm.allgather(to_bytes(Message(believed(up, own))))
            held = self._ways[up].peers
            assert isinstance(held, Held)
            held.load(concat([from_bytes(frame, device=self.device) for frame in frames]).arrays)

    def crew(self) -> list[int]:
        """The ranks that train clients, of those that there are."""
        ranks = range(self.comm.size)
        return [rank for rank in ranks if rank != self.owner] or list(ranks)

    def fit(self) -> None:
        """There are fewer ranks than before, or this is the start."""
        self.workers = self.crew()

    def load(self, state: State) -> None:
        """Continue from what rank 0's ``state`` was; this rank's own is still that of θ₀, and what the stores of the
        last :meth:`kept` hold has been loaded."""
        server = self.method.server
        places = server.init(self.parameters())  # where each entry lies
        state = {name: value.to(places[name].device) for name, value in state.items()}
        if self.holds:
            self.state = state
        else:  # as a client that has missed all rounds
            self.state = server.reconcile(self.state, server.download(state, 0), int(state["version"]))
        if self.parallel:
            held = self._ways[self.method.up].peers
            assert isinstance(held, Held)
            held.load(self._copy.get(torch.arange(self.comm.size)))

    def parameters(self) -> Tensor:
        return self.method.server.parameters(self.state)

    def shared(self) -> State:
        return self.method.server.shared(self.state)

    @phased("server")
    def open(
        self, codec: Compressor, clients: Tensor, weights: Tensor, placed: dict[int, Tensor], now: Round
    ) -> Way:
        """A pass begins: ``clients`` will send ``codec``'s messages; ``placed`` are each worker's positions there."""
        self._index, self.way = self.method.passes.index(codec), self._ways[codec]
        if self.parallel:
            self.way.open(Roster.of_ranks(self.comm, now, self.shared()))
        else:
            self.way.open(Roster(now, clients, weights, placed, self.shared()))
        return self.way

    def _aggregate(self, use: Callable[[Tensor], None]) -> None:
        """The mean of the open pass, and what is done with it where this rank gets it. An error that an owner has
        alone is everybody's: a message that cannot be read must end the senders, too."""
        end = self.way.send()
        with nullcontext() if self.owner is None else together(self.comm, "aggregating"):
            mean_S = end()
            if isinstance(self.way.peers, Held):
                self.way.peers.commit()
            if mean_S is not None:
                use(mean_S)

    def _step(self, rule: Callable[[State, Tensor, Round], State], mean_S: Tensor) -> None:
        """Take over the state after a ``rule`` of the server.

        Raises:
          NumericalError: it overflows.
        """
        now = self.way.roster.now
        state = rule(self.state, mean_S, now)
        check_server(state, self.state, mean_S, now.t)
        self.state = state

    @phased("server")
    def between(self) -> Tensor:
        """A pass that is not the last is over: make its mean known to all ranks, and return it ``(S,)``."""
        means: list[Tensor] = []
        self._aggregate(means.append)
        mean_S = means[0] if means else None
        if self.owner is not None:
            sent = b"" if mean_S is None else to_bytes(Message({"mean": mean_S[None]}))
            told = from_bytes(self.comm.broadcast(sent, self.owner), device=self.device)
            mean_S = told.arrays["mean"][0]
        assert mean_S is not None  # every message was usable
        index, server = self._index, self.method.server
        self._step(lambda state, mean_S, now: server.between(state, index, mean_S, now), mean_S)
        return mean_S

    @phased("server")
    def finish(self) -> None:
        """All have sent: aggregate, and bring this rank's parameters up to date."""
        version = int(self.state["version"])
        self._aggregate(lambda mean_S: self._step(self.method.server.finish, mean_S))
        self._publish(version)

    @phased("server")
    def skip(self, state: State, round: Round) -> None:
        """Nobody sent a message that counts: go on from ``state``, which was this rank's before the round."""
        version = int(state["version"])
        self.state = self.method.server.skip(state, round) if self.holds else state
        self._publish(version)

    @phased("server")
    def prepare(self, g_D: Tensor) -> None:
        """The server's own gradient, before round 0."""
        version = int(self.state["version"])
        if self.holds:
            self.state = self.method.server.prepare(self.state, g_D)
        self._publish(version)

    def _publish(self, version: int) -> None:
        """The views of an owner's others catch up from ``version`` with it, which is one ahead (or is not)."""
        if self.owner is None:
            return
        server, sent = self.method.server, b""
        if self.holds and int(self.state["version"]) != version:
            sent = to_bytes(server.download(self.state, version))
        sent = self.comm.broadcast(sent, self.owner)
        if not self.holds and sent:
            self.state = receive(server, self.state, sent, version + 1)

    def served(self, clients_C: Tensor) -> Tensor:
        """Those of these clients whose downloads this rank makes (and counts)."""
        if self.owner is not None:
            return clients_C if self.holds else clients_C[:0]
        return clients_C[self.comm.rank :: self.comm.size]
