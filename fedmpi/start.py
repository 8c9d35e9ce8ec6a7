"""From a process's first moments to its run's first round: what a signal says is kept until the run can hear it.

Imported before all that takes time, so it takes none: the standard library's smallest parts only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # the system's end, and Slurm's --signal
_LASTING = ("train", "sweep")  # the commands whose end by a signal means: start again
_asked = False


def _handle(number: int, frame: object) -> None:
    global _asked
    if _asked:  # once more, and the run has not come to where it listens
        os.write(2, b"fedmpi: stopped by a second signal before its first round: start it again\n")
        os._exit(os.EX_TEMPFAIL)
    _asked = True


def _listen() -> list[int]:
    """The signals that are now remembered, and ended this process before."""
    if threading.current_thread() is not threading.main_thread():
        return []
    mine: list[int] = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, _handle)
    return mine


@contextmanager
def remembering(command: str) -> Iterator[None]:
    """Within, a signal is remembered where the command line's ``command`` is one that can go on later."""
    global _asked
    mine = _listen() if command in _LASTING else []
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        if mine:
            _asked = False


def asked() -> bool:
    """A signal has come."""
    return _asked


if any(word in _LASTING for word in sys.argv[1:2]):
    _listen()  # a command line's process, which has not imported anything yet
