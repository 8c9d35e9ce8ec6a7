"""What the scale study measures in processes of its own: ``python configs/studies/scale_jobs.py REQUEST ANSWER``.

REQUEST is a JSON file ``{"job": a row of JOBS, …its arguments}``; rank 0 writes what the job returns to ANSWER.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fedmpi import config
from fedmpi.bench import synthetic
from fedmpi.comm import Comm, connect, run_ranks, solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.status import SUMMED
from fedmpi.meet import ways
from fedmpi.method import Compressor
from fedmpi.tasks import data

_STATUS = Path("/proc/self/status")
_BUDGET = 0.5  # seconds of rounds that a point of the grid takes, about


def memory() -> int:
    """Bytes that this process has for itself (RssAnon and RssShmem: no mapped files)."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest :func:`memory` inside, sampled by a thread, as a list's only entry."""
    peak, done = [memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def simulation(comm: Comm, samples: int, **values: Any) -> Simulation:
    """A run on noise, one sample a step, that never evaluates in the rounds that are looked at."""
    common: dict[str, Any] = {
        "data": {"name": synthetic.PATH, "samples": samples},
        "rounds": 1000,
        "evaluate_every": 10_000,
        "local": {"lr": 0.01, "batch": 1, "steps": 1},
        "threads": 1,
    }
    return Simulation(config.parse(common | values).for_ranks(comm.size), comm)


def wire(comm: Comm, cases: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Bytes a round that each rank sends and receives, over ``rounds`` rounds after a first one, of each case."""
    found = []
    for case in cases:
        run = simulation(comm, 4096, **case)
        run.round(0)
        before = comm.sent, comm.received
        lines = [run.round(t + 1) for t in range(rounds)]
        mine = [(now - then) / rounds for now, then in zip((comm.sent, comm.received), before, strict=True)]
        ranks = [json.loads(part) for part in comm.allgather(json.dumps(mine).encode())]
        up, parallel = run.method.up, run.config.mode == "data_parallel"
        passes = len(run.method.passes)
        found.append(
            {
                "sent": [sent for sent, _ in ranks],
                "received": [received for _, received in ranks],
                "message": sum(line["upload_bytes"] / line["clients"] for line in lines) / rounds,
                "clients": lines[-1]["clients"],
                "summed": run.replica.way.sums(up, len(run.replica.way.roster.clients)).total_S.nbytes,
                "status": 8
                * passes
                * (len(SUMMED) + len(run.counters) + 3),  # a pass's counts and three flags
                "way": ways.build(comm, up).name if parallel else "",
                "entry": entry(up),
                "parameters": run.spec.size,
            }
        )
    return found


def entry(up: Compressor) -> int:
    """Bytes of an entry of the array that ranks can merge in parts; 1 where there is none."""
    return up.layout()[up.merge.array].dtype.itemsize if up.merge else 1


def wire_of_ranks(cases: list[dict[str, Any]], rounds: int, threads: int) -> list[dict[str, Any]] | None:
    """:func:`wire` of so many threads, or with 0 of this launch; None on all ranks but the first."""
    if threads:
        return run_ranks(threads, lambda comm: wire(comm, cases, rounds))[0]
    comm = connect()
    found = wire(comm, cases, rounds)
    return found if comm.rank == 0 else None


def start(clients: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Processor seconds and memory of a run of ``clients`` with a sample each: what it takes from the process's start
    to its first round, and a round's."""
    seconds, nbytes, since = {"imports": time.process_time()}, {"imports": memory()}, time.process_time()
    data.load(synthetic.PATH, samples=clients)
    seconds["data"] = time.process_time() - since
    nbytes["data"] = memory() - nbytes["imports"]
    with peak_memory() as peak:
        since = time.process_time()
        run = simulation(solo(), clients, model="linear", clients=clients, cohort=cohort, method="dense")
        seconds["preparation"] = time.process_time() - since
        seconds["first round"], *each = [clock(run, t) for t in range(1 + rounds)]
    nbytes["peak"] = peak[0]
    parameters = run.spec.size
    seconds["round"] = median(each)
    return {
        "clients": clients,
        "cohort": cohort,
        "parameters": parameters,
        "seconds": seconds,
        "bytes": nbytes,
    }


def clock(run: Simulation, t: int) -> float:
    """Processor seconds of round ``t``: of one rank with one thread, which never waits, they are a quiet machine's."""
    since = time.process_time()
    run.round(t)
    return time.process_time() - since


def cost(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds (:func:`clock`) of a round at each point: ``clients``, ``cohort``, ``model`` and ``method``."""
    found = []
    for point in points:
        run = simulation(solo(), point["clients"], **point)
        each = [clock(run, 0)]
        while len(each) < 4 or (len(each) < 50 and sum(each) < _BUDGET):
            each.append(clock(run, len(each)))
        timed = {"seconds": median(each[1:]), "rounds": len(each) - 1}
        found.append({**point, "parameters": run.spec.size, **timed})
    return found


JOBS: dict[str, Callable[..., Any]] = {"wire": wire_of_ranks, "start": start, "cost": cost}


def main(request: str, answer: str) -> None:
    torch.set_num_threads(1)
    arguments = json.loads(Path(request).read_text())
    found = JOBS[arguments.pop("job")](**arguments)
    if found is not None:
        Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
