"""What a server does to a vector, in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmpi.ops.compiled.base import kernel

BLOCK = 1 << 12

Floats = NDArray[np.float32]
Versions = NDArray[np.int32]
Counts = NDArray[np.int64]


@kernel
def mark(
    first: int, last: int, before: Floats, after: Floats, changed: Versions, version: np.int32, out: Versions
) -> None:
    """Blocks ``first`` to ``last``: the version where the two differ, or either is NaN, else what was there."""
    for block in range(first, last):
        a, b = before[block * BLOCK : (block + 1) * BLOCK], after[block * BLOCK : (block + 1) * BLOCK]
        was, now = changed[block * BLOCK : (block + 1) * BLOCK], out[block * BLOCK : (block + 1) * BLOCK]
        for i in range(len(a)):
            yes = np.int32(-(a[i] != b[i]))
            now[i] = (version & yes) | (was[i] & ~yes)


@kernel
def histogram(x: Versions, counts: Counts) -> None:
    """How often each number from 0 on occurs; larger ones count as the last. Runs of equal ones are counted at once."""
    last = len(counts) - 1
    for begin in range(0, len(x), BLOCK):
        part = x[begin : begin + BLOCK]
        first = part[0]
        same = 0
        for i in range(len(part)):
            same += part[i] == first
        if same == len(part):
            counts[min(first, last)] += same
            continue
        for i in range(len(part)):
            counts[min(part[i], last)] += 1
