"""Going on without a rank that ended, where the ranks' :class:`~fedmpi.comm.Comm` can (``mpirun --with-ft ulfm``).

Survivors notice at different places, up to a round apart. All go back to the last round that all of them have
finished, which each still holds (states are replaced, not changed, so that holding one costs nothing), and do the next
one anew. In it the clients that were to be trained by the lost rank count as dropouts. What the lost rank kept of its
clients comes from the last checkpoint, or starts afresh where there is none: at both ends, so that what a sender
believes of its receiver stays true. In data-parallel mode, where each rank is one client, the data is shared out
anew (:mod:`fedmpi.engine.fewer`). The run's protocol bytes go on; lost are only the wire bytes that the rank had
counted, and its part of the ledger's bytes by client.

Shape suffix: K all clients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedmpi.comm.base import Comm, LostError
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.fewer import without
from fedmpi.engine.manifest import Lost, Totals
from fedmpi.engine.resume import Found, restore_clients
from fedmpi.errors import CheckpointError
from fedmpi.method import State

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation

_COUNTERS = (*Totals.model_fields, "trained", "best_X")


class _Point(NamedTuple):
    """What a rank held after some round, but for its clients' states."""

    replica: dict[str, Any]
    ledger: State
    counters: dict[str, Any]


class Faults:
    """One rank's end.

    Attributes:
      simulation: the run, once it is prepared on this rank.
      checkpoints: from which lost clients' states are taken, in a run with a folder.
      done: rounds that this rank has finished.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.simulation: Simulation | None = None
        self.checkpoints: Checkpoints | None = None
        self.done = 0
        self._before: list[Lost] = []  # lost before the run was prepared
        self._members = comm.members  # those that the simulation fits
        self._points: dict[int, _Point] = {}

    def begin(self, simulation: Simulation, checkpoints: Checkpoints | None, done: int) -> None:
        """The run is prepared, with ``done`` rounds behind it."""
        self.simulation, self.checkpoints = simulation, checkpoints
        simulation.lost = [*simulation.lost, *self._before]
        self.reached(done)

    def reached(self, done: int) -> None:
        """``done`` rounds are finished here. Survivors are at most one round apart: what lies further back goes."""
        self.done, simulation = done, self.simulation
        if simulation is None or not self.comm.survives:
            return
        self._points[done] = _Point(
            simulation.replica.held(),
            {name: value.clone() for name, value in vars(simulation.ledger).items()},
            {name: getattr(simulation, name) for name in _COUNTERS},
        )
        self._points.pop(done - 2, None)
        for store in simulation.stores:
            store.mark()

    def recover(self, error: LostError) -> list[Lost]:
        """Meet the survivors, and go back to where all of them can go on from: :attr:`done` rounds, or, with
        :attr:`simulation` None, the preparation. Returns what was lost.

        Raises:
          LostError: ``error``, where no rank survives another; or why those who are left cannot go on, the same on all.
        """
        if not self.comm.survives:
            raise error
        end = ""
        while not end:
            try:
                self.comm.shrink()
                here = max(self._points, default=-1)
                done = min(int(n) for n in self.comm.allgather(str(here).encode()))
                gone = [i for i, rank in enumerate(self._members) if rank not in self.comm.members]
                end = "" if done < 0 else self._end(done, gone)
                if not end:
                    commit = self._restart(gone) if done < 0 else self._fit(done, gone)
                    self.comm.settle()
                    lost = commit()
                    self._members = self.comm.members
                    return lost
            except LostError:
                continue  # one more ended; nothing is fitted yet
        raise LostError(end)

    def _restart(self, gone: list[int]) -> Callable[[], list[Lost]]:
        """Somebody is still in the preparation: all begin again."""
        self.simulation = None
        self._points.clear()

        def commit() -> list[Lost]:
            lost = [Lost(rank=self._members[i], round=0) for i in gone]
            self._before += lost
            return lost

        return commit

    def _fit(self, done: int, gone: list[int]) -> Callable[[], list[Lost]]:
        """Go back to ``done`` rounds, and get what it takes to go on without the ranks ``gone``, in the numbers from
        before; returns what then fits the simulation to the survivors."""
        simulation = self.simulation
        assert simulation is not None  # it made the points
        self._rewind(simulation, done)
        if simulation.config.mode == "data_parallel":
            return self._go_on_with_fewer(simulation, done, gone)
        before_K = simulation.home(torch.arange(simulation.config.clients))
        homes_K = None if before_K is None else self._homes(simulation, before_K, gone)
        found = Found(None, torch.empty(0, dtype=torch.int64), simulation.ledger.seen)
        if before_K is not None and homes_K is not None:
            orphans = torch.isin(before_K, torch.tensor(gone)).nonzero()[:, 0]
            found = self._restore(simulation, orphans, homes_K, done)
        dropped = self._in_flight(simulation, done, gone)

        def commit() -> list[Lost]:
            lost = [self._describe(done, i, dropped[i], before_K, found) for i in gone]
            earlier = simulation.dropped.get(done, found.clients[:0])
            simulation.dropped = {done: torch.cat([earlier, *dropped.values()])}
            simulation.homes_K = homes_K
            simulation.ledger.seen.copy_(found.seen)
            simulation.replica.fit()
            simulation.lost = [*simulation.lost, *lost]
            self._points.clear()
            for store in simulation.stores:
                store.settle()
            self.reached(done)
            return lost

        return commit

    def _go_on_with_fewer(
        self, simulation: Simulation, done: int, gone: list[int]
    ) -> Callable[[], list[Lost]]:
        """:meth:`_fit` where each rank is one client."""
        left = [i for i in range(len(self._members)) if i not in gone]
        after = without(simulation, left, self.comm, _COUNTERS)
        keeps = not (simulation.clients.empty and simulation.own.empty)

        def commit() -> list[Lost]:
            flying = done < simulation.config.rounds
            lost = [
                Lost(rank=self._members[i], round=done, dropped=int(flying), reset=int(keeps)) for i in gone
            ]
            after.lost = [*after.lost, *lost]
            self.simulation = after
            self._points.clear()
            self.reached(done)
            return lost

        return commit

    def _end(self, done: int, gone: list[int]) -> str:
        """Why the survivors cannot go on; "" when they can."""
        simulation, what = self.simulation, ""
        assert simulation is not None
        if simulation.config.topology == "aggregator" and 0 in gone:
            what = "which aggregates"
        if not what:
            return ""
        saved = self.checkpoints.agreed() if self.checkpoints else []
        last = f"the last checkpoint is after round {saved[0]}" if saved else "there is no checkpoint"
        names = ", ".join(str(self._members[i]) for i in gone)
        return f"rank {names}, {what}, ended in round {done}: the others cannot go on; {last}"

    def _rewind(self, simulation: Simulation, done: int) -> None:
        passed = [n for n in self._points if n >= done]
        for store in simulation.stores:
            store.rewind(len(passed))
            store.mark()
        self._points = {n: point for n, point in self._points.items() if n <= done}
        point = self._points[done]
        simulation.replica.take_back(point.replica)
        for name, value in point.ledger.items():
            getattr(simulation.ledger, name).copy_(value)
        for name, value in point.counters.items():
            setattr(simulation, name, value)

    def _homes(self, simulation: Simulation, before_K: Tensor, gone: list[int]) -> Tensor:
        """The rank of each client from here on: those of a lost one are shared out, the others stay."""
        left = [i for i in range(len(self._members)) if i not in gone]
        renumbered = torch.full((len(self._members),), -1)
        renumbered[left] = torch.arange(len(left))
        homes_K = renumbered[before_K]
        orphans, crew = (homes_K < 0).nonzero()[:, 0], torch.tensor(simulation.replica.crew())
        homes_K[orphans] = crew[torch.arange(len(orphans)) % len(crew)]
        return homes_K

    def _in_flight(self, simulation: Simulation, t: int, gone: list[int]) -> dict[int, Tensor]:
        """The clients of round ``t`` that each lost rank was to train; nobody, where no other client would be left."""
        nobody = torch.empty(0, dtype=torch.int64)
        if t < simulation.config.rounds:
            call = simulation.call(t)
            dropped = {i: call.clients[call.placed.get(i, nobody)] for i in gone}
            if sum(map(len, dropped.values())) < len(call.clients):
                return dropped
        return dict.fromkeys(gone, nobody)

    def _restore(self, simulation: Simulation, orphans: Tensor, homes_K: Tensor, done: int) -> Found:
        """What the last checkpoint that can be used has of ``orphans``, in place of whatever was held of them."""
        seen_K = simulation.ledger.seen.clone()
        rounds = self.checkpoints.agreed() if self.checkpoints else []
        for n in [n for n in rounds if n <= done] + [None]:
            for store in simulation.stores:
                store.forget(orphans)
            if n is None or self.checkpoints is None:
                break
            with suppress(CheckpointError):
                found = restore_clients(simulation, self.checkpoints.at(n), orphans, homes_K)
                seen_K[orphans] = found.seen[orphans]
                return found._replace(seen=seen_K)
        seen_K[orphans] = 0
        return Found(None, orphans[:0], seen_K)

    def _describe(self, done: int, rank: int, dropped: Tensor, before_K: Tensor | None, found: Found) -> Lost:
        lost = Lost(rank=self._members[rank], round=done, dropped=len(dropped))
        if before_K is None:
            return lost
        restored = int((before_K[found.clients] == rank).sum())
        reset = int((before_K == rank).sum()) - restored
        return lost.model_copy(
            update={"restored": restored, "reset": reset, "checkpoint": found.round if restored else None}
        )
