"""The k largest magnitudes, exactly and without asking the device: the k-th is found by its bits, 11, 10 and 10 of
them, from the counts of all; then those above it, and the first that equal it, are listed.

Five readings of the vector, each in order, and one list written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmpi.ops.triton.base import OPTIONS, blocks, on

_BLOCK = 4096
_DIGITS = ((20, 11), (10, 10), (0, 10))  # shift and width of a magnitude's 31 bits


@triton.jit
def _magnitudes(x, n, BLOCK: tl.constexpr):
    """The bits of |x|, which are in the order of the magnitudes; where they are, and which exist."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    return tl.load(x + i, mask=there, other=0) & 0x7FFFFFFF, i, there


@triton.jit
def count_kernel(x, found, counts, n, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """How many magnitudes that begin as ``found`` have each next digit."""
    bits, _, there = _magnitudes(x, n, BLOCK)
    there &= (bits >> (SHIFT + WIDTH)) == tl.load(found)
    digit = (bits >> SHIFT) & ((1 << WIDTH) - 1)
    seen = tl.histogram(digit, 1 << WIDTH, mask=there)
    tl.atomic_add(counts + tl.arange(0, 1 << WIDTH), seen, mask=seen != 0)


@triton.jit
def above_kernel(x, found, above, equal, n, BLOCK: tl.constexpr):
    """How many of each block lie above the k-th, and how many equal it."""
    bits, _, there = _magnitudes(x, n, BLOCK)
    last = tl.load(found)
    tl.store(above + tl.program_id(0), tl.sum((there & (bits > last)).to(tl.int32), 0))
    tl.store(equal + tl.program_id(0), tl.sum((there & (bits == last)).to(tl.int32), 0))


@triton.jit
def list_kernel(x, found, left, above, equal, out, n, BLOCK: tl.constexpr):
    """Where they are, increasing: block b's come after the ``above[b]`` and the ``equal[b]`` of earlier blocks; of what
    equals the k-th only the first ``left``."""
    bits, i, there = _magnitudes(x, n, BLOCK)
    last, places = tl.load(found), tl.load(left)
    more, same = there & (bits > last), there & (bits == last)
    tie = tl.load(equal + tl.program_id(0)) + tl.cumsum(same.to(tl.int32), 0).to(tl.int64)
    chosen = more | (same & (tie <= places))
    at = (
        tl.load(above + tl.program_id(0))
        + tl.cumsum(more.to(tl.int32), 0).to(tl.int64)
        + tl.minimum(tie, places)
        - 1
    )
    tl.store(out + at, i, mask=chosen)


def top_k(g_CD: Tensor, k: int) -> Tensor:
    """Indices of the k largest magnitudes of each float32 row, int64 ``(C, k)``, increasing; the first of equals."""
    out_CK = torch.empty(len(g_CD), k, dtype=torch.int64, device=g_CD.device)
    with on(g_CD):
        for g_D, out_K in zip(g_CD, out_CK, strict=True):
            _top_k(g_D.view(torch.int32), k, out_K)
    return out_CK


def _top_k(x_D: Tensor, k: int, out_K: Tensor) -> None:
    n, grid, device = len(x_D), blocks(len(x_D), _BLOCK), x_D.device
    # Of the k, as many are left for those that begin as ``found``, the digits of the k-th so far.
    found_1 = torch.zeros(1, dtype=torch.int32, device=device)
    left_1 = torch.full((1,), k, dtype=torch.int64, device=device)
    for shift, width in _DIGITS:
        counts = torch.zeros(1 << width, dtype=torch.int32, device=device)
        count_kernel[(grid,)](x_D, found_1, counts, n, SHIFT=shift, WIDTH=width, BLOCK=_BLOCK, **OPTIONS)
        reached = counts.flip(0).cumsum(0)  # with a digit of at least the last's, its predecessor's, …
        below = (reached < left_1).sum(0, keepdim=True)
        above_1 = torch.cat([reached.new_zeros(1), reached]).gather(0, below)
        found_1 = ((found_1 << width) + ((1 << width) - 1 - below)).to(torch.int32)
        left_1 = left_1 - above_1
    above, equal = torch.empty(2, grid, dtype=torch.int32, device=device).unbind()
    above_kernel[(grid,)](x_D, found_1, above, equal, n, BLOCK=_BLOCK, **OPTIONS)
    before = [x.cumsum(0) - x for x in (above, equal)]
    list_kernel[(grid,)](x_D, found_1, left_1, *before, out_K, n, BLOCK=_BLOCK, num_warps=8, **OPTIONS)
