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
