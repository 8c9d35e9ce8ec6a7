"""The fast Walsh–Hadamard transform: tiles in registers through many stages, in the reference's order.

A row of up to 2^14 numbers is one tile, read and written once (one of 2^15 spills its registers). Of a longer one,
tiles of 2^13 go through 13 stages, and then each sweep over memory takes up to eight more, with 32 neighbours in a
tile: 2^27 in three sweeps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmpi.ops.triton.base import OPTIONS, on

SMALLEST = 32  # the shortest row
_WHOLE, _TILE, _LANES = 14, 13, 5  # log2: of a row at once, of a tile, of neighbours in it


@triton.jit
def stages_kernel(source, target, h, across, ROWS: tl.constexpr, LANES: tl.constexpr, LOG: tl.constexpr):
    """Stages h to h · ROWS / 2 of groups of ROWS stretches of LANES numbers, h apart; ``across`` groups lie between two
    that are ROWS · h apart."""
    group = tl.program_id(0).to(tl.int64)
    begin = (group // across) * ROWS * h + (group % across) * LANES
    k = tl.arange(0, ROWS * LANES)
    at = begin + (k // LANES) * h + k % LANES
    v = tl.load(source + at)
    for stage in tl.static_range(LOG):
        pairs = tl.reshape(
            v, (ROWS >> (stage + 1), 2, LANES << stage)
        )  # half a group, LANES · 2^stage, apart
        pairs = tl.permute(pairs, (0, 2, 1))
        a, b = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS * LANES,))
    tl.store(target + at, v)


def fwht(source: Tensor, target: Tensor) -> None:
    """``target`` = H ``source`` over the last axis, whose length is a power of two from 32 on. Both contiguous
    float32; they may be the same tensor."""
    if not target.numel():
        return
    done, total = 0, target.shape[-1].bit_length() - 1
    with on(target):
        while done < total:
            lanes, left = _LANES if done else 0, total - done
            # As many sweeps as are needed, of about as many stages each.
            log2 = -(-left // -(-left // (_TILE - lanes))) if done else total if total <= _WHOLE else _TILE
            stages_kernel[(target.numel() >> (log2 + lanes),)](
                target if done else source,
                target,
                1 << done,
                max(1, (1 << done) >> lanes),
                ROWS=1 << log2,
                LANES=1 << lanes,
                LOG=log2,
                num_warps=max(1, 1 << (log2 + lanes) >> 9),
                **OPTIONS,
            )
            done += log2
