"""Random numbers that a model draws in training: those of its client and step, whoever trains it.

torch (on each device), NumPy and Python have one generator each for the whole process, and ranks may be threads of
one.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fedmpi.message import CPU

_LOCK = threading.Lock()


@contextmanager
def generators(taken: bool, device: torch.device = CPU) -> Iterator[None]:
    """All of them, with torch's of the ``device``, for this thread alone, where they are ``taken``; in the end they
    stand as before."""
    if not taken:
        yield
        return
    with _LOCK:
        there = None if device == CPU else getattr(torch, device.type)
        own = None if there is None else there.get_rng_state(device)
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            yield
        finally:
            if there is not None:
                there.set_rng_state(own, device)
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])


def seed_all(key: int, device: torch.device = CPU) -> None:
    """Let all of them begin at ``key``, an int64. A device's numbers are others than the CPU's."""
    torch.default_generator.manual_seed(key & (1 << 63) - 1)
    if device.type == "cuda":  # this one's alone
        torch.cuda.default_generators[device.index].manual_seed(key & (1 << 63) - 1)
    elif device != CPU:
        getattr(torch, device.type).manual_seed_all(key & (1 << 63) - 1)
    np.random.seed(key % (1 << 32))  # noqa: NPY002 - the one that a model's forward may draw from
    random.seed(key)
