"""Numbers of a few bits: levels of a bucket's norm in bit planes, and codes of a block's scale in records.

Shape suffixes: C clients, D parameters, N buckets or blocks, n numbers of one, b bits of a number, B bytes, R bytes of
a block's record, L levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpi import random
from fedmpi.ops import bits, fast, pages
from fedmpi.ops.flags import Flag
from fedmpi.ops.sums import dots, squares_reference

SCALE = 4  # bytes


def bucket_squares(g_CD: Tensor, bucket: int) -> Tensor:
    """Σ g² of each stretch of ``bucket`` numbers, float64 ``(C, N)``: exact squares, added up as :func:`sums.dots`
    does. The last may be shorter."""
    if bucket >= g_CD.shape[1]:
        return dots(g_CD, g_CD)[1][:, None]
    kernels = fast.compiled("quantize", g_CD) if g_CD.dtype == torch.float32 else None
    if kernels is None or bucket > kernels.BLOCK:
        return bucket_squares_reference(g_CD, bucket)
    out_CN = torch.empty(len(g_CD), -(-g_CD.shape[1] // bucket), dtype=torch.float64, device=g_CD.device)
    for g_D, out_N in zip(g_CD.contiguous(), out_CN, strict=True):
        fast.run(kernels.squares, len(out_N), g_D.numpy(), bucket, out_N.numpy())
    return out_CN


def bucket_squares_reference(g_CD: Tensor, bucket: int) -> Tensor:
    """:func:`bucket_squares` by torch."""
    return squares_reference(_stretches(g_CD, bucket))


def bucket_largest(g_CD: Tensor, bucket: int) -> Tensor:
    """max |g| of each stretch of ``bucket`` numbers, ``(C, N)``."""
    kernels = fast.compiled("quantize", g_CD) if g_CD.dtype == torch.float32 else None
    if kernels is None:
        return bucket_largest_reference(g_CD, bucket)
    out_CN = torch.empty(len(g_CD), -(-g_CD.shape[1] // bucket), device=g_CD.device)
    for g_D, out_N in zip(g_CD.contiguous(), out_CN, strict=True):
        fast.run(kernels.largest, len(out_N), g_D.numpy(), bucket, out_N.numpy())
    return out_CN


def bucket_largest_reference(g_CD: Tensor, bucket: int) -> Tensor:
    """:func:`bucket_largest` by torch."""
    return _stretches(g_CD.abs(), bucket).amax(2)


def _stretches(g_CD: Tensor, bucket: int) -> Tensor:
    size = g_CD.shape[1]
    return F.pad(g_CD, (0, -size % bucket)).view(len(g_CD), -1, bucket)


def spread(norms_CN: Tensor, bucket: int, size: int) -> Tensor:
    """Each entry's own norm, ``(C, D)``."""
    return norms_CN.repeat_interleave(bucket, 1)[:, :size]


