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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 300.0  # seconds, where nobody says how long; and the least for ranks that are there, but slow
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # which launchers and Slurm send to every process
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_JOBS = (("PMIX_NAMESPACE",), ("SLURM_JOB_ID", "SLURM_STEP_ID"))
_LAUNCHERS = ("prterun", "mpirun", "mpiexec")  # of one job each, unlike the daemons prte and prted


@contextmanager
def guarded(size: int, timeout: float | None) -> Iterator[None]:
    """Within, this process waits for ``size`` ranks to connect. It is ended, with a sentence, if after ``timeout``
    seconds (default: 300) one of them has ended or is stopped, or if after 300 seconds (``timeout``, if that is more)
    they have not connected, whatever holds them up."""
    theirs, ours = os.pipe()  # closed with this process, whatever ends it
    variable = next((name for name in _RANKS if os.environ.get(name, "").isdigit()), "")
    arguments = [str(os.getpid()), str(size), str(timeout or ""), variable, os.environ.get(variable, "")]
    command = [sys.executable, "-I", "-S", __file__, *arguments]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited: it never hears of them
    try:
        process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, env={})
    except OSError:  # no more processes: the launch may go well all the same
        os.close(ours)
        ours, process = -1, None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(theirs)
    try:
        yield
    finally:
        if process is not None:
            os.close(ours)
            process.wait()


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), None)


def _here(environ: Mapping[str, str]) -> int | None:
    """How many of the job's ranks are on this machine, if its launcher says so."""
    said = _first(environ, _LOCAL)
    if said is not None:
        return said
    counts: list[int] = []  # Slurm's "2(x3),1": three nodes of two, one of one
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        if not count.isdigit() or (times and not times.isdigit()):
            return None
        counts += [int(count)] * int(times or 1)
    node = _first(environ, ("SLURM_NODEID",))
    return counts[node] if node is not None and node < len(counts) else None


def _stat(pid: int) -> tuple[str, str, int]:
    """A process's name, its state (T: stopped, Z: ended) and its parent.

    Raises:
      OSError: it is gone.
    """
    name, _, rest = (Path("/proc") / str(pid) / "stat").read_text(errors="replace").rpartition(")")
    state, parent = rest.split()[:2]
    return name.partition("(")[2], state, int(parent)


def _environ(pid: int) -> dict[str, str]:
    """A process's variables.

    Raises:
      OSError: it is gone, or another user's.
    """
    words = (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.partition("=")[::2] for word in words if "=" in word)


def _starter(pid: int, variable: str) -> int:
    """The nearest process above without the ranks' ``variable``: the launcher, which all ranks of this machine are
    below, with a shell between or not.

    Raises:
      OSError: it is not to be seen from here, in a container for instance, and then neither are the other ranks.
    """
    while True:
        try:
            below = variable in _environ(pid)
        except PermissionError:  # Slurm's is root's
            below = False
        if not below:
            return pid
        pid = _stat(pid)[2]


def _siblings(me: int, variable: str) -> tuple[dict[int, dict[int, str]], bool]:
    """The processes of this job's ranks on this machine: for each rank their states by number; and whether these are
    all: a process below the launcher that has written over its variables may be a rank.

    Raises:
      OSError: they are not to be seen from here.
    """
    if Path("/proc/self").readlink().name != str(os.getpid()):
        raise OSError("/proc is another namespace's")
    own, starter = _environ(me), _starter(me, variable)
    if starter == me:
        raise OSError("this process is no rank that others could know")
    job = next((names for names in _JOBS if all(name in own for name in names)), ())
    found: dict[int, dict[int, str]] = {}
    whole = True
    for entry in os.listdir("/proc"):  # noqa: PTH208 (names, not paths)
        if not entry.isdigit():
            continue
        with suppress(OSError, ValueError):
            pid = int(entry)
            _, state, parent = _stat(pid)
            if state in "ZX":
                continue
            environ = _environ(pid)
            rank = _first(environ, (variable,))
            if rank is None:
                whole &= parent != starter or "PATH" in environ
            elif (
                all(environ.get(name) == own[name] for name in job)
                if job
                else _starter(pid, variable) == starter
            ):
                found.setdefault(rank, {})[pid] = state
    return found, whole


def _missing(me: int, size: int, variable: str) -> tuple[str, list[int], int]:
    """Who will not come, as words ("" if nobody is known to), the stopped processes, and the rank that says so."""
    ranks, whole = _siblings(me, variable)
    stopped = {rank: [pid for pid, state in by.items() if state == "T"] for rank, by in ranks.items()}
    said = [f"rank {rank} is stopped" for rank, pids in sorted(stopped.items()) if pids]
    here = _here(_environ(me)) if whole else None
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


def _watch(me: int, size: int, timeout: float | None, variable: str, mine: int) -> None:
    waited = 0.0  # the time in which this process and its rank could run: a job may be suspended
    soon, late = timeout or PATIENCE, max(timeout or 0, PATIENCE)
    stopped: list[int] = []
    who, speaker, seen = "", mine, ""
    while True:
        pause = min(1.0, soon - waited) if waited < soon else 1.0
        _wait(pause)
        if _is_stopped(me):  # with all others, it may be, and does not wait
            seen = ""
            continue
        waited += pause
        if waited < soon:
            continue
        try:
            who, stopped, speaker = _missing(me, size, variable)
        except OSError:  # nobody can be seen: each speaks for itself
            who, stopped, speaker = "", [], mine
        if who and who == seen:  # twice: nobody was only about to end as it should
            break
        if waited >= late:
            break
        seen = who
    if mine != speaker:
        _wait(1.5)
    else:
        what = who or "not all have come, though none of this machine is known to have ended or to be stopped"
        sys.stderr.write(
            f"fedmpi: rank {mine} of {size} has waited for {waited:.0f} s for the ranks to connect: "
            f"{what}; ending all ranks\n"
        )
        sys.stderr.flush()
    victims = [*stopped, me]  # while MPI_Init runs, no handler of Python's does
    with suppress(OSError):
        launcher = _starter(me, variable)
        _end(stopped, signal.SIGKILL)  # or the launcher waits for them
        if mine == speaker and _stat(launcher)[0] in _LAUNCHERS:
            # With ULFM a rank's end is neither the others' nor the job's, which would end with 0.
            _end([launcher], signal.SIGTERM)
            _wait(1)
    _end(victims, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    try:
        return _stat(pid)[1] == "T"
    except OSError:  # no Linux: nobody knows
        return False


def _end(processes: list[int], number: int) -> None:
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


if __name__ == "__main__":
    _me, _size, _timeout, _variable, _rank = sys.argv[1:]
    _watch(int(_me), int(_size), float(_timeout) if _timeout else None, _variable, int(_rank or 0))
