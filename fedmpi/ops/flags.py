"""Yes or no about numbers on a device, asked late and together: every question makes the host wait.

A flag is a bool where the answer is known, and a 0-d bool tensor on a device that has not been asked yet. ``a & b`` is
a flag for any two.

A check of a message (:func:`refuse`) is a question, too. Within :func:`later` it is noted and not asked, so what
follows it must be safe, though of no use, with a message that will be refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedmpi.ops import fast

Flag = bool | Tensor


class Doubt:
    """A message is to be refused if ``bad``, with the error that ``error`` makes."""

    def __init__(self, bad: Tensor, error: Callable[[], Exception]) -> None:
        self.bad, self.error = bad, error


class _Noted(threading.local):
    doubts: list[Doubt] | None = None


_noted = _Noted()


@contextmanager
def later(doubts: list[Doubt] | None) -> Iterator[None]:
    """In this thread, :func:`refuse` adds what it would have to ask a device to ``doubts``; with None it asks."""
    before, _noted.doubts = _noted.doubts, doubts
    try:
        yield
    finally:
        _noted.doubts = before


def refuse(bad: Flag, error: Callable[[], Exception]) -> None:
    """Raise what ``error`` makes if ``bad``: here, or, where that would make the host wait, later."""
    if _noted.doubts is not None and isinstance(bad, Tensor) and fast.waits(bad):
        _noted.doubts.append(Doubt(bad, error))
    elif bool(bad):
        raise error()


def answers(flags: Sequence[Flag]) -> list[bool]:
    """What they say; a device is asked once for all of them."""
    asked = [isinstance(flag, Tensor) and fast.waits(flag) for flag in flags]
    there = [flag for flag, late in zip(flags, asked, strict=True) if late]
    told = iter(torch.stack(there).tolist() if there else [])  # type: ignore[arg-type]
    return [bool(next(told) if late else flag) for flag, late in zip(flags, asked, strict=True)]


def negated(flag: Flag) -> Flag:
    """The other answer."""
    return ~flag if isinstance(flag, Tensor) else not flag
