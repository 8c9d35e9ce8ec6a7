"""Sums whose bits depend on nothing but the numbers: inner products as a tree, and fixed point.

Shape suffixes: C clients, S numbers of a vector, B blocks of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.ops.flags import Flag

_BLOCK = 1 << 10
_FRACTION = 40


def dots(v_CS: Tensor, w_CS: Tensor) -> Tensor:
    """<v, w>, <v, v> and <w, w> of each pair of float32 rows, float64 ``(3, C)``, in one pass over them.

    Products are exact; they are added up in float64 as a tree of blocks of 1024.
    """
    kernels = fast.compiled("sums", v_CS, w_CS)
    if kernels is None or v_CS.shape != w_CS.shape or {v_CS.dtype, w_CS.dtype} != {torch.float32}:
        return dots_reference(v_CS, w_CS)
    blocks = -(-v_CS.shape[1] // kernels.BLOCK)
    blocks_3CB = torch.empty(3, len(v_CS), blocks, dtype=torch.float64, device=v_CS.device)
    for c, (v_S, w_S) in enumerate(zip(v_CS.contiguous(), w_CS.contiguous(), strict=True)):
        kernels.dots(v_S, w_S, blocks_3CB[:, c])
    return _tree(blocks_3CB)


def dots_reference(v_CS: Tensor, w_CS: Tensor) -> Tensor:
    """:func:`dots` by torch."""
    v, w = v_CS.double(), w_CS.double()
    products = torch.stack((v * w, v * v, w * w))
    products = torch.nn.functional.pad(products, (0, -products.shape[-1] % _BLOCK))
    return _tree(_tree(products.unflatten(-1, (-1, _BLOCK))))


def absolute(v_CS: Tensor) -> Tensor:
    """Σ|v| of each float32 row, float64 ``(C,)``, in one pass: added up as :func:`dots` does."""
    kernels = fast.compiled("sums", v_CS)
    if kernels is None or v_CS.dtype != torch.float32:
        return absolute_reference(v_CS)
    blocks = -(-v_CS.shape[1] // kernels.BLOCK)
    blocks_CB = torch.empty(len(v_CS), blocks, dtype=torch.float64, device=v_CS.device)
    for v_S, blocks_B in zip(v_CS.contiguous(), blocks_CB, strict=True):
        kernels.absolute(v_S, blocks_B)
    return _tree(blocks_CB)


def absolute_reference(v_CS: Tensor) -> Tensor:
    """:func:`absolute` by torch."""
    v = torch.nn.functional.pad(v_CS.abs().double(), (0, -v_CS.shape[-1] % _BLOCK))
    return _tree(_tree(v.unflatten(-1, (-1, _BLOCK))))


def squares_reference(x: Tensor) -> Tensor:
    """Σ x² over the last axis, float64, added up as :func:`dots` does."""
    x = x.double()
    products = torch.nn.functional.pad(x * x, (0, -x.shape[-1] % _BLOCK))
    return _tree(_tree(products.unflatten(-1, (-1, _BLOCK))))


def _tree(x: Tensor) -> Tensor:
    """The sum over the last axis: filled with zeros to a power of two, then the upper half added to the lower."""
    x = torch.nn.functional.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        low, high = x.chunk(2, -1)
        x = low + high
    return x[..., 0]


def finite(*tensors: Tensor) -> bool:
    """No infinity or NaN in any. A finite sum has neither in it, and takes one pass at memory's speed; one that is not
    finite may have overflowed, and then the entries are looked at. A device is asked once for all of them."""
    return bool(are_finite(*tensors))


def are_finite(*tensors: Tensor) -> Flag:
    """:func:`finite`; a device is not asked."""
    floats = [x for x in tensors if x.is_floating_point()]
    there = [x.sum().isfinite() | x.isfinite().all() for x in floats if fast.waits(x)]
    here = (x for x in floats if not fast.waits(x))
    if not all(math.isfinite(float(x.sum())) or bool(x.isfinite().all()) for x in here):
        return False
    return torch.stack(there).all() if there else True


def finite_rows(x_C: Tensor) -> Tensor:
    """:func:`finite` of each of C tensors, bool ``(C,)``."""
    if not x_C.is_floating_point():
        return torch.ones(len(x_C), dtype=torch.bool, device=x_C.device)
    rows_CN = x_C.flatten(1) if x_C.ndim > 1 else x_C[:, None]
    good_C = rows_CN.sum(1).isfinite()
    if fast.waits(x_C):  # not asked
        return good_C | rows_CN.isfinite().all(1)
    return good_C if bool(good_C.all()) else rows_CN.isfinite().all(1)


def to_fixed(values: Tensor) -> Tensor:
    """float64 → int64 multiples of 2^-40."""
    return (values * 2.0**_FRACTION).round().to(torch.int64)


def from_fixed(values: Tensor) -> Tensor:
    """int64 multiples of 2^-40 → float64."""
    return values.double() * 2.0**-_FRACTION


def add_fixed(total_S: Tensor, v_S: Tensor, weight: float, largest: float) -> bool:
    """total += to_fixed(v · weight). False, and a total of no use, if some |v · weight| is not ≤ ``largest``."""
    kernels = fast.compiled("sums", v_S, total_S)
    fit = v_S.shape == total_S.shape and total_S.is_contiguous()
    if kernels is None or v_S.dtype != torch.float32 or not fit:
        return add_fixed_reference(total_S, v_S, weight, largest)
    fits_B = torch.empty(-(-len(v_S) // kernels.BLOCK), dtype=torch.bool, device=v_S.device)
    kernels.add_fixed(total_S, v_S.contiguous(), weight, 2.0**_FRACTION, largest, fits_B)
    return bool(fits_B.all())


def add_fixed_reference(total_S: Tensor, v_S: Tensor, weight: float, largest: float) -> bool:
    """:func:`add_fixed` by torch."""
    weighted_S = v_S.double() * weight
    if not bool((weighted_S.abs() <= largest).all()):
        return False
    total_S += to_fixed(weighted_S)
    return True
