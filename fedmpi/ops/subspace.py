"""Random embeddings A ∈ R^{D×d} with E[A Aᵀ] = I_D, given by two products: lift (A v) and project (Aᵀ g).

Shape suffixes: C clients, D parameters, d subspace dimension, N = 2^l ≥ D, M = 2^⌈log2 d⌉.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.ops import fast, pages
from fedmpi.ops.hadamard import fwht


class Embedding(ABC):
    """A, drawn from ``key`` and multiplied by ``factor``."""

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        self.size, self.dim, self.key, self.factor = size, dim, key, factor

    def lift(self, v_Cd: Tensor, out: Tensor | None = None) -> Tensor:
        """A v for each row: ``(C, D)``, float32; in ``out``, contiguous, where that is given."""
        if v_Cd.shape[1] != self.dim:
            raise ValueError(f"v: expected rows of d = {self.dim} numbers, got {v_Cd.shape[1]}")
        if out is not None and (out.shape != (len(v_Cd), self.size) or not out.is_contiguous()):
            raise ValueError(f"out: expected {(len(v_Cd), self.size)}, contiguous, got {tuple(out.shape)}")
        result_CD = pages.huge(v_Cd.new_empty(len(v_Cd), self.size)) if out is None else out
        self._lift(v_Cd, result_CD)
        return result_CD

    @abstractmethod
    def _lift(self, v_Cd: Tensor, out_CD: Tensor) -> None: ...

    def project(self, g_CD: Tensor) -> Tensor:
        """Aᵀ g for each row: ``(C, d)``."""
        if g_CD.shape[1] != self.size:
            raise ValueError(f"g: expected rows of D = {self.size} numbers, got {g_CD.shape[1]}")
        return self._project(g_CD)

    @abstractmethod
    def _project(self, g_CD: Tensor) -> Tensor: ...


class Dense(Embedding):
    """Independent normal entries of variance 1/d. Takes D·d memory: a reference for small models."""

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        super().__init__(size, dim, key, factor)
        self.scale = factor / math.sqrt(dim)

    def matrix_Dd(self, device: torch.device) -> Tensor:
        """A ``(D, d)``."""
        return _dense_matrix(self.size, self.dim, self.key, device) * self.scale

    def _lift(self, v_Cd: Tensor, out_CD: Tensor) -> None:
        torch.matmul(v_Cd, self.matrix_Dd(v_Cd.device).T, out=out_CD)

    def _project(self, g_CD: Tensor) -> Tensor:
        return g_CD @ self.matrix_Dd(g_CD.device)


class Fastfood(Embedding):
    """A = c · Unpad_D B H Π G H Pad (intrinsic gradient compression paper, section 4, after Le et al. 2013).

    B: signs, Π: a permutation, G: normals, H: the ±1 Hadamard matrix of order N = 2^l, the smallest
    power of two ≥ D; c = 1/√(N·d) gives E[A Aᵀ] = I. H·Pad(v) is the small transform H_M v repeated
    N/M times, so the first transform costs d log d, and its adjoint sums N/M blocks first.
    """

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        super().__init__(size, dim, key, factor)
        self.n = 1 << (size - 1).bit_length()
        self.m = 1 << (dim - 1).bit_length()
        self.scale = factor / math.sqrt(self.n * dim)

    def _lift(self, v_Cd: Tensor, out_CD: Tensor) -> None:
        small_CM = fwht(torch.nn.functional.pad(v_Cd, (0, self.m - self.dim)))
        kernels = self._kernels(v_Cd, "fastfood_spread")
        if kernels is None:
            signs_N, weight_N, column_N = _fastfood_parts(self.n, self.m, self.key, v_Cd.device)
            x_CN = fwht(small_CM[:, column_N] * weight_N)
            torch.mul((x_CN * signs_N)[:, : self.size], self.scale, out=out_CD)
            return
        x_CN = fast.scratch("fastfood", len(v_Cd), self.n, v_Cd.device)
        kernels.fastfood_spread(small_CM.contiguous(), *self._drawn(), x_CN)
        fwht(x_CN, x_CN)
        kernels.flip(x_CN, random.key(self.key, stream="B"), self.scale, out_CD)

    def _project(self, g_CD: Tensor) -> Tensor:
        kernels = self._kernels(g_CD, "fastfood_gather")
        if kernels is None:
            signs_N, weight_N, column_N = _fastfood_parts(self.n, self.m, self.key, g_CD.device)
            x_CN = torch.nn.functional.pad(g_CD * signs_N[: self.size], (0, self.n - self.size))
            small_CM = _add_columns(fwht(x_CN), weight_N, column_N, self.m)
        else:
            x_CN = fast.scratch("fastfood", len(g_CD), self.n, g_CD.device)
            kernels.flip(g_CD.contiguous(), random.key(self.key, stream="B"), 1.0, x_CN)
            fwht(x_CN, x_CN)
            shape = self.n // _block(self.n, self.m), len(g_CD), self.m
            sums_BCM = torch.zeros(shape, device=g_CD.device)
            kernels.fastfood_gather(x_CN, *self._drawn(), sums_BCM)
            small_CM = _in_order(sums_BCM)
        return fwht(small_CM)[:, : self.dim] * self.scale

    def _kernels(self, x: Tensor, name: str) -> ModuleType | None:
        usable = x.dtype == torch.float32 and self.n >= random.SORT_BELOW and x.numel()
        return fast.compiled("counters", x, count=self.n, having=name) if usable else None

    def _drawn(self) -> tuple[int, Tensor]:
        """What the kernels need to draw G and Π by themselves, for any key and dimension."""
        rounds = random.bijection(random.key(self.key, stream="Π"), self.n.bit_length() - 1)
        return random.key(self.key, stream="G"), rounds


class Orthonormal(Dense):
    """A dense A with orthonormal columns times √(D/d): E[A Aᵀ] = I, and A Aᵀ = I when d = D."""

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        super().__init__(size, dim, key, factor)
        self.scale = factor * math.sqrt(size / dim)

    def matrix_Dd(self, device: torch.device) -> Tensor:
        return _orthonormal_matrix(self.size, self.dim, self.key, device) * self.scale


class Hashed(Embedding):
    """One non-zero a row: A[i, h(i)] = s(i), with h(i) uniform over the d columns and s(i) a sign.

    (A Aᵀ)_ij = s(i) s(j) [h(i) = h(j)] is 1 on the diagonal and 0 in the mean elsewhere. One pass over the
    parameters, no transform. The count-sketch of one row (Charikar et al. 2002; Weinberger et al. 2009).
    """

    def _lift(self, v_Cd: Tensor, out_CD: Tensor) -> None:
        kernels = self._kernels(v_Cd, "hashed_lift")
        if kernels is None:
            column_D, sign_D = _hashed_parts(self.size, self.dim, self.key, v_Cd.device)
            torch.mul(v_Cd[:, column_D] * sign_D, self.factor, out=out_CD)
            return
        kernels.hashed_lift(v_Cd.contiguous(), *self._drawn(), self.factor, out_CD)

    def _project(self, g_CD: Tensor) -> Tensor:
        kernels = self._kernels(g_CD, "hashed_project")
        if kernels is None:
            column_D, sign_D = _hashed_parts(self.size, self.dim, self.key, g_CD.device)
            return _add_columns(g_CD, sign_D, column_D, self.dim) * self.factor
        size = _block(self.size, self.dim)
        sums_BCd = torch.zeros(-(-self.size // size), len(g_CD), self.dim, device=g_CD.device)
        kernels.hashed_project(g_CD.contiguous(), *self._drawn(), size, sums_BCd)
        return _in_order(sums_BCd) * self.factor

    def _kernels(self, x: Tensor, name: str) -> ModuleType | None:
        usable = x.dtype == torch.float32 and x.numel()
        return fast.compiled("counters", x, count=self.size, having=name) if usable else None

    def _drawn(self) -> tuple[int, int]:
        return random.key(self.key, stream="h"), random.key(self.key, stream="s")


def _block(count: int, dim: int) -> int:
    """Coordinates that are added up in one go, a multiple of 1024: a 16th, or so many that sums of ``dim`` numbers
    for each block are small beside them. A function of the sizes only, so that no sum depends on threads."""
    blocks = min(16, max(1, count // (8 * dim)))
    return -(-count // (blocks * 1024)) * 1024


def _add_columns(x_CN: Tensor, weight_N: Tensor, column_N: Tensor, dim: int) -> Tensor:
    """Σ of weight · x over the coordinates of each column, ``(C, dim)``: in order within a block, then over the
    blocks. (On CUDA the order is fixed by ``torch.use_deterministic_algorithms``.)"""
    size = _block(x_CN.shape[1], dim)
    parts = zip(x_CN.split(size, 1), weight_N.split(size), column_N.split(size), strict=True)
    sums = []
    for x_CB, weight_B, column_B in parts:
        sum_Cd = x_CN.new_zeros(len(x_CN), dim)
        for row, x_B in zip(sum_Cd, x_CB, strict=True):
            row.index_add_(0, column_B, x_B * weight_B)
        sums.append(sum_Cd)
    return _in_order(torch.stack(sums))


def _in_order(sums_BCd: Tensor) -> Tensor:
    total_Cd = sums_BCd[0]
    for sum_Cd in sums_BCd[1:]:
        total_Cd = total_Cd + sum_Cd
    return total_Cd


@lru_cache(maxsize=2)  # threads that play ranks share the same random parts
def _dense_matrix(size: int, dim: int, key: int, device: torch.device) -> Tensor:
    return random.normal(random.key(key, stream="dense"), size * dim, device).view(size, dim)


@lru_cache(maxsize=2)
def _orthonormal_matrix(size: int, dim: int, key: int, device: torch.device) -> Tensor:
    # On the CPU for all: a device's decomposition would be another matrix.
    q_Dd, r_dd = torch.linalg.qr(_dense_matrix(size, dim, key, torch.device("cpu")).double())
    matrix_Dd: Tensor = (q_Dd * r_dd.diagonal().sign()).float()  # a QR's signs are free: fix them
    return matrix_Dd.to(device)


@lru_cache(maxsize=16)
def _hashed_parts(size: int, dim: int, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        random.integers(random.key(key, stream="h"), size, dim, device),
        random.signs(random.key(key, stream="s"), size, device),
    )


@lru_cache(maxsize=16)  # K subspaces of this epoch and of the last
def _fastfood_parts(n: int, m: int, key: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """B; and for each coordinate after Π the normal number and the column of the M that it takes."""
    permutation_N = random.permutation(random.key(key, stream="Π"), n, device)
    signs_N = random.signs(random.key(key, stream="B"), n, device)
    normal_N = random.normal(random.key(key, stream="G"), n, device)
    return signs_N, normal_N[permutation_N], permutation_N % m


MATRICES: dict[str, type[Embedding]] = {
    "fastfood": Fastfood,
    "dense": Dense,
    "orthonormal": Orthonormal,
    "hashed": Hashed,
}
