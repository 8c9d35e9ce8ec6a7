"""Products of a matrix's factors, a row at a time in cache, and orthonormal columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.ops.compiled.base import kernel
from fedmpi.ops.compiled.sums import fold

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@kernel
def product(first: int, last: int, left: Floats, right: Floats, out: Floats) -> None:
    """Rows ``first`` to ``last`` of left · right: (N, R) · (R, M). Terms are added in the order of R, to 0."""
    for n in range(first, last):
        row = out[n]
        for m in range(len(row)):
            row[m] = 0
        for r in range(len(right)):
            factor, column = left[n, r], right[r]
            for m in range(len(row)):
                row[m] += factor * column[m]


@kernel
def subtract(first: int, last: int, left: Floats, right: Floats, out: Floats) -> None:
    """out −= left · right, of whose rows each is made first."""
    row = np.empty(out.shape[1], np.float32)
    for n in range(first, last):
        for m in range(len(row)):
            row[m] = 0
        for r in range(len(right)):
            factor, column = left[n, r], right[r]
            for m in range(len(row)):
                row[m] += factor * column[m]
        target: Any = out[n]
        for m in range(len(row)):
            target[m] -= row[m]


@kernel
def orthonormal(columns: Doubles, room: Doubles, threshold: float) -> None:
    """Gram–Schmidt of R columns (R, N), in place; ``room``: a power of two of numbers, at least N."""
    count, size = columns.shape
    lengths = np.empty(count, np.float64)
    for r in range(count):
        lengths[r] = np.sqrt(_dot(columns[r], columns[r], room))
    for r in range(count):
        column = columns[r]
        length = np.sqrt(_dot(column, column, room))
        keep = length > threshold * lengths[r]
        for n in range(size):
            column[n] = column[n] / length if keep else 0.0
        for other in columns[r + 1 :]:
            factor = _dot(column, other, room)
            for n in range(size):
                other[n] -= column[n] * factor


@kernel
def _dot(a: Doubles, b: Doubles, room: Doubles) -> float:
    for n in range(len(a)):
        room[n] = a[n] * b[n]
    for n in range(len(a), len(room)):
        room[n] = 0
    total: float = fold(room)
    return total
