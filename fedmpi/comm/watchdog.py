"""A thread beside a rank's own that notices when another rank stops answering, and says which.

MPI's blocking calls cannot time out, and a stopped process (SIGSTOP, a swapping or frozen machine) is no failure to
MPI. While the main thread waits, this one asks the others on a communicator of its own whether they are there. A rank
that computes for long answers, and is waited for; one that does not answer ends the run with its name.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

_ASK, _ANSWER = 1, 2
_GRACE = 5.0  # seconds for an answer: a loaded machine may take one or two


class Wait(NamedTuple):
    """What the main thread waits in, and since when."""

    what: str
    since: float


class Watchdog:
    """
    Attributes:
      waiting: set by the main thread around each call that waits for others.
      members: the ranks that are still there, by their numbers in ``world``.
      last_words: what is said after the name of a missing rank (how to go on, say).

    Args:
      world: all ranks; they construct their watchdogs together. MPI must provide THREAD_MULTIPLE.
      timeout: seconds of waiting after which the others are asked.
    """

    def __init__(self, world: MPI.Intracomm, timeout: float) -> None:
        self.waiting: Wait | None = None
        self.members: Sequence[int] = range(world.Get_size())
        self.last_words = ""
        self._comm, self._rank, self._timeout = world.Dup(), world.Get_rank(), timeout
        self._busy_since = time.monotonic()
        self._question = 0
        self._sent: list[MPI.Request] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before MPI ends

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        wait, patience = None, 0.0
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            self._listen()
            if self.waiting is not wait:
                wait, patience = self.waiting, self._timeout
            if wait is not None and time.monotonic() - wait.since > patience:
                self._ask(wait)
                patience = time.monotonic() - wait.since + self._timeout

    def _listen(self) -> dict[int, tuple[int, int]]:
        """Answer what others ask; returns which question of ours they have answered, and for how many seconds each
        has been computing (0: waits itself)."""
        answers = {}
        for rank in self._others():
            try:
                while self._comm.Iprobe(rank, _ASK):
                    question = self._receive(rank, _ASK)[0]
                    wait = self.waiting
                    busy = 0 if wait else 1 + int(time.monotonic() - self._busy_since)
                    self._send(rank, _ANSWER, question, busy)
                while self._comm.Iprobe(rank, _ANSWER):
                    question, busy = self._receive(rank, _ANSWER)
                    answers[rank] = question, busy
            except MPI.Exception:
                continue  # it ended: what waits for it hears of that
        return answers

    def _others(self) -> list[int]:
        return [rank for rank in self.members if rank != self._rank]

    def _receive(self, rank: int, tag: int) -> list[int]:
        numbers = np.empty(2, dtype=np.int64)
        self._comm.Recv(numbers, rank, tag)
        return [int(n) for n in numbers]

    def _send(self, rank: int, tag: int, *numbers: int) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.Isend(np.array([*numbers, 0][:2], dtype=np.int64), rank, tag))

    def _ask(self, wait: Wait) -> None:
        """Ask the others; does not return when one is missing."""
        self._question += 1
        for rank in self._others():
            try:
                self._send(rank, _ASK, self._question)
            except MPI.Exception:
                continue
        busy: dict[int, int] = {}
        end = time.monotonic() + _GRACE
        while missing := [rank for rank in self._others() if rank not in busy]:
            if self.waiting is not wait or self._ended.wait(0.02):
                return
            answers = self._listen()
            busy |= {rank: n for rank, (question, n) in answers.items() if question == self._question}
            if time.monotonic() > end:
                self._give_up(wait, missing)
        if self._rank == min(self.members, key=lambda rank: (busy.get(rank, 0), rank)):
            who = [f"rank {rank} has been computing for {n} s" for rank, n in sorted(busy.items()) if n]
            self._say(wait, ", ".join(who) or "all others wait, too")

    def _give_up(self, wait: Wait, missing: list[int]) -> None:
        present = [rank for rank in self.members if rank not in missing]
        # One speaks for all, and the others only if it does not.
        if self._rank != present[0] and self._ended.wait(3):
            return
        names = f"rank {missing[0]} does" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} do"
        self._say(wait, f"{names} not answer (stopped, or its machine is gone); ending all ranks")
        if self.last_words:
            sys.stderr.write(f"fedmpi: continue with:\n{self.last_words}")
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(1)
        os._exit(1)

    def _say(self, wait: Wait, what: str) -> None:
        seconds = time.monotonic() - wait.since
        sys.stderr.write(
            f"fedmpi: rank {self._rank} of {self._comm.Get_size()} waits for {seconds:.0f} s, {wait.what}: {what}\n"
        )
        sys.stderr.flush()

    def enter(self, what: str) -> None:
        """The main thread begins to wait for others."""
        self.waiting = Wait(what, time.monotonic())

    def leave(self) -> None:
        """It has got what it waited for."""
        self.waiting, self._busy_since = None, time.monotonic()
