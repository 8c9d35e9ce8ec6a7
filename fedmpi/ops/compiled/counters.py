"""Embeddings and sketches that draw their random parts where they use them, so that these take no memory.

The same integers as ``fedmpi.random`` and the same products in the same order as the references; 1024 coordinates
at a time, in loops that compile to vector instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmpi import random
from fedmpi.ops import fast
from fedmpi.ops.compiled.base import kernel

CHUNK = 1 << 10

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Places = NDArray[np.uint64]  # unsigned: an index that may be negative costs a comparison


@kernel
def _word(key: int, i: int, step: int, first: int, second: int) -> int:
    """Word i of a key, by SplitMix64's constants: kept in registers they are, loaded in the loop they are not."""
    x = key + (i + 1) * step
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * first
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * second
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@kernel
def _integers(begin: int, count: int, key: int, high: int, c: Ints, out: Places) -> None:
    """``random.integers``: those of coordinates from ``begin`` on."""
    step, one, two = c[0], c[1], c[2]
    for t in range(count):
        out[t] = (((_word(key, begin + t, step, one, two) >> 32) & 0xFFFFFFFF) * high) >> 32


@kernel
def _coins(begin: int, count: int, key: int, c: Ints, out: Ints) -> None:
    """``random.coins`` as 0 or 1, whole words of them; ``begin`` is a multiple of 64."""
    for t in range(0, count, 64):
        word, part = _word(key, (begin + t) >> 6, c[0], c[1], c[2]), out[t : t + 64]
        for j in range(64):
            part[j] = (word >> j) & 1


@kernel
def _permuted(begin: int, rounds: Ints, place: Ints) -> None:
    """Π of a chunk; ``rounds``: mask, shift, then a multiplier and an offset each."""
    mask, shift = rounds[0], rounds[1]
    for t in range(CHUNK):
        place[t] = begin + t
    for r in range(2, len(rounds), 2):
        multiplier, offset = rounds[r], rounds[r + 1]
        for t in range(CHUNK):
            j = (place[t] * multiplier + offset) & mask
            place[t] = j ^ (j >> shift)


@kernel
def _normals(key: int, place: Ints, table: Ints, c: Ints, words: Ints, mass: Array, out: Floats) -> None:
    """``random.normal`` at a chunk of indices: by exponent and mantissa of an integer turned into a float64."""
    step, one, two = c[0], c[1], c[2]
    for t in range(CHUNK):
        words[t] = _word(key, place[t], step, one, two)
    for t in range(CHUNK):
        mass[t] = np.float64(np.int32(max((words[t] >> 33) & 0x7FFFFFFF, 1)))
    digits = mass.view(np.int64)
    for t in range(CHUNK):
        cell, fraction = np.uint64((digits[t] >> 44) - (1023 << 8)), (digits[t] >> 21) & 0x7FFFFF
        low = table[cell]
        value = (low << 23) + (table[cell + np.uint64(1)] - low) * fraction
        magnitude = np.float64(value >> 12) * 2.0**-41
        out[t] = np.float32(magnitude if words[t] & 1 else -magnitude)


@kernel
def _spread(
    first: int, last: int, small: Floats, key: int, rounds: Ints, table: Ints, c: Ints, out: Floats
) -> None:
    """``Π G`` of the repeated ``small`` (C, M): out (C, N), chunks ``first`` to ``last``."""
    place, words, mass = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.float64)
    weight, mask = np.empty(CHUNK, np.float32), small.shape[1] - 1
    for chunk in range(first, last):
        begin = chunk * CHUNK
        _permuted(begin, rounds, place)
        _normals(key, place, table, c, words, mass, weight)
        for row in range(len(small)):
            source, target = small[row], out[row, begin : begin + CHUNK]
            for t in range(CHUNK):
                target[t] = source[np.uint64(place[t] & mask)] * weight[t]


