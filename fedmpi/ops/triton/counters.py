"""Embeddings that draw their random parts where they use them: the integers of ``fedmpi.random``, the references'
products. What is added up is added by torch, whose order on CUDA ``torch.use_deterministic_algorithms`` fixes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmpi import random
from fedmpi.ops.triton.base import OPTIONS, blocks, on, word

CHUNK = 1 << 10  # coordinates of a program


@triton.jit
def _coins(key, i):
    """``random.coins`` at i: 0 or 1."""
    return (word(key.to(tl.int64), i >> 6) >> (i & 63).to(tl.uint64)) & 1


@triton.jit
def _integers(key, i, high):
    """``random.integers`` at i."""
    return (((word(key.to(tl.int64), i) >> 32) * high.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _permuted(i, rounds, ROUNDS: tl.constexpr):
    """Π; ``rounds``: mask, shift, then a multiplier and an offset each."""
    mask, shift = tl.load(rounds), tl.load(rounds + 1)
    for r in tl.static_range(ROUNDS):
        i = (i * tl.load(rounds + 2 * r + 2) + tl.load(rounds + 2 * r + 3)) & mask
        i = i ^ (i >> shift)
    return i


@triton.jit
def _normals(key, place, table):
    """``random.normal`` at these places."""
    words = word(key.to(tl.int64), place)
    mass = tl.maximum((words >> 33).to(tl.int64), 1)
    digits = mass.to(tl.float64).to(tl.int64, bitcast=True)
    cell, fraction = (digits >> 44) - (1023 << 8), (digits >> 21) & 0x7FFFFF
    low = tl.load(table + cell)
    value = (low << 23) + (tl.load(table + cell + 1) - low) * fraction
    magnitude = (value >> 12).to(tl.float64) * 4.547473508864641e-13  # 2^-41
    return tl.where((words & 1) != 0, magnitude, -magnitude).to(tl.float32)


@triton.jit
def _place(size, CHUNK: tl.constexpr):
    """This program's row and coordinates there."""
    each = tl.cdiv(size, CHUNK)
    row = (tl.program_id(0) // each).to(tl.int64)
    return row, (tl.program_id(0) % each).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)


@triton.jit(do_not_specialize=["key"])
def spread_kernel(small, key, rounds, table, out, m, n, ROUNDS: tl.constexpr, CHUNK: tl.constexpr):
    row, i = _place(n, CHUNK)
    place = _permuted(i, rounds, ROUNDS)
    weight = _normals(key, place, table)
    tl.store(out + row * n + i, tl.load(small + row * m + (place & (m - 1))) * weight, mask=i < n)


@triton.jit(do_not_specialize=["key"])
def weigh_kernel(x, key, rounds, table, column, m, n, ROUNDS: tl.constexpr, CHUNK: tl.constexpr):
    """x becomes the products of the adjoint, which are to be added up by their columns."""
    row, i = _place(n, CHUNK)
    place = _permuted(i, rounds, ROUNDS)
    value = tl.load(x + row * n + i, mask=i < n, other=0.0) * _normals(key, place, table)
    tl.store(x + row * n + i, value, mask=i < n)
    tl.store(column + i, place & (m - 1), mask=i < n)


@triton.jit(do_not_specialize=["key"])
def flip_kernel(x, key, scale, out, size, n, CHUNK: tl.constexpr):
    row, i = _place(n, CHUNK)
    value = tl.load(x + row * size + i, mask=i < size, other=0.0)
    value = value * tl.where(_coins(key, i) != 0, scale, -scale)
    tl.store(out + row * n + i, tl.where(i < size, value, 0.0), mask=i < n)


@triton.jit(do_not_specialize=["h", "s"])
def hashed_lift_kernel(v, h, s, factor, out, dim, n, CHUNK: tl.constexpr):
    row, i = _place(n, CHUNK)
    value = tl.load(v + row * dim + _integers(h, i, dim))
    tl.store(out + row * n + i, value * tl.where(_coins(s, i) != 0, factor, -factor), mask=i < n)


