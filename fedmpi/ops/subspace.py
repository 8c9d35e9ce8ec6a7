"""Random embeddings A ∈ R^{D×d} with E[A Aᵀ] = I_D, given by two products: lift (A v) and project (Aᵀ g).

Shape suffixes: C clients, D parameters, d subspace dimension, N = 2^l ≥ D, M = 2^⌈log2 d⌉.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.ops.hadamard import fwht


class Embedding(ABC):
    """A, drawn from ``key`` and multiplied by ``factor``."""

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        self.size, self.dim, self.key, self.factor = size, dim, key, factor

    @abstractmethod
    def lift(self, v_Cd: Tensor) -> Tensor:
        """A v for each row: ``(C, D)``."""

    @abstractmethod
    def project(self, g_CD: Tensor) -> Tensor:
        """Aᵀ g for each row: ``(C, d)``."""


class Dense(Embedding):
    """Independent normal entries of variance 1/d. Takes D·d memory: a reference for small models."""

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        super().__init__(size, dim, key, factor)
        self.matrix_Dd = _dense_matrix(size, dim, key) * (factor / math.sqrt(dim))

    def lift(self, v_Cd: Tensor) -> Tensor:
        return v_Cd @ self.matrix_Dd.T

    def project(self, g_CD: Tensor) -> Tensor:
        return g_CD @ self.matrix_Dd


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

    def lift(self, v_Cd: Tensor) -> Tensor:
        signs_N, normals_N, permutation_N = _fastfood_parts(self.n, self.key)
        small_CM = fwht(torch.nn.functional.pad(v_Cd, (0, self.m - self.dim)))
        x_CN = small_CM.repeat(1, self.n // self.m) * normals_N
        return (fwht(x_CN[:, permutation_N]) * signs_N)[:, : self.size] * self.scale

    def project(self, g_CD: Tensor) -> Tensor:
        signs_N, normals_N, permutation_N = _fastfood_parts(self.n, self.key)
        x_CN = fwht(torch.nn.functional.pad(g_CD, (0, self.n - self.size)) * signs_N)
        y_CN = torch.empty_like(x_CN)
        y_CN[:, permutation_N] = x_CN
        small_CM = (y_CN * normals_N).view(-1, self.n // self.m, self.m).sum(1)
        return fwht(small_CM)[:, : self.dim] * self.scale


class Orthonormal(Dense):
    """A dense A with orthonormal columns times √(D/d): E[A Aᵀ] = I, and A Aᵀ = I when d = D."""

    def __init__(self, size: int, dim: int, key: int, factor: float = 1.0) -> None:
        Embedding.__init__(self, size, dim, key, factor)
        self.matrix_Dd = _orthonormal_matrix(size, dim, key) * (factor * math.sqrt(size / dim))


class Hashed(Embedding):
    """One non-zero a row: A[i, h(i)] = s(i), with h(i) uniform over the d columns and s(i) a sign.

    (A Aᵀ)_ij = s(i) s(j) [h(i) = h(j)] is 1 on the diagonal and 0 in the mean elsewhere. One pass over the
    parameters, no transform. The count-sketch of one row (Charikar et al. 2002; Weinberger et al. 2009).
    """

    def lift(self, v_Cd: Tensor) -> Tensor:
        column_D, sign_D = _hashed_parts(self.size, self.dim, self.key)
        return v_Cd[:, column_D] * sign_D * self.factor

    def project(self, g_CD: Tensor) -> Tensor:
        column_D, sign_D = _hashed_parts(self.size, self.dim, self.key)
        out_Cd = g_CD.new_zeros(len(g_CD), self.dim)
        for row, g_D in zip(out_Cd, g_CD, strict=True):
            row.index_add_(0, column_D, g_D * sign_D)
        return out_Cd * self.factor


@lru_cache(maxsize=2)  # threads that play ranks share the same random parts
def _dense_matrix(size: int, dim: int, key: int) -> Tensor:
    return random.normal(random.key(key, stream="dense"), size * dim).view(size, dim)


@lru_cache(maxsize=2)
def _orthonormal_matrix(size: int, dim: int, key: int) -> Tensor:
    q_Dd, r_dd = torch.linalg.qr(_dense_matrix(size, dim, key).double())
    matrix_Dd: Tensor = (q_Dd * r_dd.diagonal().sign()).float()  # a QR's signs are free: fix them
    return matrix_Dd


@lru_cache(maxsize=16)
def _hashed_parts(size: int, dim: int, key: int) -> tuple[Tensor, Tensor]:
    return (
        random.integers(random.key(key, stream="h"), size, dim),
        random.signs(random.key(key, stream="s"), size),
    )


@lru_cache(maxsize=16)  # K subspaces of this epoch and of the last
def _fastfood_parts(n: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random.signs(random.key(key, stream="B"), n),
        random.normal(random.key(key, stream="G"), n),
        random.permutation(random.key(key, stream="Π"), n),
    )


MATRICES: dict[str, type[Embedding]] = {
    "fastfood": Fastfood,
    "dense": Dense,
    "orthonormal": Orthonormal,
    "hashed": Hashed,
}
