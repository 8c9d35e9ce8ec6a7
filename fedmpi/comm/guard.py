"""A process beside a rank that waits for the others to connect, and ends it when one of them will never come.

MPI_Init waits for ever for a rank that was killed or stopped before it got there, and holds Python's lock meanwhile, so
that no thread could look after it. This one process does: it looks (where there is a /proc) at the ranks' processes on
this machine, which have their launcher's variables in common. Nothing but the standard library is imported here: it is
also the program that is run.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 300.0  # seconds, where nobody says how long; and the least for ranks that are there, but slow
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_JOBS = (("PMIX_NAMESPACE",), ("SLURM_JOB_ID", "SLURM_STEP_ID"))


@contextmanager
def guarded(size: int, timeout: float | None) -> Iterator[None]:
    """Within, this process waits for ``size`` ranks to connect; after ``timeout`` seconds it is ended, with a sentence,
    if one of them has ended or is stopped."""
    theirs, ours = os.pipe()  # closed with this process, whatever ends it
    arguments = [str(os.getpid()), str(size), str(timeout or "")]
    try:
        process = subprocess.Popen([sys.executable, "-I", "-S", __file__, *arguments], stdin=theirs, env={})
    except OSError:  # no more processes: the launch may go well all the same
        os.close(ours)
        ours, process = -1, None
    os.close(theirs)
    try:
        yield
    finally:
        if process is not None:
            os.close(ours)
            process.wait()


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), None)


def _look(pid: str) -> tuple[dict[str, str], str, int]:
    """A process's variables, its state (T: stopped) and its parent.

    Raises:
      OSError: it is gone, or another user's.
    """
    folder = Path("/proc") / pid
    words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
    return dict(word.partition("=")[::2] for word in words if "=" in word), state, int(parent)


def _starter(pid: int) -> int:
    """The nearest process above that is no rank: MPICH's proxy, which all ranks of this machine are below, with a shell
    between or not.

    Raises:
      OSError: one of them is gone, or another user's.
    """
    while True:
        environ, _, parent = _look(str(pid))
        if "PMI_RANK" not in environ:
            return pid
        pid = parent


def _siblings(me: int) -> dict[int, dict[int, str]]:
    """The processes of this job's ranks on this machine: for each rank their states by number."""
    own, _, _ = _look(str(me))
    job = next((names for names in _JOBS if all(name in own for name in names)), ())
    starter = None if job else _starter(me)
    found: dict[int, dict[int, str]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():  # noqa: PTH112, PTH208 (names, not paths)
        if not entry.isdigit():
            continue
        with suppress(OSError, ValueError):
            environ, state, _ = _look(entry)
            rank = _first(environ, _RANKS)
            if rank is None or state in "ZX":
                continue
            if (
                all(environ.get(name) == own[name] for name in job)
                if job
                else _starter(int(entry)) == starter
            ):
                found.setdefault(rank, {})[int(entry)] = state
    return found


def _missing(me: int, size: int) -> tuple[str, list[int], int]:
    """Who will not come, as words ("" if nobody is known to), the stopped processes, and the rank that says so."""
    ranks = _siblings(me)
    stopped = {rank: [pid for pid, state in by.items() if state in "Tt"] for rank, by in ranks.items()}
    said = [f"rank {rank} is stopped" for rank, pids in sorted(stopped.items()) if pids]
    here = _first(_look(str(me))[0], _LOCAL)
    if here == size:
        said += [f"rank {rank} has ended" for rank in range(size) if rank not in ranks]
    elif here is not None and len(ranks) < here:
        said.append(f"{here - len(ranks)} of this machine's {here} ranks have ended")
    speaker = min((rank for rank in ranks if not stopped[rank]), default=0)
    return ", ".join(said), [pid for pids in stopped.values() for pid in pids], speaker


def _wait(seconds: float) -> None:
    """Ends this process when the rank has connected or ended."""
    if select.select([0], [], [], seconds)[0]:
        os._exit(0)


def _watch(me: int, size: int, timeout: float | None) -> None:
    began = time.monotonic()
    _wait(timeout or PATIENCE)
    stopped: list[int] = []
    who, speaker, seen = "", 0, ""
    while True:
        with suppress(OSError):
            who, stopped, speaker = _missing(me, size)
        if who and who == seen:  # twice: nobody was only about to end as it should
            break
        if timeout is not None and time.monotonic() - began > max(timeout, PATIENCE):
            break
        seen = who
        _wait(1)
    mine = _first(_look(str(me))[0], _RANKS)
    if mine != speaker:
        _wait(1.5)
    elif mine is not None:
        what = who or "not all have come, though none of this machine has ended or is stopped"
        sys.stderr.write(
            f"fedmpi: rank {mine} of {size} has waited for {time.monotonic() - began:.0f} s for the ranks to connect: "
            f"{what}; ending all ranks\n"
        )
        sys.stderr.flush()
    for pid in [*stopped, me]:  # while MPI_Init runs, no handler of Python's does
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if sys.argv[3] else None)
