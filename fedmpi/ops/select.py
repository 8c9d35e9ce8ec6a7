"""Choosing coordinates.  Shape suffixes: C clients, D coordinates, K chosen ones."""

from __future__ import annotations

from torch import Tensor


def top_k(g_CD: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` entries of largest magnitude in each row, int64 ``(C, k)``, increasing.

    Among equal magnitudes the lowest index wins, on every device (``torch.topk`` leaves that open).
    """
    size_CD = g_CD.abs()
    threshold_C1 = size_CD.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_CD, tied_CD = size_CD > threshold_C1, size_CD == threshold_C1
    places_C1 = k - above_CD.sum(1, keepdim=True)
    chosen_CD = above_CD | (tied_CD & (tied_CD.cumsum(1) <= places_C1))
    return chosen_CD.nonzero()[:, 1].view(len(g_CD), k)
