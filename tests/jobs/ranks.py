"""Starts a Gloo job's ranks as torchrun does, but imports once: ranks.py COUNT MODULES SCRIPT [WORD …] [+ SCRIPT …].

The ranks are forks of this process, made before anything of MODULES (torch and others, with commas) has run, and are
processes as any other: their own sockets, their own interpreter's end. What torchrun does is tried with torchrun.
Scripts run one after the other in the same processes, each with process groups of its own, as after torchrun's restart.
Exits with the first code that is not 0; says all of them.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

GRACE = 30  # seconds from the first rank's failure to the end of those that have not ended by themselves


def scripts(words: list[str]) -> list[list[str]]:
    """Each with its arguments."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            found.append([])
        else:
            found[-1].append(word)
    return found


def start(rank: int, count: int) -> tuple[int, int]:
    """(its process, where to write the store's port); in the rank itself (0, the port)."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        return pid, tell
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: it does not outlive a launcher that was killed
    os.close(tell)
    with os.fdopen(told) as pipe:
        port = pipe.readline().strip()  # not to the end: later ranks hold the other end, too
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    return 0, int(port)


def wait(pids: list[int]) -> list[int]:
    """Their exit codes."""
    codes: dict[int, int] = {}

    def end(*_: object) -> None:
        for pid in pids:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.alarm(GRACE)
    return [codes[pid] for pid in pids]


def main() -> None:
    count, modules = int(sys.argv[1]), sys.argv[2].split(",")
    for module in modules:
        importlib.import_module(module)
    assert threading.active_count() == 1 == len(list(Path("/proc/self/task").iterdir())), (
        "a fork has one thread"
    )
    ranks = []
    for rank in range(count):
        pid, place = start(rank, count)
        if pid == 0:
            for number, words in enumerate(scripts(sys.argv[3:])):
                os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # names its keys in the store
                sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
                runpy.run_path(words[0], run_name="__main__")
            return
        ranks.append((pid, place))
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    for _, place in ranks:
        with os.fdopen(place, "w") as pipe:
            pipe.write(f"{store.port}\n")
    codes = wait([pid for pid, _ in ranks])
    if any(codes):
        print(f"the ranks ended with {codes}", file=sys.stderr)
        sys.exit(next(code if code > 0 else 128 - code for code in codes if code))


if __name__ == "__main__":
    main()