@kernel
def _gather(
    first: int, last: int, x: Floats, key: int, rounds: Ints, table: Ints, c: Ints, sums: Floats
) -> None:
    """Its adjoint, the blocks ``first`` to ``last`` of x (C, N) each into its own ``sums`` (B, C, M)."""
    place, words, mass = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.float64)
    weight, mask, size = np.empty(CHUNK, np.float32), sums.shape[2] - 1, x.shape[1] // len(sums)
    for block in range(first, last):
        for begin in range(block * size, (block + 1) * size, CHUNK):
            _permuted(begin, rounds, place)
            _normals(key, place, table, c, words, mass, weight)
            for row in range(len(x)):
                source, target = x[row, begin : begin + CHUNK], sums[block, row]
                for t in range(CHUNK):
                    target[np.uint64(place[t] & mask)] += source[t] * weight[t]


@kernel
def _flip(first: int, last: int, x: Floats, key: int, c: Ints, scale: np.float32, out: Floats) -> None:
    """out = ± scale · x with the signs of ``key``, as far as x goes, and 0 beyond; or as far as ``out`` goes."""
    size = min(x.shape[1], out.shape[1])
    coins = np.empty(CHUNK, np.int64)
    for chunk in range(first, last):
        begin = chunk * CHUNK
        count = max(0, min(CHUNK, size - begin))
        _coins(begin, count, key, c, coins)
        for row in range(len(x)):
            source, target = x[row, begin : begin + count], out[row, begin : begin + CHUNK]
            for t in range(count):
                target[t] = source[t] * (scale if coins[t] else -scale)
            for t in range(count, len(target)):
                target[t] = 0


@kernel
def _hashed_lift(
    first: int, last: int, v: Floats, h: int, s: int, c: Ints, factor: np.float32, out: Floats
) -> None:
    """out (C, D): ± v[h(i)] · factor, with buckets and signs of the keys ``h`` and ``s``."""
    place, coins = np.empty(CHUNK, np.uint64), np.empty(CHUNK, np.int64)
    for chunk in range(first, last):
        begin = chunk * CHUNK
        count = min(CHUNK, out.shape[1] - begin)
        _integers(begin, count, h, v.shape[1], c, place)
        _coins(begin, count, s, c, coins)
        for row in range(len(v)):
            source, target = v[row], out[row, begin : begin + count]
            for t in range(count):
                target[t] = source[place[t]] * (factor if coins[t] else -factor)


@kernel
def _hashed_project(
    first: int, last: int, g: Floats, h: int, s: int, c: Ints, size: int, sums: Floats
) -> None:
    """Its adjoint without the factor, blocks of ``size`` coordinates each into its own ``sums`` (B, C, d)."""
    place, coins = np.empty(CHUNK, np.uint64), np.empty(CHUNK, np.int64)
    for block in range(first, last):
        end = min((block + 1) * size, g.shape[1])
        for begin in range(block * size, end, CHUNK):
            count = min(CHUNK, end - begin)
            _integers(begin, count, h, sums.shape[2], c, place)
            _coins(begin, count, s, c, coins)
            for row in range(len(g)):
                source, target = g[row, begin : begin + count], sums[block, row]
                for t in range(count):
                    target[place[t]] += source[t] if coins[t] else -source[t]


@kernel
def sketch_encode(
    first: int, last: int, g: Floats, buckets: Ints, signs: Ints, columns: int, c: Ints, sums: Floats
) -> None:
    """Rows ``first`` to ``last`` of the Count-Sketch: sums (C, R, 2K), positive and negative terms apart."""
    place, coins = np.empty(CHUNK, np.uint64), np.empty(CHUNK, np.int64)
    for r in range(first, last):
        for begin in range(0, g.shape[1], CHUNK):
            count = min(CHUNK, g.shape[1] - begin)
            _integers(begin, count, buckets[r], columns, c, place)
            _coins(begin, count, signs[r], c, coins)
            for row in range(len(g)):
                source, target = g[row, begin : begin + count], sums[row, r]
                for t in range(count):
                    target[np.uint64(2) * place[t] + np.uint64(1 - coins[t])] += source[t]


