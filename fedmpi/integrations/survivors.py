"""Local updates under an MPI whose ranks survive each other (``mpirun --with-ft ulfm``): the others go on with fewer.

A synchronisation is averaged tentatively; then all agree that all are still there, and only then it counts, on all
ranks. Where one ended, those who are left meet, take back what they had changed and average once more what they have
computed: lost are the steps of the rank that ended, and what it kept.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from typing import Any

from fedmpi.comm.base import LostError
from fedmpi.errors import ConfigError
from fedmpi.integrations.fragments import Fragment
from fedmpi.integrations.say import say
from fedmpi.integrations.tentative import Job, average, keep, put_back, take_in


class Survivors:
    """One rank's part."""

    def __init__(self, local: Job) -> None:
        self._local = weakref.proxy(local)
        self._moved = False
        self.left = 0

    def stats(self) -> dict[str, Any]:
        """``left``: ranks that ended."""
        return {"ranks": self._local.comm.size, "left": self.left}

    def close(self) -> None:
        """Nothing is open."""

    def refuse_state(self) -> None:
        """A state may be loaded at any time."""

    def synchronize(self, fragments: Sequence[Fragment], averaging: bool, begins: bool) -> bool:
        """As :meth:`fedmpi.integrations.elastic.Elastic.synchronize`.

        Raises:
          ConfigError: on all ranks: they synchronise after different steps.
        """
        local = self._local
        while True:
            kept = [keep(fragment) for fragment in local.fragments]
            try:
                if self._moved:
                    for fragment in local.fragments:
                        fragment.move(local.comm)
                    self._moved = False
                self._check_places(fragments, averaging)
                outcomes = [average(fragment, local.step) for fragment in fragments]
                local.comm.settle()
                break
            except LostError as error:
                for fragment, before in zip(local.fragments, kept, strict=True):
                    put_back(fragment, before)
                self._meet(error)
        take_in(local, fragments, outcomes, averaging)
        return begins

    def _meet(self, error: LostError) -> None:
        comm, before = self._local.comm, self._local.comm.members
        while True:
            try:
                comm.shrink()
                break
            except LostError:
                continue  # one more ended
        gone = [str(rank) for rank in before if rank not in comm.members]
        self._moved, self.left = True, self.left + len(gone)
        who = f"rank {', '.join(gone)} was lost" if gone else str(error)
        say(comm.rank, f"local_sgd: {who} after step {self._local.step}; {comm.size} ranks go on")

    def _check_places(self, fragments: Sequence[Fragment], averaging: bool) -> None:
        local = self._local
        here = [local.step, local.length, [local.fragments.index(each) for each in fragments], averaging]
        told = [json.loads(each) for each in local.comm.allgather(json.dumps(here).encode())]
        if any(there != told[0] for there in told):
            raise ConfigError(
                "local_sgd: expected all ranks to synchronise after the same step, with the same every, got steps "
                f"{', '.join(str(step) for step, *_ in told)} and every {', '.join(str(n) for _, n, *_ in told)}"
            )
