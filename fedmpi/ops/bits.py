"""Bit packing, little-endian: bit i of a row is bit ``i % 8`` of byte ``i // 8``.

Shape suffixes: C clients, N bits or integers, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nbytes(n: int, width: int = 1) -> int:
    """Bytes that ``n`` integers of ``width`` bits take."""
    return -(-n * width // 8)


def pack(bits_CN: Tensor) -> Tensor:
    """Bools ``(C, N)`` → uint8 ``(C, ceil(N/8))``; unused bits are 0."""
    n = bits_CN.shape[-1]
    padded = torch.nn.functional.pad(bits_CN.to(torch.uint8), (0, -n % 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits_CN.device)
    bytes_CB8 = padded.view(*padded.shape[:-1], nbytes(n), 8)
    return (bytes_CB8 * weights).sum(-1, dtype=torch.uint8)  # eight different weights: no overflow


def unpack(bytes_CB: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack`: bools ``(C, n)``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_CB.device)
    return ((bytes_CB.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :n].bool()


def index_width(n: int) -> int:
    """Bits of an index into ``range(n)``: ceil(log2 n)."""
    return (n - 1).bit_length()


def pack_integers(values_CN: Tensor, width: int) -> Tensor:
    """int64 ``(C, N)`` with values below 2^width → uint8 ``(C, ceil(N · width / 8))``."""
    shifts = torch.arange(width, device=values_CN.device)
    return pack(((values_CN.unsqueeze(-1) >> shifts) & 1).flatten(-2))


def unpack_integers(bytes_CB: Tensor, n: int, width: int) -> Tensor:
    """The inverse of :func:`pack_integers`: int64 ``(C, n)``."""
    bits_CNW = unpack(bytes_CB, n * width).view(*bytes_CB.shape[:-1], n, width).long()
    return (bits_CNW << torch.arange(width, device=bytes_CB.device)).sum(-1)
