"""What comes of damaged inputs, alike for every kind of them.

A kind is a module with ``prepare(folder) -> attempt``. An attempt makes an input from a generator of random numbers and
gives it to what must read it: it returns the error with which it was refused, or None when it was accepted and is what
was meant. Anything that it raises is wrong: a traceback, or an AssertionError for what should not have been accepted.
"""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedmpi.errors import FedMPIError

Attempt = Callable[[random.Random], "FedMPIError | None"]
LONGEST = 2_000  # characters of an error that a user can still read


class Kind(Protocol):
    def prepare(self, folder: Path) -> Attempt: ...


@dataclass
class Outcome:
    """How many inputs were refused by a named error, how many rightly accepted, and what went wrong with the others."""

    refused: int = 0
    taken: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.refused + self.taken + len(self.wrong)

    def add(self, verdict: str, why: str) -> None:
        if verdict == "wrong":
            self.wrong.append(why)
        else:
            setattr(self, verdict, getattr(self, verdict) + 1)


def of_frame(name: str, frame: bytes, receive: Callable[[bytes], FedMPIError | None]) -> FedMPIError | None:
    """The error with which a frame was refused, or None.

    Raises:
      AssertionError: anything else that was raised, with whose frame it was and how it began.
    """
    try:
        return receive(frame)
    except BaseException as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}; {frame.hex()[:300]}") from error


def judge(attempt: Attempt, seed: int, number: int) -> tuple[str, str]:
    """The verdict on one input (``refused``, ``taken`` or ``wrong``), and why; each has random numbers of its own, so
    that it can be tried again alone."""
    try:
        error = attempt(random.Random(f"{seed} {number}"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as raised:  # extensions in other languages raise what is no Exception
        at = traceback.extract_tb(raised.__traceback__)[-1]
        why = f"{type(raised).__name__}: {str(raised)[:700]} ({Path(at.filename).name}:{at.lineno})"
        return "wrong", f"input {number} of seed {seed}: {why}"
    if error is None:
        return "taken", ""
    said = str(error)
    if not 0 < len(said) < LONGEST:
        return "wrong", f"input {number} of seed {seed}: an error of {len(said)} characters: {said[:300]}"
    return "refused", ""


def fuzz(kind: Kind, n: int, seed: int, first: int = 0) -> Outcome:
    """``n`` inputs from number ``first`` on, in this process."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        attempt = kind.prepare(Path(folder))
        for number in range(first, first + n):
            outcome.add(*judge(attempt, seed, number))
    return outcome
