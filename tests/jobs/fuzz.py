"""Feeds damaged inputs of every kind to what reads them: ``python tests/jobs/fuzz.py [KIND ...] [--n N] [--seed S]``.

Prints a line a kind: how many were tried, refused by a named error, rightly accepted, and wrong (a traceback, a crash,
a hang, or accepted though it is not what was meant), then each that was wrong, with the command that tries it again.
Exit code 1 if any was. Inputs run in a process of their own kind, so that a crash or a hang is counted, too; the inputs
after it go on in another process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from tests.jobs.outcomes import Outcome, judge  # noqa: E402 (a script's own folder is no package)

KINDS = ("messages", "downloads", "checkpoints", "configs", "data", "states")
FULL = {"messages": 75_000}  # inputs of a kind that costs little; of the others:
EACH = 5_000
ROOM = 4 << 30  # bytes that a process may take beyond what it has; kinds may allow less
PATIENCE_S = 120.0  # for one input
START_S = 600.0  # for a process's imports and its valid inputs


def inputs(kind: str) -> int:
    """How many inputs of a kind the full test tries."""
    return FULL.get(kind, EACH)


def limit_memory(room: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def child(kind: str, n: int, seed: int, first: int, out: int) -> None:
    """Tries inputs and writes a line of JSON on the descriptor ``out`` when it is ready and after each."""
    with os.fdopen(out, "w") as lines, tempfile.TemporaryDirectory() as folder:
        module = importlib.import_module(f"tests.jobs.fuzz_{kind}")
        attempt = module.prepare(Path(folder))
        limit_memory(getattr(module, "ROOM", ROOM))
        print("[]", file=lines, flush=True)
        for number in range(first, first + n):
            print(json.dumps(judge(attempt, seed, number)), file=lines, flush=True)


def apart(kind: str, n: int, seed: int, first: int = 0, patience_s: float = PATIENCE_S) -> Outcome:
    """``n`` inputs from number ``first`` on, in other processes.

    Raises:
      RuntimeError: a process ended before its first input.
    """
    outcome, end = Outcome(), first + n
    while (number := first + outcome.tried) < end:
        reading, writing = os.pipe()
        words = ("--child", str(writing), kind, "--n", str(end - number), "--seed", str(seed), "--first")
        with tempfile.TemporaryFile() as said, os.fdopen(reading, "rb", 0) as lines:
            process = subprocess.Popen(
                [sys.executable, __file__, *words, str(number)],
                pass_fds=(writing,),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            os.close(writing)
            how = _collect(lines, outcome, patience_s)
            process.kill() if how == "hang" else None
            code = process.wait()
            said.seek(0)
            last = said.read()[-1500:].decode(errors="replace").strip()
        if how == "nothing":
            raise RuntimeError(f"{kind}: the process ended with {code} before its first input: {last}")
        if (number := first + outcome.tried) < end:
            why = (
                f"no end after {patience_s:.0f} s"
                if how == "hang"
                else f"the process ended with {code}: {last}"
            )
            outcome.add("wrong", f"input {number} of seed {seed}: {why}")
    return outcome


def _collect(lines: object, outcome: Outcome, patience_s: float) -> str:
    """Reads verdicts until the other end closes (``end``; ``nothing`` if no line came) or says no more (``hang``)."""
    rest, ready = b"", False
    while True:
        if not select.select([lines], [], [], patience_s if ready else START_S)[0]:
            return "hang" if ready else "nothing"
        chunk = lines.read(1 << 16)  # type: ignore[attr-defined]
        if not chunk:
            return "end" if ready else "nothing"
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if ready:
                outcome.add(*json.loads(line))
            ready = True


def row(kind: object, *columns: object) -> str:
    return f"{kind!s:<12}" + "".join(f"{column!s:>14}" for column in columns)


def main() -> int:
    parser = argparse.ArgumentParser(description="damaged inputs of every kind")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument(
        "--n", type=int, help=f"inputs of each kind; default: {EACH}, of messages {FULL['messages']}"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        child(asked.kinds[0], asked.n, asked.seed, asked.first, asked.child)
        return 0
    if strange := set(asked.kinds) - set(KINDS):
        parser.error(f"KIND: expected some of {', '.join(KINDS)}, got {', '.join(sorted(strange))}")
    wrong = []
    print(row("kind", "tried", "named error", "accepted", "wrong", "inputs/s"), flush=True)
    for kind in asked.kinds or KINDS:
        begun = time.monotonic()
        outcome = apart(kind, asked.n or inputs(kind), asked.seed, asked.first)
        rate = outcome.tried / (time.monotonic() - begun)
        counts = outcome.tried, outcome.refused, outcome.taken, len(outcome.wrong)
        print(row(kind, *counts, f"{rate:.0f}"), flush=True)
        wrong += [(kind, why) for why in outcome.wrong]
    for kind, why in wrong:
        number = why.split()[1]
        print(
            f"\n{kind}, {why}\n  python tests/jobs/fuzz.py {kind} --n 1 --seed {asked.seed} --first {number}"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
