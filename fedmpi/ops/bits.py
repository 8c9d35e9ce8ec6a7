"""Bit packing, little-endian: bit i of a row is bit ``i % 8`` of byte ``i // 8``.

Shape suffixes: C clients, W voters, N bits or integers, B bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpi import random
from fedmpi.ops import fast


def nbytes(n: int, width: int = 1) -> int:
    """Bytes that ``n`` integers of ``width`` bits take."""
    return -(-n * width // 8)


def pack(bits_CN: Tensor) -> Tensor:
    """Bools ``(C, N)`` → uint8 ``(C, ceil(N/8))``; unused bits are 0."""
    kernels = fast.compiled("bits", bits_CN) if bits_CN.dtype == torch.bool else None
    if kernels is None or not bits_CN.numel():
        return pack_reference(bits_CN)
    shape = *bits_CN.shape[:-1], nbytes(bits_CN.shape[-1])
    packed_CB = torch.empty(shape, dtype=torch.uint8, device=bits_CN.device)
    kernels.pack(bits_CN.contiguous(), packed_CB)
    return packed_CB


def pack_reference(bits_CN: Tensor) -> Tensor:
    """:func:`pack` by torch."""
    n = bits_CN.shape[-1]
    padded = F.pad(bits_CN.to(torch.uint8), (0, -n % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_CN.device)
    bytes_CB8 = padded.view(*padded.shape[:-1], nbytes(n), 8)
    return (bytes_CB8 << shifts).sum(-1, dtype=torch.uint8)  # eight different bits: no overflow


def unpack(bytes_CB: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack`: bools ``(C, n)``."""
    lead = bytes_CB.shape[:-1]
    out_CN = torch.empty(*lead, n, dtype=torch.uint8, device=bytes_CB.device)
    kernels = fast.compiled("bits", out_CN)
    if kernels is None or not out_CN.numel() or bytes_CB.shape[-1] != nbytes(n):
        return unpack_reference(bytes_CB, n)
    one_C = torch.ones(lead.numel(), dtype=torch.uint8, device=out_CN.device)
    kernels.unpack(bytes_CB.contiguous(), one_C, 1 - one_C, out_CN)
    return out_CN.view(torch.bool)