def to_planes(g_CD: Tensor, norms_CN: Tensor, bucket: int, width: int, keys_C: Tensor) -> Tensor:
    """|g| over its bucket's norm, stochastically rounded (by the keys) to a level 0 … 2^(b−1) − 1, as b planes of bits,
    uint8 ``(C, b, B)``: plane 0 says what is negative."""
    kernels = fast.compiled("quantize", g_CD, norms_CN) if g_CD.dtype == torch.float32 else None
    if kernels is None:
        return to_planes_reference(g_CD, norms_CN, bucket, width, keys_C)
    size = g_CD.shape[1]
    out_CbB = torch.empty(len(g_CD), width, bits.nbytes(size), dtype=torch.uint8, device=g_CD.device)
    constants, chunks = random.constants().numpy(), -(-size // kernels.CHUNK)
    rows = zip(g_CD.contiguous(), norms_CN.contiguous(), keys_C.tolist(), out_CbB, strict=True)
    for g_D, norms_N, key, out_bB in rows:
        arguments = g_D.numpy(), norms_N.numpy(), bucket, width, key, constants, out_bB.numpy()
        fast.run(kernels.planes_encode, chunks, *arguments)
    return out_CbB


def to_planes_reference(g_CD: Tensor, norms_CN: Tensor, bucket: int, width: int, keys_C: Tensor) -> Tensor:
    """:func:`to_planes` by torch."""
    # No entry exceeds its norm, so that x ≤ s; in a bucket of zeros any divisor gives level 0.
    norms_CD = spread(norms_CN.where(norms_CN > 0, 1.0), bucket, g_CD.shape[1])
    x_CD = g_CD.abs() / norms_CD * (2 ** (width - 1) - 1)
    low_CD = x_CD.floor()
    up_CD = random.uniform(keys_C, g_CD.shape[1], g_CD.device) < x_CD - low_CD
    level_CD = (low_CD + up_CD).to(torch.uint8)
    planes = [g_CD < 0, *((level_CD >> i) & 1 for i in range(width - 1))]
    return torch.stack([bits.pack_reference(plane_CD) for plane_CD in planes], 1)


def from_planes(planes_CbB: Tensor, norms_CN: Tensor, bucket: int, size: int) -> Tensor:
    """The numbers ``(C, D)`` of :func:`to_planes`."""
    kernels = fast.compiled("quantize", planes_CbB, norms_CN, count=size * len(planes_CbB))
    if kernels is None:
        return from_planes_reference(planes_CbB, norms_CN, bucket, size)
    out_CD = pages.empty(len(planes_CbB), size, device=planes_CbB.device)
    rows = zip(planes_CbB.contiguous(), norms_CN.contiguous(), out_CD, strict=True)
    for planes_bB, norms_N, out_D in rows:
        arguments = planes_bB.numpy(), norms_N.numpy(), bucket, out_D.numpy()
        fast.run(kernels.planes_decode, -(-size // kernels.CHUNK), *arguments)
    return out_CD


def from_planes_reference(planes_CbB: Tensor, norms_CN: Tensor, bucket: int, size: int) -> Tensor:
    """:func:`from_planes` by torch."""
    negative_CD, *levels = (bits.unpack_reference(p, size) for p in planes_CbB.unbind(1))
    level_CD = torch.zeros_like(negative_CD, dtype=torch.uint8)
    for i, plane_CD in enumerate(levels):
        level_CD |= plane_CD.to(torch.uint8) << i
    v_CD = level_CD.float() / (2 ** len(levels) - 1) * spread(norms_CN, bucket, size)
    return torch.where(negative_CD, -v_CD, v_CD)


def to_records(
    x_CD: Tensor, block: int, width: int, levels_L: Tensor, even: bool, keys_C: Tensor | None, start: int = 0
) -> Tensor:
    """Blocks of numbers as records of a scale (float32) and codes of 8 or 4 bits, uint8 ``(C, N, R)``; the last block
    is filled with zeros.

    Args:
      levels_L: what the codes mean of a scale of 1, increasing; ``even``: evenly spaced around the code of 0.
      keys_C: round to one of the two levels around a number by its word, from word ``start`` on; None: to the nearest.
    """
    kernels = fast.compiled("quantize", x_CD) if x_CD.dtype == torch.float32 else None
    if kernels is None:
        return to_records_reference(x_CD, block, width, levels_L, even, keys_C, start)
    number, record = -(-x_CD.shape[1] // block), SCALE + block * width // 8
    out_CNR = torch.empty(len(x_CD), number, record, dtype=torch.uint8, device=x_CD.device)
    keys = [0] * len(x_CD) if keys_C is None else keys_C.tolist()
    drawn = keys_C is not None, start, random.constants().numpy()
    for x_D, key, out_NR in zip(x_CD.contiguous(), keys, out_CNR, strict=True):
        arguments = x_D.numpy(), block, levels_L.numpy(), even, drawn[0], key, *drawn[1:], out_NR.numpy()
        fast.run(kernels.blocks_encode, number, *arguments)
    return out_CNR


def to_records_reference(
    x_CD: Tensor, block: int, width: int, levels_L: Tensor, even: bool, keys_C: Tensor | None, start: int = 0
) -> Tensor:
    """:func:`to_records` by torch."""
    x_CNn = _stretches(x_CD, block).nan_to_num(0.0)
    u_CNn = None
    if keys_C is not None:
        words = random.bits(keys_C, x_CNn[0].numel(), start, device=x_CD.device)
        u_CNn = ((words >> 40) & ((1 << 24) - 1)).float().mul_(2.0**-24).view_as(x_CNn)
    scale_CN1 = x_CNn.abs().amax(-1, keepdim=True)
    # No magnitude exceeds its scale; in a block of zeros any divisor does.
    x_CNn = x_CNn / scale_CN1.where(scale_CN1 > 0, 1.0)
    code_CNn = (_even if even else _uneven)(x_CNn, u_CNn, levels_L).to(torch.uint8)
    if width == 4:
        code_CNn = code_CNn[..., ::2] | (code_CNn[..., 1::2] << 4)
    return torch.cat([scale_CN1.contiguous().view(torch.uint8), code_CNn], -1)


def _even(x_CNn: Tensor, u_CNn: Tensor | None, levels_L: Tensor) -> Tensor:
    half = len(levels_L) // 2
    x_CNn = x_CNn * half
    if u_CNn is None:
        return x_CNn.round_().add_(half)
    low_CNn = x_CNn.floor()
    return low_CNn.add_(u_CNn < x_CNn - low_CNn).add_(half)


def _uneven(x_CNn: Tensor, u_CNn: Tensor | None, levels_L: Tensor) -> Tensor:
    if u_CNn is None:
        return torch.bucketize(x_CNn, (levels_L[1:] + levels_L[:-1]) / 2)
    low_CNn = (torch.bucketize(x_CNn, levels_L, right=True) - 1).clamp_(0, len(levels_L) - 2)
    below_CNn = levels_L[low_CNn]
    return low_CNn + (u_CNn < (x_CNn - below_CNn) / (levels_L[low_CNn + 1] - below_CNn))


def from_records(records_CNR: Tensor, block: int, levels_L: Tensor, size: int) -> tuple[Tensor, Flag]:
    """The first ``size`` numbers ``(C, size)`` of :func:`to_records`; False beside them, which are of no use, where a
    scale is no magnitude or a code has no level."""
    kernels = fast.compiled("quantize", records_CNR, count=size * len(records_CNR))
    if kernels is None:
        return from_records_reference(records_CNR, block, levels_L, size)
    out_CD = pages.empty(len(records_CNR), size, device=records_CNR.device)
    bad_1 = torch.zeros(1, dtype=torch.uint8, device=records_CNR.device)
    for records_NR, out_D in zip(records_CNR.contiguous(), out_CD, strict=True):
        arguments = records_NR.numpy(), block, levels_L.numpy(), out_D.numpy(), bad_1.numpy()
        fast.run(kernels.blocks_decode, len(records_NR), *arguments)
    return out_CD, not bool(bad_1)


def from_records_reference(
    records_CNR: Tensor, block: int, levels_L: Tensor, size: int
) -> tuple[Tensor, Flag]:
    """:func:`from_records` by torch."""
    # A copy: of a single block the slice is contiguous as it is, with strides that no float32 has.
    scale_CN1 = records_CNR[..., :SCALE].clone(memory_format=torch.contiguous_format).view(torch.float32)
    code_CNn = records_CNR[..., SCALE:]
    if code_CNn.shape[-1] < block:
        code_CNn = torch.stack([code_CNn & 15, code_CNn >> 4], -1).flatten(-2)
    good = ((scale_CN1 >= 0) & scale_CN1.isfinite()).all() & (code_CNn < len(levels_L)).all()
    code_CNn = code_CNn.clamp(max=len(levels_L) - 1)
    v_CD = (levels_L[code_CNn.int()] * scale_CN1).flatten(1)[:, :size]
    return v_CD, good if fast.waits(v_CD) else bool(good)
