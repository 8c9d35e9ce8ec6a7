"""What a round's time is spent on, as the code that spends it says: ``with phase("encode"):``.

It costs a look at a thread's variable until somebody counts (:mod:`fedmpi.engine.profile`). Seconds belong to the
innermost phase, so that a round's phases, with what is in none ("other"), add up to its wall time.

=========  ============================================================================================
load       samples gathered into batches; clients' state read and written
compute    local training
encode     gradients to messages
wire       inside collectives, waiting for slower ranks included
decode     messages to what is summed
server     adding up, the server's rule, making and applying downloads
evaluate   the test set
other      drawing and placing the cohort, counting bytes
=========  ============================================================================================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from time import perf_counter
from typing import ParamSpec, TypeVar

PHASES = ("load", "compute", "encode", "wire", "decode", "server", "evaluate", "other")
_here = threading.local()  # .clock, while this thread's rank is profiled
_OFF: AbstractContextManager[None] = nullcontext()

P = ParamSpec("P")
T = TypeVar("T")


class Clock:
    """One thread's seconds by phase, each counted once: to the innermost.

    Attributes:
      seconds: by phase; what is counted goes to the mapping that is here at the moment.
      span: what a phase is inside of, too, by its name: for a trace.
    """

    def __init__(self, seconds: dict[str, float], settle: Callable[[], None] = lambda: None) -> None:
        """Args:
        settle: waits for what was launched on a device, so that it counts to the phase that launched it.
        """
        self.seconds, self._settle = seconds, settle
        self.span: Callable[[str], AbstractContextManager[None]] = lambda name: _OFF
        self.running = False
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count this thread's phases."""
        _here.clock = self
        try:
            yield
        finally:
            del _here.clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._lap()
        self._stack.append(name)
        self.running = True
        try:
            with self.span(name):
                yield
        finally:
            self._lap()
            self._stack.pop()
            self.running = bool(self._stack)

    def _lap(self) -> None:
        self._settle()
        now = perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def phase(name: str) -> AbstractContextManager[None]:
    """``with phase("load"):`` counts to that row of :data:`PHASES`, where this thread is in a profiled round."""
    clock: Clock | None = getattr(_here, "clock", None)
    return clock.phase(name) if clock and clock.running else _OFF


def phased(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function all of which is one phase."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def inside(*positional: P.args, **options: P.kwargs) -> T:
            with phase(name):
                return function(*positional, **options)

        return inside

    return decorate