def unpack_reference(bytes_CB: Tensor, n: int) -> Tensor:
    """:func:`unpack` by torch."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_CB.device)
    return ((bytes_CB.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :n].bool()


def pack_signs(g_CN: Tensor, keys_C: Tensor, odd_1: Tensor | None = None) -> Tensor:
    """The signs of each row, packed: 1 for a positive entry, 0 for a negative one (and NaN), and where it is 0 the
    coin that :func:`fedmpi.random.coins` gives the row's key. No pass over the vector but this one.

    Args:
      odd_1: uint8, becomes 1 if any entry is infinite or NaN.
    """
    kernels = fast.compiled("bits", g_CN) if g_CN.dtype == torch.float32 else None
    if kernels is None or len(keys_C) != len(g_CN):
        return pack_signs_reference(g_CN, keys_C, odd_1)
    packed_CB = torch.empty(len(g_CN), nbytes(g_CN.shape[1]), dtype=torch.uint8, device=g_CN.device)
    odd_1 = torch.zeros(1, dtype=torch.uint8, device=g_CN.device) if odd_1 is None else odd_1
    kernels.pack_signs(g_CN.contiguous(), keys_C.contiguous(), random.constants(), packed_CB, odd_1)
    return packed_CB


def pack_signs_reference(g_CN: Tensor, keys_C: Tensor, odd_1: Tensor | None = None) -> Tensor:
    """:func:`pack_signs` by torch."""
    if odd_1 is not None:
        odd_1 |= ~g_CN.isfinite().all()
    positive_CN, zero_CN = g_CN > 0, g_CN == 0
    if fast.waits(g_CN) or bool(zero_CN.any()):
        positive_CN |= zero_CN & random.coins(keys_C, g_CN.shape[1], g_CN.device)
    return pack_reference(positive_CN)


_VOTES = (torch.int8, torch.int16, torch.int32, torch.float32)


def pack_votes(votes_N: Tensor, key: int) -> Tensor:
    """What the sum of ±1 came to ``(N,)``, packed ``(B,)``: 1 where it is positive, and where it is 0 the key's coin
    (:func:`fedmpi.random.coins`)."""
    kernels = fast.compiled("bits", votes_N) if votes_N.dtype in _VOTES else None
    if kernels is None or not votes_N.is_contiguous():
        return pack_votes_reference(votes_N, key)
    packed_B = torch.empty(nbytes(len(votes_N)), dtype=torch.uint8, device=votes_N.device)
    kernels.pack_votes(votes_N, key, random.constants(), packed_B)
    return packed_B


def pack_votes_reference(votes_N: Tensor, key: int) -> Tensor:
    """:func:`pack_votes` by torch."""
    positive_N, tie_N = votes_N > 0, votes_N == 0
    if fast.waits(votes_N) or bool(tie_N.any()):
        positive_N |= tie_N & random.coins(key, len(votes_N), votes_N.device)
    return pack_reference(positive_N[None])[0]


def unpack_signs(
    bytes_CB: Tensor, n: int, scale_C: Tensor | None = None, out_CN: Tensor | None = None
) -> Tensor:
    """Packed signs as int8 ±1 ``(C, n)``; with float32 ``scale_C``, as ± a row's scale. In ``out_CN`` (contiguous,
    of that type), where it is given."""
    dtype = torch.int8 if scale_C is None else torch.float32
    if out_CN is None:
        out_CN = torch.empty(len(bytes_CB), n, dtype=dtype, device=bytes_CB.device)
    kernels = fast.compiled("bits", out_CN)
    fit = bytes_CB.shape[1] == nbytes(n) and (scale_C is None or len(scale_C) == len(bytes_CB))
    if kernels is None or not fit:
        return out_CN.copy_(unpack_signs_reference(bytes_CB, n, scale_C))
    plus_C = (
        torch.ones(len(bytes_CB), dtype=dtype, device=out_CN.device)
        if scale_C is None
        else scale_C.contiguous()
    )
    kernels.unpack(bytes_CB.contiguous(), plus_C, -plus_C, out_CN)
    return out_CN


def unpack_signs_reference(bytes_CB: Tensor, n: int, scale_C: Tensor | None = None) -> Tensor:
    """:func:`unpack_signs` by torch."""
    v_CN = unpack_reference(bytes_CB, n).to(torch.int8).mul_(2).sub_(1)
    return v_CN if scale_C is None else v_CN * scale_C[:, None]


def empty_rows(g_CN: Tensor, starts_R: Tensor) -> Tensor:
    """Which rows of each vector hold nothing but zeros, bool ``(C, R)``; ``starts`` are those of R rows, then N
    (:meth:`fedmpi.spec.Spec.rows_on`)."""
    kernels = fast.compiled("bits", g_CN) if g_CN.dtype == torch.float32 else None
    if kernels is None:
        return empty_rows_reference(g_CN, starts_R)
    out_CR = torch.empty(len(g_CN), len(starts_R) - 1, dtype=torch.bool, device=g_CN.device)
    kernels.empty_rows(g_CN.contiguous(), starts_R, out_CR)
    return out_CR


def empty_rows_reference(g_CN: Tensor, starts_R: Tensor) -> Tensor:
    """:func:`empty_rows` by torch."""
    count_CN = F.pad((g_CN != 0).cumsum(1, dtype=torch.int32), (1, 0))
    return count_CN[:, starts_R].diff(dim=1) == 0


def clear_rows(v_CN: Tensor, empty_CR: Tensor, starts_R: Tensor) -> Tensor:
    """``v``, in whose own memory those rows have become zeros."""
    kernels = fast.compiled("bits", v_CN)
    if kernels is None or not v_CN.is_contiguous():
        return clear_rows_reference(v_CN, empty_CR, starts_R)
    kernels.clear_rows(v_CN, empty_CR.contiguous(), starts_R)
    return v_CN


def clear_rows_reference(v_CN: Tensor, empty_CR: Tensor, starts_R: Tensor) -> Tensor:
    """:func:`clear_rows` by torch."""
    return v_CN.masked_fill_(spread_rows(empty_CR, starts_R, v_CN.shape[1]), 0)


def spread_rows(flag_CR: Tensor, starts_R: Tensor, n: int) -> Tensor:
    """Each row's flag for all its entries ``(C, N)``; N is the last of the starts, which is not asked for it."""
    return flag_CR.repeat_interleave(starts_R.diff(), 1, output_size=n)


def majority(packed_WB: Tensor, tie_B: Tensor) -> Tensor:
    """The bits ``(B,)`` that more than half of W packed rows have; where just half have it, that of ``tie_B``."""
    kernels = fast.compiled("bits", packed_WB, tie_B)
    if kernels is None or packed_WB.shape[1:] != tie_B.shape:
        return majority_reference(packed_WB, tie_B)
    out_B = torch.empty_like(tie_B, memory_format=torch.contiguous_format)
    kernels.majority(packed_WB.contiguous(), tie_B.contiguous(), out_B)
    return out_B


def majority_reference(packed_WB: Tensor, tie_B: Tensor) -> Tensor:
    """:func:`majority` by torch."""
    n = 8 * packed_WB.shape[1]
    twice_N = 2 * unpack_reference(packed_WB, n).sum(0)
    tie_N = unpack_reference(tie_B[None], n)[0]
    return pack_reference((twice_N > len(packed_WB)) | ((twice_N == len(packed_WB)) & tie_N))


