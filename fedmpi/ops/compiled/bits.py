"""Packing by comparing 64 numbers at a time, and votes counted in bit planes.

A comparison of LLVM vectors is a mask, whose bits are the packed bits; a select by such a mask unpacks. Works on
words of 64 bits of a row, the last one of which may be short.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.ops.compiled.base import kernel

_WORD, _INT64 = 64, ir.IntType(64)
_MASK = ir.VectorType(ir.IntType(1), _WORD)
_BYTES = 1 << 12  # of a row, whose vote is taken in cache

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


def _place(context: Any, builder: Any, signature: Any, arguments: Any, which: int) -> tuple[Any, Any]:
    """Where 64 numbers of array ``which`` begin at the index that follows it, and their vector type."""
    array = context.make_array(signature.args[which])(context, builder, arguments[which])
    kind = ir.VectorType(context.get_data_type(signature.args[which].dtype), _WORD)
    return builder.bitcast(builder.gep(array.data, [arguments[which + 1]]), kind.as_pointer()), kind


def _compare(test: str) -> Any:
    """mask(x, i): the int64 whose bit j says whether x[i + j] is ``test`` than, or as, 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, kind = _place(context, builder, signature, arguments, 0)
        x, zeros = builder.load(place, align=1), ir.Constant(kind, None)
        real = isinstance(kind.element, ir.FloatType)
        mask = builder.fcmp_ordered(test, x, zeros) if real else builder.icmp_signed(test, x, zeros)
        return builder.bitcast(mask, _INT64)

    @intrinsic
    def compare(typing: Any, x: Any, i: Any) -> Any:
        return types.int64(x, i), emit

    return compare


_positive, _zero, _set = _compare(">"), _compare("=="), _compare("!=")


@intrinsic
def _finite(typing: Any, x: Any, i: Any) -> Any:
    """_finite(x, i): the int64 whose bit j says that float32 x[i + j] is neither infinite nor NaN."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, _ = _place(context, builder, signature, arguments, 0)
        words = ir.VectorType(ir.IntType(32), _WORD)
        exponents = ir.Constant(words, [0x7F800000] * _WORD)
        x = builder.load(builder.bitcast(place, words.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", builder.and_(x, exponents), exponents), _INT64)

    return types.int64(x, i), emit


@intrinsic
def _spread(typing: Any, word: Any, yes: Any, no: Any, x: Any, i: Any) -> Any:
    """_spread(word, yes, no, x, i): x[i + j] = yes where bit j of the word is 1, else no."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, kind = _place(context, builder, signature, arguments, 3)
        both = []
        for value in arguments[1:3]:
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT64, 0))
            all_first = ir.Constant(ir.VectorType(ir.IntType(32), _WORD), [0] * _WORD)
            both.append(builder.shuffle_vector(one, one, all_first))
        chosen = builder.select(builder.bitcast(arguments[0], _MASK), *both)
        builder.store(chosen, place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, x.dtype, x.dtype, x, i), emit


