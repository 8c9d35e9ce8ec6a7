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
def _row(left: Floats, right: Floats, row: Floats) -> None:
    """row = Σ_r left[r] · right[r], terms added in the order of r to 0; two in a sweep."""
    factor, column = left[0], right[0]
    for m in range(len(row)):
        row[m] = np.float32(0) + factor * column[m]
    r = 1
    while r + 1 < len(left):
        a, x, b, y = left[r], right[r], left[r + 1], right[r + 1]
        for m in range(len(row)):
            row[m] = (row[m] + a * x[m]) + b * y[m]
        r += 2
    if r < len(left):
        factor, column = left[r], right[r]
        for m in range(len(row)):
            row[m] += factor * column[m]


@kernel
def product(first: int, last: int, left: Floats, right: Floats, out: Floats) -> None:
    """Rows ``first`` to ``last`` of left · right: (N, R) · (R, M)."""
    for n in range(first, last):
        _row(left[n], right, out[n])


@kernel
def subtract(first: int, last: int, left: Floats, right: Floats, out: Floats) -> None:
    """out −= left · right."""
    row = np.empty(out.shape[1], np.float32)
    for n in range(first, last):
        _row(left[n], right, row)
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
