"""``fedmpi train`` on every rank, one of which is struck: ``strike.py 'RANK HOW WHERE ROUND' ARGUMENTS``.

HOW is a signal's name or "exception"; WHERE is "before" (the round, between two), "compress" (in the middle of its
clients' messages), "collective" (with the others already in it) or "save" (while a checkpoint is written). The rank
writes the time of the strike into the file STRUCK, where that variable names one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fedmpi.cli import main
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.rounds import Simulation, _Status

rank, how, where, at = sys.argv[1].split()
now = -1


def strike(place: str, me: int) -> None:
    if (place, me, now) != (where, int(rank), int(at)) or struck:
        return
    struck.append(now)
    if name := os.environ.get("STRUCK"):
        Path(name).write_text(str(time.time()))
    if how == "exception":
        raise ZeroDivisionError("a bug")
    os.kill(os.getpid(), getattr(signal, how))


struck: list[int] = []
round_, send, collect, write = Simulation.round, Simulation._send, _Status.collect, Checkpoints._write_store


def round(self: Simulation, t: int) -> dict[str, Any]:
    global now
    now = t
    strike("before", self.comm.members[self.comm.rank])
    return round_(self, t)


def _send(self: Simulation, *arguments: Any) -> None:
    send(self, *arguments)
    strike("compress", self.comm.members[self.comm.rank])


def _collect(self: _Status, comm: Any, asks: Any) -> bool:
    if comm.members[comm.rank] == int(rank):
        time.sleep(0.2)
        strike("collective", comm.members[comm.rank])
    return collect(self, comm, asks)


def _write(self: Checkpoints, *arguments: Any) -> Any:
    strike("save", self.comm.members[self.comm.rank])
    return write(self, *arguments)


Simulation.round = round  # type: ignore[method-assign]
Simulation._send = _send  # type: ignore[method-assign]
_Status.collect = _collect  # type: ignore[method-assign]
Checkpoints._write_store = _write  # type: ignore[method-assign]
sys.exit(main(["train", *sys.argv[2:]]))
