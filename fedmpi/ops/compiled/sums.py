"""Inner products and fixed-point sums in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.ops.compiled.base import kernel

BLOCK = 1 << 10  # a power of two: products of a block are added up as a tree

Array = NDArray[Any]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@kernel
def fold(x: Doubles) -> float:
    """The sum of a power of two of numbers: the upper half is added to the lower one until one is left."""
    half = len(x) // 2
    while half:
        low, high = x[:half], x[half : 2 * half]
        for i in range(half):
            low[i] += high[i]
        half //= 2
    total: float = x[0]
    return total


@kernel
def _dots(first: int, last: int, v: Floats, w: Floats, out: Doubles) -> None:
    """<v, w>, <v, v> and <w, w> of blocks ``first`` to ``last`` of vectors, the last block filled with zeros."""
    vw, vv, ww = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    for block in range(first, last):
        a, b = v[block * BLOCK : (block + 1) * BLOCK], w[block * BLOCK : (block + 1) * BLOCK]
        for i in range(len(a)):
            x, y = np.float64(a[i]), np.float64(b[i])
            vw[i], vv[i], ww[i] = x * y, x * x, y * y
        for i in range(len(a), BLOCK):
            vw[i], vv[i], ww[i] = 0, 0, 0
        out[0, block], out[1, block], out[2, block] = fold(vw), fold(vv), fold(ww)


@kernel
def _absolute(first: int, last: int, v: Floats, out: Doubles) -> None:
    """Σ|v| of the blocks."""
    room = np.empty(BLOCK, np.float64)
    for block in range(first, last):
        a = v[block * BLOCK : (block + 1) * BLOCK]
        for i in range(len(a)):
            room[i] = abs(np.float64(a[i]))
        for i in range(len(a), BLOCK):
            room[i] = 0
        out[block] = fold(room)


@kernel
def _add_fixed(
    first: int, last: int, v: Array, weight: float, one: float, largest: float, total: Array, fits: Array
) -> None:
    """total += v · weight in multiples of 1 / ``one``, to the nearest, ties to even; a block with a product above
    ``largest``, or NaN, does not ``fit`` and is left out."""
    for block in range(first, last):
        a, sums = v[block * BLOCK : (block + 1) * BLOCK], total[block * BLOCK : (block + 1) * BLOCK]
        outside = 0
        for i in range(len(a)):
            outside += not (abs(np.float64(a[i]) * weight) <= largest)
        fits[block] = outside == 0
        if outside == 0:
            for i in range(len(a)):
                sums[i] += np.int64(np.rint(np.float64(a[i]) * weight * one))


def dots(v_S: Tensor, w_S: Tensor, out_3B: Tensor) -> None:
    """The three products of each block, float64."""
    fast.run(_dots, out_3B.shape[1], v_S.numpy(), w_S.numpy(), out_3B.numpy())


def absolute(v_S: Tensor, out_B: Tensor) -> None:
    """Σ|v| of each block, float64."""
    fast.run(_absolute, len(out_B), v_S.numpy(), out_B.numpy())


def add_fixed(
    total_S: Tensor, v_S: Tensor, weight: float, one: float, largest: float, fits_B: Tensor
) -> None:
    """``fits``: bool of each block."""
    fast.run(_add_fixed, len(fits_B), v_S.numpy(), weight, one, largest, total_S.numpy(), fits_B.numpy())