def vote(packed_WB: Tensor, key: int, start: int = 0) -> Tensor:
    """:func:`majority` with ties that fall as the key's :func:`fedmpi.random.coins` do, of which bit ``start`` (a
    multiple of 64) belongs to the first entry. Two voters, as in most data-parallel jobs, need no tally."""
    kernels = fast.compiled("bits", packed_WB) if len(packed_WB) == 2 else None
    size = packed_WB.shape[1]
    if kernels is None:
        return majority(packed_WB, _coin_bytes(key, size, start, packed_WB.device))
    out_B = torch.empty(size, dtype=torch.uint8, device=packed_WB.device)
    kernels.vote_of_two(packed_WB.contiguous(), key, start // 64, random.constants(), out_B)
    return out_B


def vote_reference(packed_WB: Tensor, key: int, start: int = 0) -> Tensor:
    """:func:`vote` by torch."""
    return majority_reference(packed_WB, _coin_bytes(key, packed_WB.shape[1], start, packed_WB.device))


def vote_of_present(
    packed_WB: Tensor, present_WR: Tensor, starts_R: Tensor, size: int, key: int, start: int = 0
) -> Tensor:
    """:func:`vote` in which only the voters that are present in a row count there.

    Args:
      packed_WB: of the entries from ``start`` on, which is the first one's bit of the coins, too.
      present_WR: bool; after the last row nobody is present.
      starts_R: where rows begin, and where the last one ends, which is ``size``.
    """
    kernels = fast.compiled("votes", packed_WB)
    if kernels is None:
        return vote_of_present_reference(packed_WB, present_WR, starts_R, size, key, start)
    out_B = vote(packed_WB, key, start)
    rows = packed_WB.contiguous(), present_WR.contiguous(), starts_R
    kernels.vote_of_present(*rows, start, key, start // 64, random.constants(), out_B)
    return out_B


def vote_of_present_reference(
    packed_WB: Tensor, present_WR: Tensor, starts_R: Tensor, size: int, key: int, start: int = 0
) -> Tensor:
    """:func:`vote_of_present` by torch."""
    count = packed_WB.shape[1]
    present_WN = spread_rows(present_WR, starts_R, size)[:, start : start + 8 * count]
    present_WN = F.pad(present_WN, (0, 8 * count - present_WN.shape[1]))
    tally_N = torch.zeros(8 * count, dtype=torch.int32, device=packed_WB.device)
    for packed_B, present_N in zip(packed_WB, present_WN, strict=True):
        tally_N += unpack(packed_B[None], 8 * count)[0].to(torch.int8).mul_(2).sub_(1) * present_N
    tie_N = unpack(_coin_bytes(key, count, start, packed_WB.device)[None], 8 * count)[0]
    return pack(((tally_N > 0) | ((tally_N == 0) & tie_N))[None])[0]


def _coin_bytes(key: int, size: int, start: int, device: torch.device) -> Tensor:
    return random.bits(key, -(-size // 8), start // 64, device).view(torch.uint8)[:size]


def index_width(n: int) -> int:
    """Bits of an index into ``range(n)``: ceil(log2 n)."""
    return (n - 1).bit_length()


_WIDEST = 56  # that a word holds beside seven bits of the value before


def pack_integers(values_CN: Tensor, width: int) -> Tensor:
    """int64 ``(C, N)`` with values below 2^width → uint8 ``(C, ceil(N · width / 8))``."""
    fit = values_CN.dtype == torch.int64 and width <= _WIDEST
    kernels = fast.compiled("bits", values_CN, count=values_CN.numel() * width) if fit else None
    if kernels is None or not width:
        return pack_integers_reference(values_CN, width)
    rows, n = values_CN.shape
    packed_CB = torch.empty(rows, nbytes(n, width), dtype=torch.uint8, device=values_CN.device)
    for values_N, packed_B in zip(values_CN.contiguous(), packed_CB, strict=True):
        kernels.pack_integers(values_N, width, packed_B)
    return packed_CB


def pack_integers_reference(values_CN: Tensor, width: int) -> Tensor:
    """:func:`pack_integers` by torch."""
    shifts = torch.arange(width, device=values_CN.device)
    return pack_reference(((values_CN.unsqueeze(-1) >> shifts) & 1).flatten(-2))


def unpack_integers(bytes_CB: Tensor, n: int, width: int) -> Tensor:
    """The inverse of :func:`pack_integers`: int64 ``(C, n)``."""
    kernels = fast.compiled("bits", bytes_CB, count=8 * bytes_CB.numel()) if width <= _WIDEST else None
    if kernels is None or not width or bytes_CB.ndim != 2 or bytes_CB.shape[1] != nbytes(n, width):
        return unpack_integers_reference(bytes_CB, n, width)
    values_CN = torch.empty(len(bytes_CB), n, dtype=torch.int64, device=bytes_CB.device)
    for bytes_B, values_N in zip(bytes_CB.contiguous(), values_CN, strict=True):
        kernels.unpack_integers(bytes_B, width, values_N)
    return values_CN


def unpack_integers_reference(bytes_CB: Tensor, n: int, width: int) -> Tensor:
    """:func:`unpack_integers` by torch."""
    bits_CNW = unpack_reference(bytes_CB, n * width).view(*bytes_CB.shape[:-1], n, width).long()
    return (bits_CNW << torch.arange(width, device=bytes_CB.device)).sum(-1)
