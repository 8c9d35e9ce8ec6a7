"""Inner products and fixed-point sums in one pass; a program's 1024 products are added up as the references' tree."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float64, uint8

from fedmpi.ops.triton.base import OPTIONS, on

BLOCK = 1 << 10
_LOG = 10


@triton.jit
def _tree(x, LOG: tl.constexpr):
    """Their sum: the upper half is added to the lower one until one is left."""
    for k in tl.static_range(LOG):
        x = tl.sum(tl.reshape(x, (2, 1 << (LOG - 1 - k))), 0)  # of two, whose order is of no account
    return tl.reshape(x, (1,))


@triton.jit
def dots_kernel(v, w, out, stride, n, LOG: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = (block << LOG) + tl.arange(0, 1 << LOG)
    x = tl.load(v + i, mask=i < n, other=0.0).to(tl.float64)
    y = tl.load(w + i, mask=i < n, other=0.0).to(tl.float64)
    at = out + block + tl.arange(0, 1)
    tl.store(at, _tree(x * y, LOG))
    tl.store(at + stride, _tree(x * x, LOG))
    tl.store(at + 2 * stride, _tree(y * y, LOG))


@triton.jit
def absolute_kernel(v, out, n, LOG: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = (block << LOG) + tl.arange(0, 1 << LOG)
    x = tl.abs(tl.load(v + i, mask=i < n, other=0.0).to(tl.float64))
    tl.store(out + block + tl.arange(0, 1), _tree(x, LOG))


@triton.jit
def add_fixed_kernel(total, v, weight, one, largest, fits, n, BLOCK: tl.constexpr):
    """The factors lie in memory: a number that is handed over is a float32."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(v + i, mask=i < n, other=0.0).to(tl.float64) * tl.load(weight)
    outside = tl.max(((tl.abs(x) <= tl.load(largest)) == 0).to(tl.int32), 0)
    tl.store(fits + block, (outside == 0).to(tl.uint8))
    x = x * tl.load(one)
    # To the nearest, ties to even: beside 2^52 no digit below 1 has a place, and from there on none is left.
    size = tl.abs(x)
    whole = tl.where(size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size)
    rounded = tl.where(x < 0, -whole, whole)
    there = i < tl.where(outside == 0, n, 0)
    tl.store(total + i, tl.load(total + i, mask=there, other=0) + rounded.to(tl.int64), mask=there)


def dots(v_S: Tensor, w_S: Tensor, out_3B: Tensor) -> None:
    """<v, w>, <v, v> and <w, w> of each block, float64."""
    if out_3B.shape[1]:
        with on(v_S):
            dots_kernel[(out_3B.shape[1],)](v_S, w_S, out_3B, out_3B.stride(0), len(v_S), LOG=_LOG, **OPTIONS)


def absolute(v_S: Tensor, out_B: Tensor) -> None:
    """Σ|v| of each block, float64."""
    if len(out_B):
        with on(v_S):
            absolute_kernel[(len(out_B),)](v_S, out_B, len(v_S), LOG=_LOG, **OPTIONS)


def add_fixed(
    total_S: Tensor, v_S: Tensor, weight: float, one: float, largest: float, fits_B: Tensor
) -> None:
    """``fits``: bool of each block; one that has a product above ``largest``, or NaN, is left out."""
    if len(fits_B):
        factors = total_S.new_tensor((weight, one, largest), dtype=float64)
        with on(v_S):
            add_fixed_kernel[(len(fits_B),)](
                total_S, v_S, *factors.split(1), fits_B.view(uint8), len(v_S), BLOCK=BLOCK, **OPTIONS
            )
