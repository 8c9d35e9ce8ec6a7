"""Ranks that come and go: who takes part in the next synchronisation, agreed on through a coordinator's store.

The coordinator (``fedmpi coordinator``) is a process with torch's TCPStore that computes nothing. One key of it, the
*record*, holds what all agree on: which version of the state was committed last, its digest, and the roster of the
exchange that is open, if any. It changes by compare-and-swap only, so that every change has one author.

A synchronisation: each rank shows a card that it is ready for the next epoch. When all members of the last roster have
come, or those that have not are gone or too late, one rank opens the epoch with a roster: first those who hold the
committed state, then newcomers. They form a Gloo group of their own, exchange, and tell each other a digest of what
they came to. Whoever has everybody's digest may commit, whoever has not may close the epoch without; the first swap
counts and the others follow it. So either all of a roster go on from the new state, or all still have the old one.

Whether a rank is there is told by its heartbeat, a number that it counts up in a thread of its own, and each rank
notes by its own clock when it has last moved: no two machines' clocks are compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from fedmpi.comm.base import Comm
from fedmpi.comm.coordinated import Client, Gone, Heart
from fedmpi.comm.local import solo
from fedmpi.comm.torch import TorchComm
from fedmpi.errors import CommError

_TICK, _SLOWEST_TICK = 0.005, 0.1  # seconds between two looks at the record


class Deadlines(NamedTuple):
    """Seconds.

    Attributes:
      lease: without a heartbeat, until a rank counts as gone.
      late: that a synchronisation waits for a rank that is there, but does not come.
      collective: that a collective waits for the others.
      join: that a newcomer waits for the next synchronisation, and the first ones for each other.
      coordinator: that a coordinator which does not answer is waited for.
    """

    lease: float = 10.0
    late: float = 300.0
    collective: float = 60.0
    join: float = 3600.0
    coordinator: float = 60.0


class Roster(NamedTuple):
    """Who takes part in an epoch.

    Attributes:
      members: by rank; the first has the state that newcomers get.
      new: those who get it.
      gen: the epoch whose group these members share.
      places: where each of those who hold the state says to be.
      raw: the record that said so.
    """

    epoch: int
    version: int
    members: tuple[str, ...]
    new: tuple[str, ...]
    gen: int
    places: list[Any]
    raw: str

    @property
    def old(self) -> tuple[str, ...]:
        return tuple(member for member in self.members if member not in self.new)


class Groups(NamedTuple):
    """Collectives of an epoch; the same ones where they are of the same ranks.

    Attributes:
      everyone: of the roster.
      old: those who hold the state; None on a newcomer.
      new: newcomers, and the first of the others as rank 0; None where nobody is new, and on the rest of the others.
    """

    everyone: Comm
    old: Comm | None
    new: Comm | None


class Membership:
    """One rank's part in a job whose ranks come and go.

    Attributes:
      version, digest: of the committed state that this rank has; 0 and "" before any.
    """

    def __init__(
        self, host: str, port: int, me: str, job: Mapping[str, Any], workers: int, deadlines: Deadlines
    ) -> None:
        """Args:
          me: a name that no other process has or had.
          job: what must be the same on all ranks, plain values by dotted paths.
          workers: how many begin together.

        Raises:
          CommError: no coordinator answers at this address, or it is another job's.
        """
        self.me, self.deadlines = me, deadlines
        self.version, self.digest, self.members = 0, "", tuple[str, ...]()
        self._at, self._job, self._workers = (host, port), dict(job), workers
        self._comm: Comm | None = None
        self._gen = -1
        self._client: Client | None = None
        self._heart: Heart | None = None
        self._reach()

    @property
    def where(self) -> str:
        return f"{self._at[0]}:{self._at[1]}"

    def _reach(self, why: str = "") -> None:
        """Connect, once more where a coordinator has gone, to a new one perhaps."""
        began = time.monotonic()
        while True:
            self._let_go()
            try:
                self._client = Client(*self._at)
                told = self._client.swap("job", "", json.dumps(self._job))
                empty = {"epoch": 0, "version": self.version, "digest": self.digest, "gen": 0, "open": False}
                self._client.swap("record", "", json.dumps({**empty, "members": self.members, "new": []}))
                self._heart = Heart(Client(*self._at), self.me, self.deadlines.lease)
                break
            except Gone as error:
                if time.monotonic() - began > self.deadlines.coordinator:
                    raise CommError(
                        f"elastic: no coordinator answers at {self.where} for {self.deadlines.coordinator:g} s "
                        f"({why or error}); start one there with: fedmpi coordinator --port {self._at[1]}"
                    ) from None
                time.sleep(0.2)
        self._same(json.loads(told))

    def _same(self, theirs: Mapping[str, Any]) -> None:
        for path in sorted(theirs.keys() | self._job.keys(), key=lambda p: (not p.endswith("name"), p)):
            there, here = theirs.get(path, "nothing"), self._job.get(path, "nothing")
            if json.dumps(there) != json.dumps(here):
                self.close()
                raise CommError(
                    f"elastic: the job at {self.where} has {path} {there!r}, this rank has {here!r}; expected the same "
                    "script, configuration and versions on all ranks, and a coordinator for each job"
                )

    def _let_go(self) -> None:
        self._drop()
        for end in (self._heart and self._heart.end, self._client and self._client.close):
            if end:
                end()
        self._client = self._heart = None

    def _drop(self) -> None:
        """Leave the group; the others' collectives fail then, too."""
        if isinstance(self._comm, TorchComm):
            self._comm.close()
        self._comm, self._gen = None, -1

    def again(self, error: Gone) -> None:
        """After :class:`Gone`.

        Raises:
          CommError: no other coordinator came in time.
        """
        self._reach(str(error))

    # What ranks agree on.

    @property
    def _store(self) -> Client:
        assert self._client is not None
        return self._client

    def _look(self) -> tuple[str, list[dict[str, Any]]]:
        """The record, and all cards."""
        raw, cards = self._store.look("record", "ready/")
        if raw is None:
            raise Gone("it has forgotten the job")
        return raw, [json.loads(card) for card in cards]

    def _swap(self, raw: str, **change: Any) -> str:
        """The record after it, this rank's or another's."""
        return self._store.swap("record", raw, json.dumps({**json.loads(raw), **change}))

    def _alive(self, rank: str) -> bool:
        assert self._heart is not None
        if not self._heart.is_alive():
            raise Gone("it does not hear this rank's heartbeat")
        return self._heart.alive(rank)

    def roster(self, place: object) -> Roster:
        """Wait until an epoch is open with this rank in it.

        Args:
          place: where in its work it is, plain values, which are the same on all who hold the state.

        Raises:
          Gone: the coordinator.
          CommError: nobody opened one in time, or nobody is left who holds the state.
        """
        began = since = time.monotonic()
        shown = -1
        while True:
            raw, cards = self._look()
            now = json.loads(raw)
            nxt, version = now["epoch"] + 1, now["version"]
            if not now["open"] and self.version > version:  # only after a fresh store
                self._swap(raw, version=self.version, digest=self.digest, members=self.members)
                continue
            if shown != nxt and not (now["open"] and shown == now["epoch"] and self.me in now["members"]):
                card = {"id": self.me, "epoch": nxt, "version": self.version, "digest": self.digest}
                self._store.set(f"ready/{self.me}", json.dumps({**card, "gen": self._gen, "place": place}))
                shown, since = nxt, time.monotonic()
                continue
            waited = time.monotonic() - since
            holds = self.version == version and self.digest == now["digest"]
            ready = {c["id"]: c for c in cards if c["epoch"] == nxt and self._alive(c["id"])}
            if now["open"] and self.me not in now["members"]:
                # Others' exchange; if all of them are gone nobody else will close it.
                if waited > self.deadlines.lease and not any(map(self._alive, now["members"])):
                    self._swap(raw, open=False)
            elif not now["open"] and (holds or not version):
                raw = self._open(raw, now, ready, waited)
                now = json.loads(raw)
            if now["open"] and now["epoch"] == shown and self.me in now["members"]:
                new = tuple(now["new"])
                return Roster(shown, version, tuple(now["members"]), new, now["gen"], now["places"], raw)
            self._check_wait(now, time.monotonic() - began, holds, len(ready))
            time.sleep(min(_SLOWEST_TICK, _TICK + waited / 50))

    def _open(
        self, raw: str, now: Mapping[str, Any], ready: Mapping[str, Mapping[str, Any]], waited: float
    ) -> str:
        """Open the next epoch, if it is time; the record after that."""
        epoch, version = now["epoch"] + 1, now["version"]
        if self.me not in ready or (not version and len(ready) < self._workers):
            return raw
        absent = [m for m in now["members"] if m not in ready and self._alive(m)]
        if absent and waited <= self.deadlines.late:
            return raw
        hold = sorted(i for i, c in ready.items() if c["version"] == version and c["digest"] == now["digest"])
        if not version:  # nobody has trained yet; all get the first one's
            hold = sorted(ready)[:1]
        new = sorted(ready.keys() - set(hold))
        members = [*hold, *new]
        same = members == now["members"] and all(c["gen"] == now["gen"] for c in ready.values())
        gen = now["gen"] if same else epoch
        places = [ready[i]["place"] for i in hold]
        return self._swap(raw, epoch=epoch, members=members, new=new, gen=gen, places=places, open=True)

    def _check_wait(self, now: Mapping[str, Any], waited: float, holds: bool, ready: int) -> None:
        """
        Raises:
          CommError: it has taken too long.
        """
        limits = self.deadlines
        patient = waited <= max(limits.coordinator, 2 * limits.lease)
        if not (
            holds or patient or now["open"] or not now["version"] or any(map(self._alive, now["members"]))
        ):
            raise CommError(
                f"elastic: nobody is left of those who hold the state of the job at {self.where} after "
                f"{now['version']} synchronisations; start coordinator and ranks anew, from a checkpoint"
            )
        if waited > limits.join:
            what = "other ranks' next synchronisation"
            if not now["version"]:
                what = f"{self._workers} ranks ({ready} are there)"
            raise CommError(
                f"elastic: rank {self.me} waited {limits.join:g} s for {what} at {self.where}; join: sets how long"
            )

    def form(self, roster: Roster) -> Groups:
        """The group of all is that of the last time where the roster is the same.

        Raises:
          Gone, LostError: it did not come to that.
        """
        rank, old, new = roster.members.index(self.me), len(roster.old), len(roster.new)
        prefix = f"group/{roster.gen}"
        if self._gen != roster.gen:
            self._drop()
            self._comm = self._group(f"{prefix}/all", rank, old + new)
            self._gen = roster.gen
            if rank == 0:
                self._store.delete(lambda key: "group/" in key and f"{prefix}/" not in key)
        everyone = self._comm
        assert everyone is not None
        if not new:
            return Groups(everyone, everyone, None)
        mine = self._group(f"{prefix}/old", rank, old) if rank < old else None
        if 0 < rank < old:
            return Groups(everyone, mine, None)
        joining = everyone if old == 1 else self._group(f"{prefix}/new", max(0, rank - old + 1), new + 1)
        return Groups(everyone, mine, joining)

    def _group(self, prefix: str, rank: int, size: int) -> Comm:
        if size == 1:
            return solo()
        return self._store.form(prefix, rank, size, self.deadlines.collective)

    def settle(self, roster: Roster, digest: str, sure: bool) -> bool:
        """The epoch ends. It counts where one rank could say so.

        Args:
          digest: of what this rank came to; "" if it did not.
          sure: all others came to the same.

        Raises:
          Gone: the coordinator; it did not count for this rank.
        """
        end: dict[str, Any] = {"open": False}
        if sure:
            end |= {"version": roster.version + 1, "digest": digest, "new": []}
        try:
            now = json.loads(self._swap(roster.raw, **end))
        except Gone:
            self._drop()
            raise
        counts = bool(digest) and (now["version"], now["digest"]) == (roster.version + 1, digest)
        if counts:
            self.version, self.digest, self.members = now["version"], digest, roster.members
        if not counts or not sure:
            self._drop()
        return counts

    def close(self) -> None:
        """Leave: the others need not wait for this rank."""
        client = self._client
        if client is not None:
            with suppress(Gone):
                if self._heart is not None:
                    self._heart.stop()
                client.delete(lambda key: key.endswith((f"beat/{self.me}", f"ready/{self.me}")))
        self._let_go()