@kernel
def _put(out: Bytes, at: int, word: int, count: int) -> None:
    if count == 64:
        for b in range(8):  # a known number: one store
            out[at + b] = (word >> (8 * b)) & 255
    else:
        for b in range((count + 7) // 8):
            out[at + b] = (word >> (8 * b)) & 255


@kernel
def _pack(first: int, last: int, x: Array, n: int, out: Bytes) -> None:
    """Words ``first`` to ``last`` of the rows of n bools (as uint8) in ``x``."""
    words, row_bytes = (n + 63) // 64, (n + 7) // 8
    row = first // words
    w = first - row * words - 1
    for _ in range(first, last):
        w += 1
        if w == words:
            row, w = row + 1, 0
        begin, count = row * n + 64 * w, min(64, n - 64 * w)
        word = np.int64(0)
        if count == 64:
            word = _set(x, begin)
        else:
            for j in range(count):
                word |= np.int64(x[begin + j] != 0) << j
        _put(out, row * row_bytes + 8 * w, word, count)


@kernel
def _pack_signs(
    first: int, last: int, x: Array, n: int, keys: Array, mixing: Array, out: Bytes, odd: Bytes
) -> None:
    """The same of x > 0, or of the row's coin where x is 0; ``mixing``: SplitMix64's constants. ``odd[0]`` becomes 1
    if there is an infinity or NaN."""
    words, row_bytes = (n + 63) // 64, (n + 7) // 8
    sound = np.int64(-1)
    row = first // words
    w = first - row * words - 1
    for _ in range(first, last):
        w += 1
        if w == words:
            row, w = row + 1, 0
        begin, count = row * n + 64 * w, min(64, n - 64 * w)
        word, zero = np.int64(0), np.int64(0)
        if count == 64:
            word, zero = _positive(x, begin), _zero(x, begin)
            sound &= _finite(x, begin)  # type: ignore[call-arg]
        else:
            for j in range(count):
                word |= np.int64(x[begin + j] > 0) << j
                zero |= np.int64(x[begin + j] == 0) << j
                sound &= -np.int64(np.isfinite(x[begin + j]))
        if zero != 0:
            coins = keys[row] + (w + 1) * mixing[0]
            coins = (coins ^ ((coins >> 30) & 0x3FFFFFFFF)) * mixing[1]
            coins = (coins ^ ((coins >> 27) & 0x1FFFFFFFFF)) * mixing[2]
            word |= zero & (coins ^ ((coins >> 31) & 0x1FFFFFFFF))
        _put(out, row * row_bytes + 8 * w, word, count)
    if sound != -1:
        odd[0] = 1


@kernel
def _pack_votes(first: int, last: int, x: Array, key: int, mixing: Array, out: Bytes) -> None:
    """Words ``first`` to ``last`` of x > 0, or of the key's coin where x is 0."""
    step, one, two = mixing[0], mixing[1], mixing[2]
    for w in range(first, last):
        begin, count = 64 * w, min(64, len(x) - 64 * w)
        word, zero = np.int64(0), np.int64(0)
        if count == 64:
            word, zero = _positive(x, begin), _zero(x, begin)
        else:
            for j in range(count):
                word |= np.int64(x[begin + j] > 0) << j
                zero |= np.int64(x[begin + j] == 0) << j
        if zero != 0:
            coins = key + (w + 1) * step
            coins = (coins ^ ((coins >> 30) & 0x3FFFFFFFF)) * one
            coins = (coins ^ ((coins >> 27) & 0x1FFFFFFFFF)) * two
            word |= zero & (coins ^ ((coins >> 31) & 0x1FFFFFFFF))
        _put(out, 8 * w, word, count)


@kernel
def _unpack(first: int, last: int, packed: Bytes, n: int, yes: Array, no: Array, out: Array) -> None:
    """Words ``first`` to ``last`` of the packed rows: a row's ``yes`` where a bit is 1, else its ``no``."""
    words, row_bytes = (n + 63) // 64, (n + 7) // 8
    row = first // words
    w = first - row * words - 1
    for _ in range(first, last):
        w += 1
        if w == words:
            row, w = row + 1, 0
        begin, count, at = row * n + 64 * w, min(64, n - 64 * w), row * row_bytes + 8 * w
        word = np.int64(0)
        for b in range(8 if count == 64 else (count + 7) // 8):
            word |= np.int64(packed[at + b]) << (8 * b)
        if count == 64:
            _spread(word, yes[row], no[row], out, begin)  # type: ignore[call-arg]
        else:
            for j in range(count):
                out[begin + j] = yes[row] if (word >> j) & 1 else no[row]


@kernel
def _empty_rows(first: int, last: int, x: Array, n: int, starts: Array, out: Bytes) -> None:
    """Rows ``first`` to ``last`` of all vectors of n numbers in ``x``: 1 where there are only zeros. A row is read up
    to its first other number."""
    rows = len(starts) - 1
    for i in range(first, last):
        vector = i // rows
        row = i - vector * rows
        out[i] = 1
        for j in range(vector * n + starts[row], vector * n + starts[row + 1]):
            if x[j] != 0:
                out[i] = 0
                break


@kernel
def _clear_rows(first: int, last: int, empty: Bytes, n: int, starts: Array, out: Array) -> None:
    """The same rows become zeros where ``empty`` is 1."""
    rows = len(starts) - 1
    for i in range(first, last):
        if empty[i]:
            vector = i // rows
            row = i - vector * rows
            for j in range(vector * n + starts[row], vector * n + starts[row + 1]):
                out[j] = 0


@kernel
def _majority(first: int, last: int, packed: Bytes, tie: Bytes, out: Bytes) -> None:
    """Blocks ``first`` to ``last`` of the votes ``(W, B)``: counts as bit planes, in ripple-carry additions."""
    voters, size = packed.shape
    planes = np.empty((64, _BYTES), np.uint8)
    carry, more, equal = np.empty(_BYTES, np.uint8), np.empty(_BYTES, np.uint8), np.empty(_BYTES, np.uint8)
    for block in range(first, last):
        begin = block * _BYTES
        count = min(_BYTES, size - begin)
        used = 0
        for voter in range(voters):
            vote = packed[voter, begin : begin + count]
            for i in range(count):
                carry[i] = vote[i]
            for p in range(used):
                plane = planes[p]
                for i in range(count):
                    both = plane[i] & carry[i]
                    plane[i] ^= carry[i]
                    carry[i] = both
            if (voter + 1) >> used:
                for i in range(count):
                    planes[used, i] = carry[i]
                used += 1
        for i in range(count):
            more[i], equal[i] = 0, 255
        for p in range(used - 1, -1, -1):  # compare with half the voters, from the highest plane down
            plane, flip = planes[p], np.uint8(0 if (voters // 2 >> p) & 1 else 255)
            for i in range(count):
                more[i] |= equal[i] & plane[i] & flip
                equal[i] &= plane[i] ^ flip
        even = np.uint8(0 if voters % 2 else 255)
        for i in range(count):
            out[begin + i] = more[i] | (equal[i] & tie[begin + i] & even)


@kernel
def _vote_of_two(
    first: int, last: int, a: Array, b: Array, key: int, start: int, mixing: Array, out: Array
) -> None:
    """Words ``first`` to ``last``: where the two differ, the coins of the key's words from ``start`` on."""
    step, one, two = mixing[0], mixing[1], mixing[2]
    for w in range(first, last):
        coins = key + (start + w + 1) * step
        coins = (coins ^ ((coins >> 30) & 0x3FFFFFFFF)) * one
        coins = (coins ^ ((coins >> 27) & 0x1FFFFFFFFF)) * two
        coins = coins ^ ((coins >> 31) & 0x1FFFFFFFF)
        out[w] = (a[w] & b[w]) | ((a[w] ^ b[w]) & coins)


@kernel
def _pack_integers(first: int, last: int, values: Array, width: int, out: Bytes) -> None:
    """Eights ``first`` to ``last`` of the values, which begin at whole bytes."""
    for eight in range(first, last):
        word, used, at = np.int64(0), 0, eight * width
        for i in range(8 * eight, min(8 * eight + 8, len(values))):
            word |= values[i] << used
            used += width
            while used >= 8:
                out[at] = word & 255
                word = (word >> 8) & 0x00FFFFFFFFFFFFFF
                used -= 8
                at += 1
        if used > 0:
            out[at] = word & 255


@kernel
def _unpack_integers(first: int, last: int, packed: Bytes, width: int, out: Array) -> None:
    """The inverse."""
    mask = (np.int64(1) << width) - 1
    for eight in range(first, last):
        word, used, at = np.int64(0), 0, eight * width
        for i in range(8 * eight, min(8 * eight + 8, len(out))):
            while used < width:
                word |= np.int64(packed[at]) << used
                used += 8
                at += 1
            out[i] = word & mask
            word >>= width
            used -= width


def pack(bits_CN: Tensor, out_CB: Tensor) -> None:
    n = bits_CN.shape[-1]
    x, out = bits_CN.view(-1).numpy().view(np.uint8), out_CB.view(-1).numpy()
    fast.run(_pack, len(x) // n * -(-n // _WORD), x, n, out)


def pack_signs(g_CN: Tensor, keys_C: Tensor, mixing: Tensor, out_CB: Tensor, odd_1: Tensor) -> None:
    n = g_CN.shape[-1]
    x, out = g_CN.view(-1).numpy(), out_CB.view(-1).numpy()
    arguments = x, n, keys_C.numpy(), mixing.numpy(), out, odd_1.numpy()
    fast.run(_pack_signs, len(g_CN) * -(-n // _WORD), *arguments)


def pack_votes(votes_N: Tensor, key: int, mixing: Tensor, out_B: Tensor) -> None:
    arguments = votes_N.numpy(), key, mixing.numpy(), out_B.numpy()
    fast.run(_pack_votes, -(-len(votes_N) // _WORD), *arguments)


def unpack(packed_CB: Tensor, yes_C: Tensor, no_C: Tensor, out_CN: Tensor) -> None:
    """Rows of ``out`` are yes_C or no_C; bools come as uint8."""
    n, out = out_CN.shape[-1], out_CN.view(-1).numpy()
    arguments = packed_CB.view(-1).numpy(), n, yes_C.numpy(), no_C.numpy(), out
    fast.run(_unpack, len(out) // n * -(-n // _WORD), *arguments)


def empty_rows(g_CN: Tensor, starts_R: Tensor, out_CR: Tensor) -> None:
    """``starts``: of R rows, and N."""
    x, out = g_CN.view(-1).numpy(), out_CR.view(-1).numpy().view(np.uint8)
    fast.run(_empty_rows, len(out), x, g_CN.shape[1], starts_R.numpy(), out)


def clear_rows(v_CN: Tensor, empty_CR: Tensor, starts_R: Tensor) -> None:
    empty, out = empty_CR.view(-1).numpy().view(np.uint8), v_CN.view(-1).numpy()
    fast.run(_clear_rows, len(empty), empty, v_CN.shape[1], starts_R.numpy(), out)


def majority(packed_WB: Tensor, tie_B: Tensor, out_B: Tensor) -> None:
    fast.run(_majority, -(-len(out_B) // _BYTES), packed_WB.numpy(), tie_B.numpy(), out_B.numpy())


def vote_of_two(packed_2B: Tensor, key: int, start: int, mixing: Tensor, out_B: Tensor) -> None:
    """``start`` counts words."""
    size, words = len(out_B), -(-len(out_B) // 8)
    if size % 8:
        packed_2B = F.pad(packed_2B, (0, 8 * words - size))
    a, b = packed_2B.view(2, words, 8).view(torch.int64)[..., 0].numpy()
    out = torch.empty(words, dtype=torch.int64)
    fast.run(_vote_of_two, words, a, b, key, start, mixing.numpy(), out.numpy())
    out_B.copy_(out.view(torch.uint8)[:size])


def pack_integers(values_N: Tensor, width: int, out_B: Tensor) -> None:
    fast.run(_pack_integers, -(-len(values_N) // 8), values_N.numpy(), width, out_B.numpy())


def unpack_integers(packed_B: Tensor, width: int, out_N: Tensor) -> None:
    fast.run(_unpack_integers, -(-len(out_N) // 8), packed_B.numpy(), width, out_N.numpy())
