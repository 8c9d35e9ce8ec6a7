"""Local updates among ranks that come and go: ``fedmpi.local_sgd(…, elastic="host:port")``.

    fedmpi coordinator --port 29400                                       one small process that trains nothing
    outer = fedmpi.local_sgd(model, optimizer, method, every=100, elastic="host:29400")
    while outer.step < steps: …                                           on each rank, started by whatever starts it

A rank that comes joins at the others' next synchronisation, none of which starts anew: it gets parameters, buffers,
the outer optimizer's and the server's memory and the count of steps, and its residuals begin at zero. One that ends,
stops or does not come in time is left out, and costs the steps that it made since the last synchronisation; if it goes
on later, it joins as a newcomer. Each synchronisation counts on all ranks or on none
(:mod:`fedmpi.comm.elastic`), and all digest what they came to: ranks that differ in a bit end with a sentence.

Who may connect: everybody who can reach the coordinator's port. torch's TCPStore asks for no name and no password, and
the ranks trust what others send, as in any job over Gloo; use it in a private network (see SECURITY.md).

A rank's number and how many there are change: shuffle each rank's data by a seed of its own instead of sharing it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fedmpi.comm.agree import leaves, versions
from fedmpi.comm.base import Comm, LostError
from fedmpi.comm.coordinated import Gone
from fedmpi.comm.elastic import Deadlines, Groups, Membership, Roster
from fedmpi.errors import CommError, ConfigError
from fedmpi.integrations.elastic_options import ElasticOptions
from fedmpi.integrations.fragments import Fragment, Outcome, State, Step
from fedmpi.integrations.local_state import card, to_bytes
from fedmpi.integrations.say import say
from fedmpi.integrations.settings import Settings
from fedmpi.integrations.tentative import Job, Kept, average, keep, put_back, take_in
from fedmpi.methods.base import Options

_COUNTS = ("step", "cycles", "at", "length")


class _Came(NamedTuple):
    """To what a try came here, before it is known whether it counts.

    Attributes:
      head: counts, the same on all ranks.
      tensors: what all ranks hold then.
      outcomes: of the fragments that were averaged.
      digest: of the first two.
      sure: all ranks came to the same.
    """

    head: dict[str, Any]
    tensors: State
    outcomes: list[Outcome]
    digest: str
    sure: bool = False


class Elastic:
    """One rank's part.

    Attributes:
      close: leave; the others need not wait for this rank.
    """

    def __init__(
        self, meeting: ElasticOptions, module: nn.Module, method: Options, settings: Settings, local: Job
    ) -> None:
        """
        Raises:
          CommError: there is no coordinator, or it is another job's.
        """
        limits = Deadlines(meeting.lease, meeting.late, meeting.collective, meeting.join, meeting.coordinator)
        me = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # What must be the same on all ranks.
        job = {**versions(), "method": method.model_dump(mode="json"), **settings.model_dump(mode="json")}
        job |= {**card(local.options, local.length, module), "workers": meeting.workers}
        self._members = Membership(*meeting.address, me, leaves(job), meeting.workers, limits)
        self._local = weakref.proxy(local)
        trained = {name for fragment in local.fragments for name in fragment.parameters}
        self._frozen = {name: p for name, p in module.named_parameters() if name not in trained}
        self._bound = local.comm  # whose collectives the fragments use
        self._last, self._seen = 0, tuple[str, ...]()  # step and members of the last synchronisation
        self.joined = self.left = self.rejoined = self.lost_steps = self.retries = 0
        self.close = weakref.finalize(self, self._members.close)  # at the end of the process, too

    def refuse_state(self) -> NoReturn:
        raise ConfigError(
            "elastic: expected a state to begin with before this rank has joined; load model and optimizer before "
            "fedmpi.local_sgd is called, with a new coordinator"
        )

    def stats(self) -> dict[str, Any]:
        """``joined``: ranks, all told, whose residuals began at zero; ``left``: those left out since this one came;
        ``rejoined`` and ``lost_steps``: how often that was this one, and the steps that it cost; ``retries``:
        synchronisations that had to be done anew."""
        return {
            "ranks": max(1, len(self._members.members)),
            "synchronisations": self._members.version,
            **{name: getattr(self, name) for name in ("joined", "left", "rejoined", "lost_steps", "retries")},
        }

    def synchronize(self, fragments: Sequence[Fragment], averaging: bool, begins: bool) -> bool:
        """Average ``fragments`` over the ranks that are there; with none, join. Called by each rank when it has come to
        that step.

        Args:
          averaging: the step is the mean itself, whatever the outer optimizer.
          begins: the next H steps begin after this.

        Returns:
          Whether they do; on a newcomer, as on the others.

        Raises:
          CommError: the coordinator is gone, or ranks came to different states.
        """
        local = self._local
        place = [local.step, [local.fragments.index(fragment) for fragment in fragments], averaging]
        while True:
            try:
                roster = self._members.roster(place)
                self._check_places(roster)
                kept = [keep(fragment) for fragment in self._local.fragments]
                came = self._try(roster, fragments, averaging, begins)
                counts = self._settle(roster, came, kept)
            except Gone as error:
                say(
                    0,
                    f"elastic: the coordinator at {self._members.where} has gone ({error}); waiting for another one",
                )
                self._members.again(error)
                continue
            if counts and came is not None:
                return self._count(roster, came, fragments, averaging)
            self.retries += 1

    def _check_places(self, roster: Roster) -> None:
        """
        Raises:
          ConfigError: on all ranks: they synchronise different things.
        """
        if roster.version and any(place != roster.places[0] for place in roster.places):
            self.close()
            raise ConfigError(
                "elastic: expected all ranks to synchronise after the same step, got steps "
                f"{', '.join(str(step) for step, *_ in roster.places)}; call synchronize() on all in the same step"
            )

    def _settle(self, roster: Roster, came: _Came | None, kept: list[Kept]) -> bool:
        counts = False
        try:
            counts = self._members.settle(roster, came.digest if came else "", bool(came and came.sure))
        finally:
            if not counts:
                for fragment, before in zip(self._local.fragments, kept, strict=True):
                    put_back(fragment, before)
        return counts

    def _try(
        self, roster: Roster, fragments: Sequence[Fragment], averaging: bool, begins: bool
    ) -> _Came | None:
        """None, or not ``sure``: a rank was lost on the way."""
        came: _Came | None = None
        try:
            groups = self._members.form(roster)
            with self._counting(groups):
                came = self._meet(groups, roster, fragments, averaging, begins)
                mine = torch.frombuffer(bytearray.fromhex(came.digest), dtype=torch.uint8)
                found = [bytes(row.tolist()).hex() for row in groups.everyone.allgather_tensor(mine)]
        except LostError:
            return came
        except Gone:
            raise
        except BaseException:
            self.close()  # the others go on without this rank
            raise
        if len(set(found)) > 1:
            self.close()
            raise CommError(
                f"elastic: ranks differ after synchronisation {roster.version + 1}, expected equal bits: "
                f"{', '.join(f'{m} {d[:8]}' for m, d in zip(roster.members, found, strict=True))}"
            )
        return came._replace(sure=True)

    def _meet(
        self, groups: Groups, roster: Roster, fragments: Sequence[Fragment], averaging: bool, begins: bool
    ) -> _Came:
        steps: list[Step] = []
        if groups.old is not None and roster.version:
            self._move(groups.old)
            steps = [self._average(fragment, averaging) for fragment in fragments]
        outcomes = [step.outcome for step in steps]
        head, tensors = self._head(outcomes, begins), self._tensors(fragments, steps)
        if groups.new is not None:
            head = json.loads(groups.new.broadcast(json.dumps(head).encode()))
            tensors = {name: _broadcast(groups.new, x) for name, x in tensors.items()}
        return _Came(head, tensors, outcomes, _digest(roster.version + 1, head, tensors))

    @contextmanager
    def _counting(self, groups: Groups) -> Iterator[None]:
        """The bytes of all groups are one rank's."""
        local = self._local
        sent, received = local.comm.sent, local.comm.received
        distinct = {id(comm): comm for comm in groups if comm is not None}.values()
        before = [(comm.sent, comm.received) for comm in distinct]
        try:
            yield
        finally:
            for comm, (s, r) in zip(distinct, before, strict=True):
                sent, received = sent + comm.sent - s, received + comm.received - r
            local.comm = groups.everyone
            local.comm.sent, local.comm.received = sent, received

    def _move(self, comm: Comm) -> None:
        if comm is self._bound:
            return
        for fragment in self._local.fragments:
            fragment.move(comm)
        self._local.buffers.comm = self._bound = comm

    def _average(self, fragment: Fragment, averaging: bool) -> Step:
        return fragment.step(average(fragment, self._local.step), averaging)

    def _head(self, outcomes: Sequence[Outcome], begins: bool) -> dict[str, Any]:
        """What is counted, after this round."""
        local, good = self._local, sum(outcome.counts for outcome in outcomes)
        return {
            **{name: getattr(local, name) for name in _COUNTS},
            "rounds": local.rounds + good,
            "dropped": local.dropped + len(outcomes) - good,
            "begins": begins,
            "fragments": [[f.taken, f.reducer.step, f.reducer.skipped] for f in local.fragments],
        }

    def _tensors(self, fragments: Sequence[Fragment], steps: Sequence[Step] = ()) -> State:
        """By name, what all ranks hold after ``steps`` of ``fragments``."""
        found: State = {f"parameter {name}": p.detach() for name, p in self._frozen.items()}
        stepped = {id(fragment): step for fragment, step in zip(fragments, steps, strict=bool(steps))}
        buffers = self._local.buffers.last
        for i, fragment in enumerate(self._local.fragments):
            step = stepped.get(id(fragment), Step(Outcome(False), fragment.anchors, fragment.outer))
            for j, group in enumerate(fragment.groups):
                found[f"{i}.{j} anchor"] = step.anchors[j]
                found |= {f"{i}.{j} outer {name}": x for name, x in step.outer[j].items()}
                found |= {f"{i}.{j} memory {name}": x for name, x in group.memory.items()}
            if fragment.buffers is not None and step.outcome.counts:
                buffers = fragment.buffers.result()
        return found | {f"buffer {name}": x for name, x in buffers.items()}

    def _count(self, roster: Roster, came: _Came, fragments: Sequence[Fragment], averaging: bool) -> bool:
        """It counts: go on from there."""
        local = self._local
        if roster.version:
            self.joined += len(roster.new)
        self.left += len(set(self._seen) - set(roster.members))
        if self._members.me in roster.new:
            if self._seen:
                self.rejoined += 1
                self.lost_steps += local.step - self._last
            self._arrive(came)
        elif came.outcomes:
            take_in(local, fragments, came.outcomes, averaging)
        self._last, self._seen = local.step, roster.members
        begins: bool = came.head["begins"]
        return begins

    @torch.no_grad()
    def _arrive(self, came: _Came) -> None:
        """Go on as the others do. What a rank keeps for itself begins at zero; the optimizer's state stays."""
        local, tensors = self._local, came.tensors
        for name, p in self._frozen.items():
            p.copy_(tensors[f"parameter {name}"])
        for i, (fragment, counted) in enumerate(zip(local.fragments, came.head["fragments"], strict=True)):
            anchors, outer = list[Tensor](), list[State]()
            for j, group in enumerate(fragment.groups):
                group.reset()
                anchors.append(tensors[f"{i}.{j} anchor"])
                outer.append({name: tensors[f"{i}.{j} outer {name}"] for name in fragment.outer[j]})
                group.memory = {name: tensors[f"{i}.{j} memory {name}"] for name in group.memory}
                group.rollback()
            fragment.take_over(anchors, outer)
            fragment.go_back()
            fragment.taken, fragment.reducer.step, fragment.reducer.skipped = counted
        local.buffers.put({name: tensors[f"buffer {name}"] for name in local.buffers.last})
        span = local.span  # of what this rank did
        for name in ("step", "rounds", "dropped"):
            setattr(span, name, getattr(span, name) + came.head[name] - getattr(local, name))
        for name in (*_COUNTS, "rounds", "dropped"):
            setattr(local, name, came.head[name])


def _broadcast(comm: Comm, x: Tensor) -> Tensor:
    """Rank 0's, of the same shape and type."""
    data = comm.broadcast(to_bytes(x) if comm.rank == 0 else b"")
    if comm.rank == 0 or not data:
        return x
    return torch.frombuffer(bytearray(data), dtype=x.dtype).view(x.shape).to(x.device)


def _digest(version: int, head: Mapping[str, Any], tensors: State) -> str:
    digest = hashlib.blake2b(json.dumps([version, head], sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(to_bytes(tensors[name]))
    return digest.hexdigest()
