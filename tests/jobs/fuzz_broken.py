"""A kind whose inputs go wrong in each way that :mod:`tests.jobs.fuzz` must count."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

from fedmpi.errors import DataError

from .outcomes import Attempt


def prepare(folder: Path) -> Attempt:
    def attempt(rng: random.Random) -> DataError | None:
        way = rng.choice(("taken", "refused", "no words", "crash", "hang", "exit", "traceback"))
        print(f"it is a {way}", flush=True)
        if way == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if way == "exit":
            raise SystemExit(0)
        if way == "hang":
            for _ in itertools.count():
                time.sleep(1)
        if way == "traceback":
            return folder[0]  # type: ignore[index]
        return None if way == "taken" else DataError("a sentence" if way == "refused" else "")

    return attempt
