"""The fast Walsh–Hadamard transform, unnormalised: H is the ±1 Sylvester matrix, H·H = n·I."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.ops import fast


def fwht(x: Tensor, out: Tensor | None = None) -> Tensor:
    """H x over the last axis, whose length n must be a power of two; O(n log n).

    Only additions and subtractions in a fixed order: the result has the same bits on every device.

    Args:
      x: any shape and strides.
      out: where the result goes (may be ``x``); a new tensor without it.

    Raises:
      ValueError: n is no power of two.
    """
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"x: expected a last axis of a power of two, got {n}")
    kernels = fast.compiled("hadamard", x) if x.dtype == torch.float32 else None
    if kernels is None or n < kernels.SMALLEST or (out is not None and out.shape != x.shape):
        return fwht_reference(x) if out is None else out.copy_(fwht_reference(x))
    result = out if out is not None and out.is_contiguous() else torch.empty(x.shape, device=x.device)
    kernels.fwht(x.contiguous(), result)
    return result if out is None or out is result else out.copy_(result)


def fwht_reference(x: Tensor) -> Tensor:
    """:func:`fwht` by torch, for any type and device: log2 n passes, a new tensor."""
    n = x.shape[-1]
    if n == 1:
        return x.clone()
    lead, h = x.shape[:-1], 1
    while h < n:
        pairs = x.reshape(*lead, n // (2 * h), 2, h)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2)
        h *= 2
    return x.reshape(*lead, n)
