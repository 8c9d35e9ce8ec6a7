"""Levels of a bucket's norm in bit planes (QSGD), and codes of a block's scale (block-wise quantisation): drawn,
rounded and packed 1024 numbers at a time, with the reference's operations in the reference's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.ops.compiled.base import kernel
from fedmpi.ops.compiled.bits import _put, _set, _spread
from fedmpi.ops.compiled.counters import _word
from fedmpi.ops.compiled.sums import BLOCK, fold

CHUNK = 1 << 10

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[Any]


@kernel
def _uniforms(begin: int, count: int, key: int, c: Ints, words: Ints, out: Floats) -> None:
    """``random.uniform``: those from ``begin`` on."""
    step, one, two = c[0], c[1], c[2]
    for t in range(count):
        words[t] = _word(key, begin + t, step, one, two)
    for t in range(count):
        out[t] = np.float32((words[t] >> 40) & 0xFFFFFF) * np.float32(2.0**-24)


@kernel
def squares(first: int, last: int, g: Floats, bucket: int, out: Doubles) -> None:
    """Σ g² of the buckets ``first`` to ``last``, of up to ``BLOCK`` numbers each: a tree, as ``sums.dots`` adds up."""
    room = np.empty(BLOCK, np.float64)
    for b in range(first, last):
        part = g[b * bucket : (b + 1) * bucket]
        for i in range(len(part)):
            room[i] = np.float64(part[i]) * np.float64(part[i])
        length = 1
        while length < len(part):
            length *= 2
        for i in range(len(part), length):
            room[i] = 0
        out[b] = fold(room[:length])


@kernel
def largest(first: int, last: int, g: Floats, bucket: int, out: Floats) -> None:
    """max |g| of the buckets."""
    for b in range(first, last):
        part = g[b * bucket : (b + 1) * bucket].view(np.int32)
        most = np.int32(0)
        for i in range(len(part)):  # as integers magnitudes are in the same order
            most = max(most, part[i] & np.int32(0x7FFFFFFF))
        out[b : b + 1].view(np.int32)[0] = most


@kernel
def planes_encode(
    first: int, last: int, g: Floats, norms: Floats, bucket: int, width: int, key: int, c: Ints, out: Bytes
) -> None:
    """Chunks ``first`` to ``last`` of g (D): signs and levels of width − 1 bits as bit planes ``out`` (width, B)."""
    words, u, x = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    level, flag = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)
    levels = np.float32((1 << (width - 1)) - 1)
    for chunk in range(first, last):
        begin = chunk * CHUNK
        count = min(CHUNK, len(g) - begin)
        part = g[begin : begin + count]
        at = 0
        while at < count:  # a bucket after the other
            b = (begin + at) // bucket
            end = min(count, (b + 1) * bucket - begin)
            norm = norms[b] if norms[b] > 0 else np.float32(1)
            source, target = part[at:end], x[at:end]
            for t in range(len(source)):
                target[t] = abs(source[t]) / norm * levels
            at = end
        _uniforms(begin, count, key, c, words, u)
        for t in range(count):
            low = np.floor(x[t])
            level[t] = np.int32(low) + np.int32(u[t] < x[t] - low)
        for plane in range(width):
            if plane == 0:
                for t in range(count):
                    flag[t] = part[t] < 0
            else:
                for t in range(count):
                    flag[t] = level[t] & (1 << (plane - 1))
            for t in range(0, count, 64):
                word, many = np.int64(0), min(64, count - t)
                if many == 64:
                    word = _set(flag, t)
                else:
                    for j in range(many):
                        word |= np.int64(flag[t + j] != 0) << j
                _put(out[plane], (begin + t) >> 3, word, many)


@kernel
def planes_decode(first: int, last: int, planes: Bytes, norms: Floats, bucket: int, out: Floats) -> None:
    """The inverse: out (D)."""
    width = len(planes)
    levels = np.float32((1 << (width - 1)) - 1)
    level, negative, flag = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)
    for chunk in range(first, last):
        begin = chunk * CHUNK
        count = min(CHUNK, len(out) - begin)
        for plane in range(width):
            flags, source = negative if plane == 0 else flag, planes[plane]
            bit = np.uint8(1 if plane == 0 else 1 << (plane - 1))
            for t in range(0, count, 64):
                word, at = np.int64(0), (begin + t) >> 3
                many = min(64, count - t)
                for b in range(8 if many == 64 else (many + 7) // 8):
                    word |= np.int64(source[at + b]) << (8 * b)
                if many == 64:
                    _spread(word, bit, np.uint8(0), flags, t)  # type: ignore[call-arg]
                else:
                    for j in range(many):
                        flags[t + j] = bit if (word >> j) & 1 else np.uint8(0)
            if plane == 1:
                for t in range(count):
                    level[t] = flag[t]
            elif plane:
                for t in range(count):
                    level[t] |= flag[t]
        at = 0
        while at < count:
            b = (begin + at) // bucket
            end = min(count, (b + 1) * bucket - begin)
            norm, target = norms[b], out[begin + at : begin + end]
            some, sign = level[at:end], negative[at:end]
            for t in range(len(target)):
                value = np.float32(some[t]) / levels * norm
                target[t] = -value if sign[t] else value
            at = end


@kernel
def blocks_encode(
    first: int,
    last: int,
    g: Floats,
    block: int,
    table: Floats,
    even: bool,
    draws: bool,
    key: int,
    start: int,
    c: Ints,
    out: Bytes,
) -> None:
    """Blocks ``first`` to ``last`` of g as records ``out`` (N, R); what is missing of the last one is zeros. Codes are
    places in the ``table`` of levels, evenly spaced or not; with ``draws`` rounded by the words from ``start`` on."""
    x, u, words = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.int64)
    code = np.empty(block, np.int32)
    half, most = np.float32(len(table) // 2), np.float32(3.4028234663852886e38)
    for b in range(first, last):
        part, record = g[b * block : (b + 1) * block], out[b]
        for t in range(len(part)):
            value = part[t]
            value = np.float32(0) if value != value else value
            x[t] = min(max(value, -most), most)
        for t in range(len(part), block):
            x[t] = 0
        size = x.view(np.int32)
        largest = np.int32(0)
        for t in range(block):
            largest = max(largest, size[t] & np.int32(0x7FFFFFFF))
        for j in range(4):
            record[j] = (largest >> (8 * j)) & 255
        scale = record[:4].view(np.float32)[0]
        divisor = scale if scale > 0 else np.float32(1)
        for t in range(block):
            x[t] = x[t] / divisor
        if draws:
            _uniforms(start + b * block, block, key, c, words, u)
        if even:
            if draws:
                for t in range(block):
                    y = x[t] * half
                    low = np.floor(y)
                    code[t] = np.int32(low + np.float32(u[t] < y - low) + half)
            else:
                for t in range(block):
                    code[t] = np.int32(np.rint(x[t] * half) + half)
        else:
            for t in range(block):
                code[t] = 0
            for level in range(len(table) - 1):
                if draws:  # the levels that are not above it, but for the first and the last
                    for t in range(block):
                        code[t] += np.int32(level > 0 and table[level] <= x[t])
                else:  # the middles below it
                    middle = (table[level + 1] + table[level]) / np.float32(2)
                    for t in range(block):
                        code[t] += np.int32(middle < x[t])
            if draws:
                for t in range(block):
                    low = table[code[t]]
                    code[t] += np.int32(u[t] < (x[t] - low) / (table[code[t] + 1] - low))
        if len(record) - 4 == block:
            for t in range(block):
                record[4 + t] = code[t]
        else:
            for t in range(block // 2):
                record[4 + t] = code[2 * t] | (code[2 * t + 1] << 4)


@kernel
def blocks_decode(
    first: int, last: int, records: Bytes, block: int, table: Floats, out: Floats, bad: Flags
) -> None:
    """The inverse, as far as out goes. ``bad[0]`` becomes 1 if a scale is no magnitude, or a code has no level."""
    code = np.empty(block, np.uint8)
    most = np.float32(3.4028234663852886e38)
    for b in range(first, last):
        record, target = records[b], out[b * block : (b + 1) * block]
        scale = record[:4].copy().view(np.float32)[0]
        if len(record) - 4 == block:
            for t in range(block):
                code[t] = record[4 + t]
        else:
            for t in range(block // 2):
                code[2 * t] = record[4 + t] & 15
                code[2 * t + 1] = record[4 + t] >> 4
        highest = np.uint8(0)
        for t in range(block):
            highest = max(highest, code[t])
        if not (scale >= 0 and scale <= most) or highest >= len(table):
            bad[0] = 1
            continue
        for t in range(len(target)):
            target[t] = table[code[t]] * scale
