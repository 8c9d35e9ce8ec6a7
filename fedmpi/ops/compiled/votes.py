"""Votes from which some abstain in rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.ops.compiled.base import kernel

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


@kernel
def _vote_of_present(
    first: int,
    last: int,
    packed: Array,
    present: Array,
    starts: Array,
    at: int,
    key: int,
    start: int,
    mixing: Array,
    out: Bytes,
) -> None:
    """Bytes ``first`` to ``last`` of a vote of all, where entry ``at`` is the first: those entries anew in whose row
    somebody is not present. After the last row nobody is."""
    step, one, two = mixing[0], mixing[1], mixing[2]
    voters, rows = len(packed), len(starts) - 1
    row = np.searchsorted(starts, at + 8 * first, side="right") - 1
    counted, there, alone = -1, 0, 0
    for byte in range(first, last):
        place, end = 8 * byte, 8 * byte + 8
        while place < end:
            stop = end if row >= rows else min(end, starts[row + 1] - at)
            if stop <= place:
                row += 1
                continue
            if row != counted:
                counted, there = row, 0
                for w in range(voters if row < rows else 0):
                    if present[w, row]:
                        there, alone = there + 1, w
            if there < voters:
                value = np.int64(0)
                if there != 1:
                    coins = key + (start + byte // 8 + 1) * step
                    coins = (coins ^ ((coins >> 30) & 0x3FFFFFFFF)) * one
                    coins = (coins ^ ((coins >> 27) & 0x1FFFFFFFFF)) * two
                    coins = coins ^ ((coins >> 31) & 0x1FFFFFFFF)
                    value = (coins >> (8 * (byte % 8))) & 255
                    for i in range(place - 8 * byte if there else 8, stop - 8 * byte):
                        twice = 0
                        for w in range(voters):
                            if present[w, row]:
                                twice += 2 * ((np.int64(packed[w, byte]) >> i) & 1)
                        if twice > there:
                            value |= 1 << i
                        elif twice < there:
                            value &= ~(1 << i)
                else:
                    value = np.int64(packed[alone, byte])
                mask = ((1 << (stop - 8 * byte)) - 1) ^ ((1 << (place - 8 * byte)) - 1)
                out[byte] = (np.int64(out[byte]) & ~mask) | (value & mask)
            place = stop


def vote_of_present(
    packed_WB: Tensor,
    present_WR: Tensor,
    starts_R: Tensor,
    at: int,
    key: int,
    start: int,
    mixing: Tensor,
    out_B: Tensor,
) -> None:
    """``out_B`` holds the vote of all; ``start`` counts words."""
    voters = packed_WB.numpy(), present_WR.numpy(), starts_R.numpy()
    fast.run(_vote_of_present, len(out_B), *voters, at, key, start, mixing.numpy(), out_B.numpy())