@kernel
def sketch_estimate(
    first: int, last: int, v: Floats, buckets: Ints, signs: Ints, c: Ints, out: Floats
) -> None:
    """The median of v's rows (C, R, K) at each coordinate: out (C, D), chunks ``first`` to ``last``."""
    rows = v.shape[1]
    place, coins = np.empty((rows, CHUNK), np.uint64), np.empty((rows, CHUNK), np.int64)
    seen = np.empty((rows, CHUNK), np.float32)
    for chunk in range(first, last):
        begin = chunk * CHUNK
        count = min(CHUNK, out.shape[1] - begin)
        for r in range(rows):
            _integers(begin, count, buckets[r], v.shape[2], c, place[r])
            _coins(begin, count, signs[r], c, coins[r])
        for row in range(len(v)):
            for r in range(rows):
                source, target, where, coin = v[row, r], seen[r], place[r], coins[r]
                for t in range(count):
                    value = source[where[t]]
                    target[t] = value if coin[t] else -value
            for turn in range(rows):  # an odd-even transposition sort of rows
                for r in range(turn % 2, rows - 1, 2):
                    low, high = seen[r], seen[r + 1]
                    for t in range(count):
                        a, b = low[t], high[t]
                        less, unordered = a < b, (a != a) | (b != b)
                        low[t] = a + b if unordered else a if less else b
                        high[t] = a + b if unordered else b if less else a
            middle, target = seen[rows // 2], out[row, begin : begin + count]
            if rows % 2:
                for t in range(count):
                    target[t] = middle[t]
            else:
                below = seen[rows // 2 - 1]
                for t in range(count):
                    target[t] = (below[t] + middle[t]) * np.float32(0.5)


def fastfood_spread(small_CM: Tensor, key: int, rounds: Tensor, out_CN: Tensor) -> None:
    """``Π G`` of the repeated ``small``: the key's normals, and the bijection's rounds."""
    drawn = key, rounds.numpy(), random.half_normal_table().numpy(), random.constants().numpy()
    fast.run(_spread, out_CN.shape[1] // CHUNK, small_CM.numpy(), *drawn, out_CN.numpy())


def fastfood_gather(x_CN: Tensor, key: int, rounds: Tensor, sums_BCM: Tensor) -> None:
    """Its adjoint, each block of x into its own sums."""
    drawn = key, rounds.numpy(), random.half_normal_table().numpy(), random.constants().numpy()
    fast.run(_gather, len(sums_BCM), x_CN.numpy(), *drawn, sums_BCM.numpy())


def flip(x_CX: Tensor, key: int, scale: float, out_CY: Tensor) -> None:
    """``out`` = ± scale · x with the signs of ``key``, cut or filled with zeros to its length."""
    chunks = -(-out_CY.shape[1] // CHUNK)
    fast.run(_flip, chunks, x_CX.numpy(), key, random.constants().numpy(), np.float32(scale), out_CY.numpy())


def hashed_lift(v_Cd: Tensor, h: int, s: int, factor: float, out_CD: Tensor) -> None:
    """``out`` = ± v[h(i)] · factor, with buckets and signs of the keys ``h`` and ``s``."""
    drawn = h, s, random.constants().numpy(), np.float32(factor)
    fast.run(_hashed_lift, -(-out_CD.shape[1] // CHUNK), v_Cd.numpy(), *drawn, out_CD.numpy())


def hashed_project(g_CD: Tensor, h: int, s: int, size: int, sums_BCd: Tensor) -> None:
    """Its adjoint without the factor, each block of ``size`` coordinates into its own sums."""
    drawn = h, s, random.constants().numpy(), size
    fast.run(_hashed_project, len(sums_BCd), g_CD.numpy(), *drawn, sums_BCd.numpy())
