"""Numbers of two bytes, in blocks that stay in a core's cache from one step to the next.

Shape suffixes: C clients, D parameters, N numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmpi.ops import fast, pages
from fedmpi.ops.flags import Flag
from fedmpi.ops.sums import are_finite, finite

_BLOCK = 1 << 17  # numbers, for each thread


def narrow(x_CD: Tensor, dtype: torch.dtype, odd_1: Tensor | None = None) -> Tensor:
    """Float32 as the nearest numbers of this type (ties to even); what lies beyond its largest becomes that, and NaN 0,
    so that whoever reads them meets numbers.

    Args:
      odd_1: uint8, becomes 1 if any entry is infinite or NaN.
    """
    if fast.waits(x_CD):
        return narrow_reference(x_CD, dtype, odd_1)
    half_CD = pages.huge(torch.empty(x_CD.shape, dtype=dtype, device=x_CD.device))
    for half_N, x_N in _blocks(half_CD.view(-1), x_CD.reshape(-1)):
        if not finite(half_N.copy_(x_N)):  # too large, or no numbers
            half_N.copy_(narrow_reference(x_N, dtype, odd_1))
    return half_CD


def narrow_reference(x_CD: Tensor, dtype: torch.dtype, odd_1: Tensor | None = None) -> Tensor:
    """:func:`narrow` at once."""
    if odd_1 is not None:
        odd_1 |= ~x_CD.isfinite().all()
    largest = torch.finfo(dtype).max
    return x_CD.nan_to_num(0.0).clamp_(-largest, largest).to(dtype)


def widen(half_CD: Tensor) -> tuple[Tensor, Flag]:
    """As float32, and whether all are finite."""
    if fast.waits(half_CD):
        return widen_reference(half_CD)
    out_CD = pages.huge(torch.empty(half_CD.shape, device=half_CD.device))
    blocks = _blocks(out_CD.view(-1), half_CD.reshape(-1))
    good = [finite(out_N.copy_(half_N)) for out_N, half_N in blocks]
    return out_CD, all(good)


def widen_reference(half_CD: Tensor) -> tuple[Tensor, Flag]:
    """:func:`widen` at once; a device is not asked."""
    out_CD = half_CD.float()
    return out_CD, are_finite(out_CD)


def add(total_N: Tensor, half_N: Tensor, weight: float) -> Flag:
    """total += weight · (as float32). False, and a total of no use, if some are not finite."""
    if fast.waits(half_N):
        return add_reference(total_N, half_N, weight)
    wide = fast.scratch("wide", 1, min(_size(), len(half_N)), half_N.device)[0]
    for total_M, half_M in _blocks(total_N, half_N):
        wide_M = wide[: len(half_M)].copy_(half_M)
        if not finite(wide_M):
            return False
        total_M.add_(wide_M, alpha=weight)
    return True


def add_reference(total_N: Tensor, half_N: Tensor, weight: float) -> Flag:
    """:func:`add` at once."""
    wide_N, good = widen_reference(half_N)
    total_N.add_(wide_N, alpha=weight)
    return good


def _size() -> int:
    return _BLOCK * torch.get_num_threads()


def _blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(v.split(_size()) for v in vectors), strict=True)
