"""Random numbers that a model draws in training: those of its client and step, whoever trains it.

torch, NumPy and Python have one generator each for the whole process, and ranks may be threads of one.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_LOCK = threading.Lock()


@contextmanager
def generators(taken: bool) -> Iterator[None]:
    """All three for this thread alone, where they are ``taken``; in the end they stand as before."""
    if not taken:
        yield
        return
    with _LOCK:
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])


def seed_all(key: int) -> None:
    """Let all three begin at ``key``, an int64."""
    torch.default_generator.manual_seed(key & (1 << 63) - 1)
    np.random.seed(key % (1 << 32))  # noqa: NPY002 - the one that a model's forward may draw from
    random.seed(key)
