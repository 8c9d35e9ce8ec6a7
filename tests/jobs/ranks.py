"""Starts a Gloo job's ranks as torchrun does, but imports once: ranks.py COUNT MODULES SCRIPT [WORD …] [+ SCRIPT …].

The ranks are forks of this process, made before anything of MODULES (torch and others, with commas) has run, and are
processes as any other: their own sockets, their own interpreter's end. What torchrun does is tried with torchrun.
Each script has ranks of its own, when those before have ended. The exit code is the first that is not 0; says all.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import sys
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
    """(its process, or 0 in it; where to write the store's port)."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        return pid, tell
    # PR_SET_PDEATHSIG: a rank does not outlive a launcher that was killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
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
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return 0, tell


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
    signal.alarm(0)
    return [codes[pid] for pid in pids]


def run(count: int, words: list[str]) -> bool:
    """Whether this is the process that started them, in which they have all ended well."""
    tasks = len(list(Path("/proc/self/task").iterdir()))
    assert tasks == 1, f"{tasks} threads: a fork would have one of them"
    ranks = []
    for rank in range(count):
        pid, place = start(rank, count)
        if pid == 0:
            sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
            return False
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
    return True


def main() -> None:
    count = int(sys.argv[1])
    os.environ["JE_ARROW_MALLOC_CONF"] = (
        "background_thread:false"  # pandas imports pyarrow, which would start one
    )
    for module in sys.argv[2].split(","):
        importlib.import_module(module)
    for words in scripts(sys.argv[3:]):
        if not run(count, words):
            return


if __name__ == "__main__":
    main()
