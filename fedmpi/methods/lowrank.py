"""Gradients as matrices, one a layer: what the methods that send factors share.

A parameter of two or more dimensions is the matrix (out, everything else): a convolution (out, in, h, w)
is (out, in·h·w). It travels as factors where these take fewer numbers than it has; all other
parameters (biases, norms, small layers) are *dense* and travel as they are, one after the other.

What a receiver computes from factors (products, orthonormal columns) it does with additions,
multiplications, divisions and roots of single elements in a fixed order, whose results IEEE 754
fixes: two ends of a message agree to the bit also on different processors, where a library's matrix product
need not.

Shape suffixes: C clients, D parameters, N rows and M columns of a layer's matrix, R columns of a factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.ops import fast
from fedmpi.spec import Spec


class Layer(NamedTuple):
    """A parameter that travels as factors: an (N, M) matrix that starts at ``start`` of the flat vector."""

    name: str
    start: int
    rows: int
    columns: int

    def of(self, flat_CD: Tensor) -> Tensor:
        """Its matrices ``(C, N, M)``, a view of ``flat_CD``."""
        size = self.rows * self.columns
        return flat_CD[:, self.start : self.start + size].view(-1, self.rows, self.columns)


class Layers:
    """Which parameters travel as ``rank`` columns and rows a layer, and which are dense.

    Attributes:
      factored: the layers with rank · (N + M) < N · M.
      dense_size: how many numbers the other parameters have.
    """

    def __init__(self, spec: Spec, rank: int) -> None:
        self.spec_size = spec.size
        self.factored: list[Layer] = []
        self._dense: list[slice] = []
        start = 0
        for name, shape, size in zip(spec.names, spec.shapes, spec.sizes, strict=True):
            rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, size)
            if rank * (rows + columns) < rows * columns:
                self.factored.append(Layer(name, start, rows, columns))
            else:
                self._dense.append(slice(start, start + size))
            start += size
        self.dense_size = sum(s.stop - s.start for s in self._dense)

    def dense(self, flat_CD: Tensor) -> Tensor:
        """The dense parameters' numbers ``(C, dense_size)``, a copy."""
        return torch.cat([flat_CD[:, :0], *(flat_CD[:, s] for s in self._dense)], dim=1)

    def with_dense(self, dense: Tensor) -> Tensor:
        """A vector ``(C, D)`` with the dense parameters' numbers and zeros elsewhere."""
        flat_CD = dense.new_zeros(len(dense), self.spec_size)
        self.set_dense(flat_CD, dense)
        return flat_CD

    def set_dense(self, flat_CD: Tensor, dense: Tensor) -> None:
        """Give the dense parameters these numbers ``(C, dense_size)``."""
        parts = dense.split([s.stop - s.start for s in self._dense], dim=1)
        for s, part in zip(self._dense, parts, strict=True):
            flat_CD[:, s] = part


def add_outer(total_CNM: Tensor, left_CN: Tensor, right_CM: Tensor) -> None:
    """Add a product of a column and a row to each matrix, in place."""
    total_CNM += left_CN[:, :, None] * right_CM[:, None, :]


def set_product(out_CNM: Tensor, left_NR: Tensor, right_CMR: Tensor) -> None:
    """Each matrix becomes left · rightᵀ: terms are added in the order of R."""
    if _compiled("product", out_CNM, left_NR, right_CMR):
        return
    out_CNM.zero_()
    for r in range(left_NR.shape[1]):
        add_outer(out_CNM, left_NR[None, :, r], right_CMR[:, :, r])


def subtract_product(out_CNM: Tensor, left_NR: Tensor, right_CMR: Tensor) -> None:
    """Each matrix less left · rightᵀ, as :func:`set_product` makes it."""
    if _compiled("subtract", out_CNM, left_NR, right_CMR):
        return
    product_CNM = torch.empty_like(out_CNM)
    set_product(product_CNM, left_NR, right_CMR)
    out_CNM -= product_CNM


def _compiled(kernel: str, out_CNM: Tensor, left_NR: Tensor, right_CMR: Tensor) -> bool:
    """Let a kernel do it; False where it does not pay, or cannot be had."""
    kernels = fast.compiled("lowrank", out_CNM)
    if kernels is None:
        return False
    for out_NM, right_MR in zip(out_CNM, right_CMR, strict=True):
        factors = left_NR.contiguous().numpy(), right_MR.T.contiguous().numpy()
        fast.run(getattr(kernels, kernel), len(out_NM), *factors, out_NM.numpy())
    return True


def orthonormal(p_NR: Tensor, threshold: float = 1e-5, count: int = 0) -> Tensor:
    """Columns that span what those of ``p_NR`` span, float32, by modified Gram–Schmidt in float64.

    A column of which the earlier ones leave at most ``threshold`` of its length is zero (as one that was
    zero before): normalised, it would be a direction made of rounding errors.

    Args:
      count: numbers of the vector of which this is a part: of a large one, kernels are loaded for this, too.
    """
    kernels = fast.compiled("lowrank", p_NR, count=max(count, p_NR.numel()))
    if kernels is None:
        return orthonormal_reference(p_NR, threshold)
    columns_RN = p_NR.T.double().contiguous()
    room = torch.empty(1 << (len(p_NR) - 1).bit_length(), dtype=torch.float64, device="cpu")
    kernels.orthonormal(columns_RN.numpy(), room.numpy(), threshold)
    return columns_RN.T.float().contiguous()


def orthonormal_reference(p_NR: Tensor, threshold: float = 1e-5) -> Tensor:
    """:func:`orthonormal` by torch."""
    rest_NR = p_NR.double()
    length_R = column_sums(rest_NR * rest_NR).sqrt()
    columns = []
    for r in range(p_NR.shape[1]):
        column_N1 = rest_NR[:, :1]
        length_1 = column_sums(column_N1 * column_N1).sqrt()
        keep_1 = length_1 > threshold * length_R[r]
        unit_N1 = torch.where(keep_1, column_N1 / torch.where(keep_1, length_1, 1.0), 0.0)
        columns.append(unit_N1)
        rest_NR = rest_NR[:, 1:] - unit_N1 * column_sums(unit_N1 * rest_NR[:, 1:])
    return torch.cat(columns, dim=1).float()


def column_sums(x_NR: Tensor) -> Tensor:
    """Sums over N ``(R,)``, halves onto halves: in an order that does not depend on the processor."""
    n = 1 << (len(x_NR) - 1).bit_length()
    x_NR = torch.cat([x_NR, x_NR.new_zeros(n - len(x_NR), x_NR.shape[1])])  # torch 2.4 pads no empty tensor
    while n > 1:
        n //= 2
        x_NR = x_NR[:n] + x_NR[n:]
    return x_NR[0]
