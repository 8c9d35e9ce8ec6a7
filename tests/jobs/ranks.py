"""Starts a Gloo job's ranks as torchrun does, but imports once: ranks.py COUNT MODULES SCRIPT [ARGUMENT …].

The ranks are forks of this process, made before anything of MODULES (torch and others, with commas) has run, and are
processes as any other: their own interpreter's end, their own sockets. What torchrun itself does is tried with torchrun.
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
    with open(told, closefd=True) as pipe:
        port = pipe.readline().strip()  # not to the end: later ranks hold the other end, too
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
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
            del sys.argv[:3]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
        ranks.append((pid, place))
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    for _, place in ranks:
        with open(place, "w", closefd=True) as pipe:
            pipe.write(f"{store.port}\n")
    codes = wait([pid for pid, _ in ranks])
    if any(codes):
        print(f"the ranks ended with {codes}", file=sys.stderr)
        sys.exit(next(code if code > 0 else 128 - code for code in codes if code))


if __name__ == "__main__":
    main()
