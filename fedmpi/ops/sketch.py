"""The Count-Sketch: a short linear image of a vector from which its largest entries can be read off.

Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", ICALP 2002. Row r of R adds
entry i with the sign s_r(i) = ±1 to the bucket h_r(i) of K; the estimate of an entry is the median over the
rows of s_r(i) times its bucket. Hashes and signs are counter-based functions of a key.

Shape suffixes: C clients, D coordinates, N some of them, R rows, K buckets of a row, S = R·K.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpi import random
from fedmpi.ops import fast, pages

_BLOCK = 1 << 15  # coordinates estimated at a time: their R rows stay in a core's cache


class CountSketch:
    """The sketch of vectors of ``size`` coordinates that ``key`` draws.

    Attributes:
      length: S, numbers of a sketch.
    """

    def __init__(self, size: int, rows: int, columns: int, key: int) -> None:
        self.size, self.rows, self.columns, self.key = size, rows, columns, key
        self.length = rows * columns

    def encode(self, g_CN: Tensor, index_N: Tensor | None = None) -> Tensor:
        """The sketch of each row, ``(C, S)``.

        Every bucket is summed in the order of the coordinates, on its own: a row's bits do not depend on the
        others. (On CUDA that takes ``torch.use_deterministic_algorithms``.)

        Args:
          g_CN: ``(C, D)``; with ``index_N``, the values at these coordinates, all others being zero.
          index_N: int64, different coordinates.
        """
        kernels = (
            fast.compiled("counters", g_CN, having="sketch_encode")
            if index_N is None and g_CN.dtype == torch.float32
            else None
        )
        if index_N is None and g_CN.shape[1] != self.size:
            raise ValueError(f"g: expected rows of D = {self.size} numbers, got {g_CN.shape[1]}")
        if kernels is not None:
            sums_CRT = torch.zeros(len(g_CN), self.rows, 2 * self.columns, device="cpu")
            drawn = *self._keys(), self.columns, random.constants().numpy()
            fast.run(kernels.sketch_encode, self.rows, g_CN.contiguous().numpy(), *drawn, sums_CRT.numpy())
            plus_CS, minus_CS = sums_CRT.view(len(g_CN), self.length, 2).unbind(-1)
            return plus_CS - minus_CS
        places_RN = self._places(g_CN.device) if index_N is None else self._places_at(index_N)
        sums_CT = g_CN.new_zeros(len(g_CN), 2 * self.length)
        for sums_T, g_N in zip(sums_CT, g_CN, strict=True):
            for places_N in places_RN:
                sums_T.index_add_(0, places_N, g_N)
        plus_CS, minus_CS = sums_CT.view(-1, self.length, 2).unbind(-1)
        return plus_CS - minus_CS

    def estimate(self, v_CS: Tensor) -> Tensor:
        """The estimates of all coordinates from each sketch, ``(C, D)``; of an even number of rows the median
        is the mean of the two in the middle."""
        count = len(v_CS) * self.size if v_CS.dtype == torch.float32 else 0
        kernels = fast.compiled("counters", v_CS, count=count, having="sketch_estimate")
        if kernels is not None:
            out_CD, chunks = pages.empty(len(v_CS), self.size), -(-self.size // kernels.CHUNK)
            v_CRK = v_CS.reshape(len(v_CS), self.rows, self.columns).contiguous().numpy()
            drawn = *self._keys(), random.constants().numpy()
            fast.run(kernels.sketch_estimate, chunks, v_CRK, *drawn, out_CD.numpy())
            return out_CD
        signed_CT = torch.stack((v_CS, -v_CS), dim=-1).flatten(1)
        blocks = self._places(v_CS.device).split(_BLOCK, dim=1)
        return torch.cat([_median([signed_CT.index_select(1, p_N) for p_N in b_RN]) for b_RN in blocks], 1)

    def transpose(self, v_CS: Tensor) -> Tensor:
        """The transpose of :meth:`encode` on each row, ``(C, D)``: over the rows the sum, where
        :meth:`estimate` has the median."""
        signed_CT = torch.stack((v_CS, -v_CS), dim=-1).flatten(1)
        total_CD = v_CS.new_zeros(len(v_CS), self.size)
        for places_D in self._places(v_CS.device):
            total_CD += signed_CT.index_select(1, places_D)
        return total_CD

    def matrix(self) -> Tensor:
        """The sketch as a matrix ``(S, D)``, one ±1 for each row and coordinate: the slow reference."""
        places_RD = self._places(torch.device("cpu")).long()
        matrix_SD = torch.zeros(self.length, self.size, device="cpu")
        return matrix_SD.scatter_(0, places_RD // 2, 1.0 - 2.0 * (places_RD % 2))

    def _keys(self) -> tuple[Any, Any]:
        """Those of the rows' buckets and signs, for the kernels."""
        both = (_row_keys(self.key, r) for r in range(self.rows))
        buckets, signs = zip(*both, strict=True)
        return np.array(buckets, np.int64), np.array(signs, np.int64)

    def _places_at(self, index_N: Tensor) -> Tensor:
        """Those of some coordinates, ``(R, N)``, drawn by themselves: few of all are asked for."""
        drawn = (_row_keys(self.key, r) for r in range(self.rows))
        return torch.stack(
            [
                2 * (r * self.columns + random.integers_at(buckets, index_N, self.columns))
                + ~random.coins_at(signs, index_N)
                for r, (buckets, signs) in enumerate(drawn)
            ]
        )

    def _places(self, device: torch.device) -> Tensor:
        return _draw(self.size, self.rows, self.columns, self.key, device)


@lru_cache(maxsize=2)  # threads that play ranks share them
def _draw(size: int, rows: int, columns: int, key: int, device: torch.device) -> Tensor:
    """Where each coordinate goes, ``(R, D)``: 2·(r·K + h_r(i)), plus 1 where s_r(i) = −1.

    With a place for either sign of a bucket, to add or to look up is one pass without a product.
    """
    dtype = torch.int32 if 2 * rows * columns < 1 << 31 else torch.int64
    places_RD = torch.empty(rows, size, dtype=dtype, device=device)
    for r in range(rows):
        buckets, signs = _row_keys(key, r)
        bucket_D = random.integers(buckets, size, columns, device)
        positive_D = random.coins(signs, size, device)
        places_RD[r] = 2 * (r * columns + bucket_D) + ~positive_D
    return places_RD


def _row_keys(key: int, row: int) -> tuple[int, int]:
    return random.key(key, client=row, stream="buckets"), random.key(key, client=row, stream="signs")


def _median(rows: list[Tensor]) -> Tensor:
    """The elementwise median, by an odd-even transposition sort (five times as fast as ``torch.median``)."""
    rows = list(rows)
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
    half = len(rows) // 2
    return rows[half] if len(rows) % 2 else (rows[half - 1] + rows[half]) * 0.5
