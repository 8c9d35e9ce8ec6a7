"""Where the time of rounds goes: ``fedmpi train --profile``. Counts the phases of :mod:`fedmpi.phases`, and traces some
rounds.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import record_function

from fedmpi.comm.base import Comm, together
from fedmpi.engine.device import synchronize
from fedmpi.engine.record import write_aside, writing
from fedmpi.errors import Stopped
from fedmpi.phases import PHASES, Clock

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation

# Rounds of this process, from 0. The first one does what is done once (compiling, caches).
TRACED = range(1, 4)
APART = range(1, 5)  # slower: these, and the one in which ranks wait for those that end tracing

Seconds = dict[str, float]


class Profile:
    """One rank's profile of the rounds that are left.

    Attributes:
      rounds: how many were done.
      seconds: of all rounds but those of :data:`APART`, by phase.
      apart: of those.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.rounds = simulation, 0
        self.seconds, self.apart = (dict.fromkeys(PHASES, 0.0) for _ in range(2))
        self._clock = Clock(self.seconds, partial(synchronize, simulation.place.device))
        self._trace: torch.profiler.profile | None = None
        self._tracing = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count the simulation's rounds for as long."""
        self.simulation.around = self._round
        try:
            with self._clock.on():
                yield
        finally:
            self._stop()
            self.simulation.around = nullcontext

    @contextmanager
    def _round(self) -> Iterator[None]:
        if self.rounds == TRACED.start:
            self._start()
        if self.rounds == TRACED.stop:
            self._stop()
        self._clock.seconds = self.apart if self.rounds in APART else self.seconds
        with self._clock.phase("other"):
            yield
        self.rounds += 1

    def _start(self) -> None:
        self._clock.span = record_function
        if threading.current_thread() is not threading.main_thread():
            return  # one profiler serves all threads of a process
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on stderr that it starts
        config = _ExperimentalConfig(profile_all_threads=True)
        self._trace = torch.profiler.profile(experimental_config=config)
        self._trace.start()
        self._tracing = True

    def _stop(self) -> None:
        if self._trace is not None and self._tracing:
            self._trace.stop()
        self._tracing, self._clock.span = False, lambda name: nullcontext()

    def events(self) -> bytes:
        """Torch's trace of this process as JSON, of the rank that is its main thread."""
        if self._trace is None:
            return b"[]"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._trace.export_chrome_trace(str(path))
            return _of_process(json.loads(path.read_text()), self.simulation.comm)

    def counted(self) -> tuple[list[int], Seconds]:
        """Rounds of this process, and their seconds: without those apart, unless there are hardly any others."""
        every = range(self.rounds)
        if self.rounds > APART.stop:
            return [n for n in every if n not in APART], self.seconds
        return list(every), {name: self.seconds[name] + self.apart[name] for name in PHASES}


@contextmanager
def profiling(
    simulation: Simulation, done: int, folder: Path | None, say: Callable[[str], None]
) -> Iterator[None]:
    """Profile the rounds from ``done`` on that are done inside, on every rank together. Then rank 0 writes
    ``profile.json`` and ``trace.json.gz`` (for ui.perfetto.dev or chrome://tracing) into ``folder``, and says the
    table; of a run that a signal stopped, too.

    Raises:
      ConfigError: the folder cannot be written to.
    """
    profile, stopped = Profile(simulation), None
    try:
        with profile.on():
            yield
    except Stopped as error:
        stopped = error
    comm, (counted, seconds) = simulation.comm, profile.counted()
    ranks = [json.loads(part) for part in comm.gather(json.dumps(seconds).encode())]
    events = comm.gather(gzip.compress(profile.events()) if folder else b"")
    with together(comm, "writing the profile"):
        if comm.rank == 0:
            traced = [done + n for n in TRACED if n < profile.rounds]
            if folder:
                report = {"rounds": [done + n for n in counted], "traced": traced, "seconds": ranks}
                _write(folder, report, events)
            say(table(len(counted), ranks))
            left = len(counted) < profile.rounds
            say(
                f"rounds {done + APART[0]} to {done + APART[-1]} were traced and are left out" if left else ""
            )
    if stopped:
        raise stopped


def _write(folder: Path, report: dict[str, Any], traces: list[bytes]) -> None:
    events = [event for trace in traces for event in json.loads(gzip.decompress(trace))]
    whole = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
    with writing(folder, "--profile"):
        write_aside(folder / "profile.json", (json.dumps(report) + "\n").encode())
        write_aside(folder / "trace.json.gz", gzip.compress(whole.encode()))


def table(rounds: int, ranks: list[Seconds]) -> str:
    """Milliseconds of a round: rank 0's with their share, and of several ranks the mean and the largest."""
    head = ["ms a round", "rank 0", "share"] + (["mean", "max", "of rank"] if len(ranks) > 1 else [])
    totals = [{**rank, "all": sum(rank.values())} for rank in ranks]
    lines = [head]
    for name in (*PHASES, "all"):
        ms = [1e3 * rank[name] / max(rounds, 1) for rank in totals]
        line = [name, f"{ms[0]:.2f}", f"{100 * totals[0][name] / max(totals[0]['all'], 1e-9):.1f} %"]
        if len(ranks) > 1:
            line += [f"{sum(ms) / len(ms):.2f}", f"{max(ms):.2f}", str(ms.index(max(ms)))]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )


def _of_process(trace: dict[str, Any], comm: Comm) -> bytes:
    """What happened in this process, as JSON: that of the rank, or of all where they are threads."""
    events = [{**event, "pid": comm.rank} for event in trace["traceEvents"] if event["pid"] == os.getpid()]
    for event in events:
        if event["name"] == "process_name":
            event["args"] = {"name": "all ranks" if comm.name == "threads" else f"rank {comm.rank}"}
    return json.dumps(events).encode()
