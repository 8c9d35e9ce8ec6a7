"""Finding the few large numbers of a vector."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.ops.compiled.base import kernel

_BLOCK, _STEP = 1 << 14, 64
_MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: as integers they are in the order of the magnitudes, NaN last

Words = NDArray[np.int32]
Indices = NDArray[np.int64]


@kernel
def _count(first: int, last: int, x: Words, threshold: np.int32, counts: Indices) -> None:
    """How many magnitudes of each block reach the threshold."""
    for block in range(first, last):
        part = x[block * _BLOCK : (block + 1) * _BLOCK]
        count = 0
        for i in range(len(part)):
            count += (part[i] & _MAGNITUDE) >= threshold
        counts[block] = count


@kernel
def _collect(first: int, last: int, x: Words, threshold: np.int32, ends: Indices, out: Indices) -> None:
    """Where they are; block b's go before ``ends[b]``."""
    for block in range(first, last):
        at = 0 if block == 0 else ends[block - 1]
        if at == ends[block]:
            continue
        for begin in range(block * _BLOCK, min((block + 1) * _BLOCK, len(x)), _STEP):
            part = x[begin : begin + _STEP]
            some = False
            for i in range(len(part)):
                some |= (part[i] & _MAGNITUDE) >= threshold
            if some:
                for i in range(len(part)):
                    if (part[i] & _MAGNITUDE) >= threshold:
                        out[at] = begin + i
                        at += 1


def reach(x_D: Tensor, threshold: float, least: int, most: int) -> Tensor | None:
    """The indices, increasing, of float32 numbers whose magnitude is at least ``threshold``, and of NaN; None where
    they are fewer than ``least`` or more than ``most``."""
    x = x_D.numpy().view(np.int32)
    bits = np.float32(threshold).view(np.int32)
    counts = np.empty(-(-len(x) // _BLOCK), np.int64)
    fast.run(_count, len(counts), x, bits, counts)
    ends = counts.cumsum()
    if not least <= ends[-1] <= most:
        return None
    out = np.empty(ends[-1], np.int64)
    fast.run(_collect, len(counts), x, bits, ends, out)
    return torch.from_numpy(out)


@kernel
def _tally(x: Words, shift: int, above: int, counts: Indices) -> None:
    """How often each value of the bits from ``shift`` on occurs, as many as there are counts, of magnitudes whose bits
    above these are ``above``. Four tallies, lest equal neighbours wait for each other."""
    mask, wide = len(counts) - 1, shift
    size = len(counts)
    while size > 1:
        size //= 2
        wide += 1
    tallies = np.zeros((4, len(counts)), np.int64)
    for i in range(len(x)):
        word = x[i] & _MAGNITUDE
        if word >> wide == above:
            tallies[i & 3, (word >> shift) & mask] += 1
    for t in range(4):
        for j in range(len(counts)):
            counts[j] += tallies[t, j]


def kth(x_D: Tensor, k: int) -> float:
    """The k-th largest magnitude of float32 numbers, none of which is NaN: by its bits, from the highest on."""
    x = x_D.numpy().view(np.int32)
    above, left = 0, k
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        counts = np.zeros(1 << bits, np.int64)
        _tally(x, shift, above, counts)
        later = counts[::-1].cumsum()[::-1]
        value = int((later >= left).nonzero()[0][-1])
        left -= int(later[value] - counts[value])
        above = (above << bits) | value
    return float(np.int32(above).view(np.float32))
