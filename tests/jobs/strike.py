"""``fedmpi train`` on every rank, one of which is struck: ``strike.py 'RANK HOW WHERE ROUND' ARGUMENTS``.

HOW is a signal's name, "exception" (a bug), "nan" (its data is not a number from here on) or "full" (the disk of the
run's folder). WHERE is "prepare" (ROUND is -1), "before" (the round, between two), "compress" (in the middle of its
clients' messages), "collective" (the others wait for it there), "save" (while a checkpoint is written) or "moment"
(ROUND is 7.3: in round 7, when three tenths of a mean round's time are over). The rank writes the time of the strike
into the file $STRUCK. RANK may be a list with commas: each is struck. At the end of a run the ranks check that they
hold the same parameters, and that what rank 0 keeps of clients is what they believe.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runs import both_ends_agree

from fedmpi.cli import main
from fedmpi.comm import Comm
from fedmpi.engine import run
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.passes import Passes
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.status import Status

ranks, how, where, at = sys.argv[1].split()
now, struck, started = -1, False, 0.0


def strike(place: str, comm: Comm, simulation: Simulation | None = None) -> None:
    global struck
    here = place == where and str(comm.members[comm.rank]) in ranks.split(",")
    # A moment may slip into the next round.
    if struck or not here or now < float(at) // 1 or (now > float(at) and place != "moment"):
        return
    struck = True
    Path(os.environ["STRUCK"]).write_text(str(time.time()))
    if how == "exception":
        raise ZeroDivisionError("a bug")
    if how == "nan":
        assert simulation is not None
        simulation.data.train.x.fill_(float("nan"))
    elif how == "full":
        folder = Path(sys.argv[sys.argv.index("--out") + 1])
        with (folder.parent / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return
    else:
        os.kill(os.getpid(), getattr(signal, how))


handshake = run.handshake
sends = {name: getattr(Passes, name) for name in ("_send", "_send_sum")}
original = Simulation.round, run.summary, Status.collect, Checkpoints._write_store


def prepare(comm: Comm, *arguments: Any) -> None:
    strike("prepare", comm)
    handshake(comm, *arguments)


def round(self: Simulation, t: int) -> dict[str, Any]:
    global now, started
    now, started = t, started or time.monotonic()
    strike("before", self.comm, self)
    if where == "moment" and t == int(float(at)):
        mean = (time.monotonic() - started) / t if t else 0.0
        threading.Timer(float(at) % 1 * mean, strike, ["moment", self.comm]).start()
    return original[0](self, t)


def send(name: str) -> Any:
    def struck_after(self: Passes, *arguments: Any) -> Any:
        sent = sends[name](self, *arguments)
        strike("compress", self.comm)
        return sent

    return struck_after


def collect(self: Status, comm: Any, asks: Any) -> bool:
    if where == "collective" and str(comm.members[comm.rank]) in ranks.split(","):
        time.sleep(0.2)
        strike("collective", comm)
    return original[2](self, comm, asks)


def write(self: Checkpoints, *arguments: Any) -> Any:
    strike("save", self.comm)
    return original[3](self, *arguments)


def summary(of: Simulation, *rest: Any) -> dict[str, Any]:
    digest = hashlib.sha256(of.replica.parameters().numpy().tobytes()).digest()
    assert len(set(of.comm.allgather(digest))) == 1, "ranks hold different parameters"
    both_ends_agree(of)
    return original[1](of, *rest)


run.handshake = prepare
Simulation.round = round  # type: ignore[method-assign]
for name in sends:
    setattr(Passes, name, send(name))
Status.collect = collect  # type: ignore[method-assign]
Checkpoints._write_store = write  # type: ignore[method-assign]
run.summary = summary
sys.exit(main(["train", *sys.argv[2:]]))