@triton.jit(do_not_specialize=["h", "s"])
def hashed_sign_kernel(g, h, s, out, column, dim, n, CHUNK: tl.constexpr):
    row, i = _place(n, CHUNK)
    value = tl.load(g + row * n + i, mask=i < n, other=0.0)
    tl.store(out + row * n + i, tl.where(_coins(s, i) != 0, value, -value), mask=i < n)
    tl.store(column + i, _integers(h, i, dim), mask=i < n)


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    return random.half_normal_table().to(device)


def _grid(x_CN: Tensor) -> tuple[int]:
    return (len(x_CN) * blocks(x_CN.shape[1], CHUNK),)


def fastfood_spread(small_CM: Tensor, key: int, rounds: Tensor, out_CN: Tensor) -> None:
    """``Π G`` of the repeated ``small``: the key's normals, and the bijection's rounds."""
    sizes, drawn = (small_CM.shape[1], out_CN.shape[1]), (rounds.to(out_CN.device), _table(out_CN.device))
    with on(out_CN):
        spread_kernel[_grid(out_CN)](
            small_CM, key, *drawn, out_CN, *sizes, ROUNDS=len(rounds) // 2 - 1, CHUNK=CHUNK, **OPTIONS
        )


def fastfood_gather(x_CN: Tensor, key: int, rounds: Tensor, sums_BCM: Tensor) -> None:
    """Its adjoint, each block of x, which is of no use then, into its own sums."""
    m, n = sums_BCM.shape[2], x_CN.shape[1]
    column_N = torch.empty(n, dtype=torch.int64, device=x_CN.device)
    drawn = rounds.to(x_CN.device), _table(x_CN.device)
    with on(x_CN):
        weigh_kernel[_grid(x_CN)](
            x_CN, key, *drawn, column_N, m, n, ROUNDS=len(rounds) // 2 - 1, CHUNK=CHUNK, **OPTIONS
        )
    _add(x_CN, column_N, n // len(sums_BCM), sums_BCM)


def flip(x_CX: Tensor, key: int, scale: float, out_CY: Tensor) -> None:
    """``out`` = ± scale · x with the signs of ``key``, cut or filled with zeros to its length."""
    with on(out_CY):
        flip_kernel[_grid(out_CY)](
            x_CX, key, scale, out_CY, x_CX.shape[1], out_CY.shape[1], CHUNK=CHUNK, **OPTIONS
        )


def hashed_lift(v_Cd: Tensor, h: int, s: int, factor: float, out_CD: Tensor) -> None:
    """``out`` = ± v[h(i)] · factor, with buckets and signs of the keys ``h`` and ``s``."""
    with on(out_CD):
        hashed_lift_kernel[_grid(out_CD)](
            v_Cd, h, s, factor, out_CD, v_Cd.shape[1], out_CD.shape[1], CHUNK=CHUNK, **OPTIONS
        )


def hashed_project(g_CD: Tensor, h: int, s: int, size: int, sums_BCd: Tensor) -> None:
    """Its adjoint without the factor, each block of ``size`` coordinates into its own sums."""
    n, signed_CD = g_CD.shape[1], torch.empty_like(g_CD)
    column_D = torch.empty(n, dtype=torch.int64, device=g_CD.device)
    with on(g_CD):
        hashed_sign_kernel[_grid(g_CD)](
            g_CD, h, s, signed_CD, column_D, sums_BCd.shape[2], n, CHUNK=CHUNK, **OPTIONS
        )
    _add(signed_CD, column_D, size, sums_BCd)


def _add(x_CN: Tensor, column_N: Tensor, size: int, sums_BCd: Tensor) -> None:
    """Each number to the sum of its column, block by block."""
    for sums_Cd, x_Cn, column_n in zip(sums_BCd, x_CN.split(size, 1), column_N.split(size), strict=True):
        for sum_d, x_n in zip(sums_Cd, x_Cn, strict=True):
            sum_d.index_add_(0, column_n, x_n)
