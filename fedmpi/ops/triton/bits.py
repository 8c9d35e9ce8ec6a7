"""Packing, unpacking and votes, a byte and its eight entries at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, uint8

from fedmpi.ops.triton.base import OPTIONS, blocks, on, word

_BYTES = 256  # a program's
_ROW = 1024  # entries of a row at a time


@triton.jit
def _place(size, per_row, BYTES: tl.constexpr):
    """This program's row, its bytes there, their bits, and which bytes exist: ``per_row`` programs a row."""
    row = (tl.program_id(0) // per_row).to(tl.int64)
    byte = (tl.program_id(0) % per_row).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    return row, byte, byte[:, None] * 8 + tl.arange(0, 8)[None, :], byte < size


@triton.jit
def _together(yes_B8):
    """Bytes, as int32, of eight bits each."""
    return tl.sum(yes_B8.to(tl.int32) << tl.arange(0, 8)[None, :], 1)


@triton.jit
def _coins(key, start, byte):
    """Bytes of the key's coins, the first of which is that of word ``start``."""
    words = word(key, start + (byte >> 3))
    return ((words >> ((byte & 7) * 8).to(tl.uint64)) & 255).to(tl.int32)


@triton.jit
def pack_kernel(x, out, n, size, per_row, BYTES: tl.constexpr):
    row, byte, i, there = _place(size, per_row, BYTES)
    yes = tl.load(x + row * n + i, mask=i < n, other=0) != 0
    tl.store(out + row * size + byte, _together(yes).to(tl.uint8), mask=there)


@triton.jit
def pack_signs_kernel(x, keys, out, odd, n, size, per_row, BYTES: tl.constexpr):
    row, byte, i, there = _place(size, per_row, BYTES)
    v = tl.load(x + row * n + i, mask=i < n, other=-1.0)
    zero = _together(v == 0)
    coins = _coins(tl.load(keys + row), 0, byte)
    tl.store(out + row * size + byte, (_together(v > 0) | (zero & coins)).to(tl.uint8), mask=there)
    strange = tl.max(tl.max(((v - v) != 0).to(tl.int32), 1), 0)  # of infinity and NaN that is NaN
    tl.store(odd, 1, mask=strange != 0)


@triton.jit(do_not_specialize=["key"])
def pack_votes_kernel(votes, key, out, n, size, BYTES: tl.constexpr):
    _, byte, i, there = _place(size, tl.cdiv(size, BYTES), BYTES)
    v = tl.load(votes + i, mask=i < n, other=-1)
    coins = _coins(key.to(tl.int64), 0, byte)
    tl.store(out + byte, (_together(v > 0) | (_together(v == 0) & coins)).to(tl.uint8), mask=there)


@triton.jit
def unpack_kernel(packed, yes, no, out, n, size, per_row, BYTES: tl.constexpr):
    row, byte, i, there = _place(size, per_row, BYTES)
    bits = tl.load(packed + row * size + byte, mask=there, other=0).to(tl.int32)
    on = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    tl.store(out + row * n + i, tl.where(on != 0, tl.load(yes + row), tl.load(no + row)), mask=i < n)


@triton.jit
def majority_kernel(packed, tie, out, voters, size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    there, bit = byte < size, tl.arange(0, 8)[None, :]
    count, at = tl.zeros((BYTES, 8), tl.int32), packed + byte
    for _ in range(voters):
        vote = tl.load(at, mask=there, other=0).to(tl.int32)
        count += (vote[:, None] >> bit) & 1
        at += size
    ties = tl.load(tie + byte, mask=there, other=0).to(tl.int32)
    result = _together(2 * count > voters) | (_together(2 * count == voters) & ties)
    tl.store(out + byte, result.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["key", "start"])
def vote_of_two_kernel(packed, key, start, out, size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    there = byte < size
    a = tl.load(packed + byte, mask=there, other=0).to(tl.int32)
    b = tl.load(packed + size + byte, mask=there, other=0).to(tl.int32)
    coins = _coins(key.to(tl.int64), start, byte)
    tl.store(out + byte, ((a & b) | ((a ^ b) & coins)).to(tl.uint8), mask=there)


@triton.jit
def empty_rows_kernel(x, starts, out, n, rows, ROW: tl.constexpr):
    vector, row = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    found = tl.zeros((ROW,), tl.int32)
    for at in range(begin, end, ROW):
        i = at + tl.arange(0, ROW)
        found |= (tl.load(x + vector * n + i, mask=i < end, other=0.0) != 0).to(tl.int32)
    tl.store(out + tl.program_id(0), (tl.max(found, 0) == 0).to(tl.uint8))


@triton.jit
def clear_rows_kernel(empty, starts, out, n, rows, ROW: tl.constexpr):
    vector, row = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    end = tl.where(tl.load(empty + tl.program_id(0)) != 0, end, begin)
    for at in range(begin, end, ROW):
        i = at + tl.arange(0, ROW)
        tl.store(out + vector * n + i, tl.zeros((ROW,), out.dtype.element_ty), mask=i < end)


@triton.jit
def pack_integers_kernel(values, out, count, width, size, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    i = bit // width
    value = tl.load(values + i, mask=i < count, other=0)
    tl.store(out + byte, _together((value >> (bit - i * width)) & 1).to(tl.uint8), mask=byte < size)


@triton.jit
def unpack_integers_kernel(packed, out, count, width, size, COUNT: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    first = i * width >> 3
    bits = tl.zeros((COUNT,), tl.int64)
    for b in tl.static_range(8):  # width is at most 56, and 7 bits of the value before
        byte = first + b
        bits |= tl.load(packed + byte, mask=byte < size, other=0).to(tl.int64) << (8 * b)
    mask = (tl.full((), 1, tl.int64) << width) - 1
    tl.store(out + i, (bits >> (i * width - first * 8)) & mask, mask=i < count)


def pack(bits_CN: Tensor, out_CB: Tensor) -> None:
    n, size = bits_CN.shape[-1], out_CB.shape[-1]
    x, each = bits_CN.view(-1).view(uint8), blocks(size, _BYTES)
    with on(x):
        pack_kernel[(len(x) // n * each,)](x, out_CB, n, size, each, BYTES=_BYTES, **OPTIONS)


def pack_signs(g_CN: Tensor, keys_C: Tensor, mixing: Tensor, out_CB: Tensor, odd_1: Tensor) -> None:
    n, size = g_CN.shape[-1], out_CB.shape[-1]
    keys_C, each = keys_C.to(g_CN.device, non_blocking=True), blocks(size, _BYTES)
    if not g_CN.numel():
        return
    with on(g_CN):
        pack_signs_kernel[(len(g_CN) * each,)](
            g_CN, keys_C, out_CB, odd_1, n, size, each, BYTES=_BYTES, **OPTIONS
        )


def pack_votes(votes_N: Tensor, key: int, mixing: Tensor, out_B: Tensor) -> None:
    if len(votes_N):
        with on(votes_N):
            pack_votes_kernel[(blocks(len(out_B), _BYTES),)](
                votes_N, key, out_B, len(votes_N), len(out_B), BYTES=_BYTES, **OPTIONS
            )


def unpack(packed_CB: Tensor, yes_C: Tensor, no_C: Tensor, out_CN: Tensor) -> None:
    """Rows of ``out`` are yes_C or no_C; bools come as uint8."""
    n, size = out_CN.shape[-1], packed_CB.shape[-1]
    each = blocks(size, _BYTES)
    if not out_CN.numel():
        return
    with on(out_CN):
        unpack_kernel[(out_CN.numel() // n * each,)](
            packed_CB, yes_C, no_C, out_CN, n, size, each, BYTES=_BYTES, **OPTIONS
        )


def empty_rows(g_CN: Tensor, starts_R: Tensor, out_CR: Tensor) -> None:
    """``starts``: of R rows, and N."""
    if out_CR.numel():
        with on(g_CN):
            empty_rows_kernel[(out_CR.numel(),)](
                g_CN, starts_R, out_CR.view(uint8), g_CN.shape[1], out_CR.shape[1], ROW=_ROW, **OPTIONS
            )


def clear_rows(v_CN: Tensor, empty_CR: Tensor, starts_R: Tensor) -> None:
    if empty_CR.numel():
        with on(v_CN):
            clear_rows_kernel[(empty_CR.numel(),)](
                empty_CR.view(uint8), starts_R, v_CN, v_CN.shape[1], empty_CR.shape[1], ROW=_ROW, **OPTIONS
            )


def majority(packed_WB: Tensor, tie_B: Tensor, out_B: Tensor) -> None:
    voters, size = packed_WB.shape
    with on(out_B):
        majority_kernel[(blocks(size, _BYTES),)](
            packed_WB, tie_B, out_B, voters, size, BYTES=_BYTES, **OPTIONS
        )


def vote_of_two(packed_2B: Tensor, key: int, start: int, mixing: Tensor, out_B: Tensor) -> None:
    """``start`` counts words."""
    size = len(out_B)
    with on(out_B):
        vote_of_two_kernel[(blocks(size, _BYTES),)](
            packed_2B, key, start, out_B, size, BYTES=_BYTES, **OPTIONS
        )


def pack_integers(values_N: Tensor, width: int, out_B: Tensor) -> None:
    with on(out_B):
        pack_integers_kernel[(blocks(len(out_B), _BYTES),)](
            values_N, out_B, len(values_N), width, len(out_B), BYTES=_BYTES, **OPTIONS
        )


def unpack_integers(packed_B: Tensor, width: int, out_N: Tensor) -> None:
    with on(out_N):
        unpack_integers_kernel[(blocks(len(out_N), _ROW),)](
            packed_B, out_N, len(out_N), width, len(packed_B), COUNT=_ROW, **OPTIONS
        )
