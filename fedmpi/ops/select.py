"""Choosing coordinates.  Shape suffixes: C clients, D coordinates, K chosen ones, S sampled ones."""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.ops import fast

_SAMPLE, _ENOUGH = 1 << 16, 1 << 8  # the most that is sampled, and how many of the k are wanted among it
_SOME, _WALK = (
    64,
    1 << 18,
)  # up to D / 64 equal magnitudes are looked up, more are met on a walk in such steps
_FEW = 16  # by sampling only up to D / 16 coordinates: of more, most of the time would go into sorting them


def top_k(g_CD: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` entries of largest magnitude in each row, int64 ``(C, k)``, increasing.

    Among equal magnitudes the lowest index wins, on every device (``torch.topk`` leaves that open).
    """
    kernels = fast.compiled("select", g_CD) if g_CD.dtype == torch.float32 else None
    if kernels is None or not 0 < k <= g_CD.shape[1]:
        return top_k_reference(g_CD, k)
    if exact := getattr(kernels, "top_k", None):  # where a sample would have to be asked for
        chosen_CK: Tensor = exact(g_CD.contiguous(), k)
        return chosen_CK
    rows = []
    for g_D in g_CD.contiguous():
        if k > len(g_D) // _FEW:
            rows.append(_many(kernels, g_D, k))
            continue
        candidates = kernels.reach(g_D, _threshold(g_D, k), k, len(g_D) // 2)
        if candidates is None:  # the sample was misleading, or most numbers are equal
            rows.append(top_k_reference(g_D[None], k)[0])
        else:
            rows.append(candidates[top_k_reference(g_D[candidates][None], k)[0]])
    return torch.stack(rows)


def _many(kernels: ModuleType, g_D: Tensor, k: int) -> Tensor:
    """:func:`top_k` of one row, where a sample would leave too much to sort."""
    least: float = kernels.kth(g_D, k)
    # Nothing says how many are 0, or are as large as something that is no number.
    reached_N = kernels.reach(g_D, least, k, k + len(g_D) // _SOME) if 0 < least < math.inf else None
    if reached_N is None:
        return top_k_reference(g_D[None], k)[0]
    tied_N = g_D[reached_N].abs() == least
    keep_N = ~tied_N | (tied_N.cumsum(0) <= k - len(reached_N) + tied_N.sum())
    return torch.masked_select(reached_N, keep_N)


def top_by_key(x_D: Tensor, k: int, key: int) -> Tensor:
    """Indices of the ``k`` entries of largest magnitude, int64 ``(k,)``, increasing. Among equal magnitudes those win
    that come first in the key's :func:`fedmpi.random.permutation`. No entry is NaN."""
    fit = x_D.dtype == torch.float32 and x_D.is_contiguous()
    kernels = fast.compiled("select", x_D, having="kth") if fit else None
    if kernels is None:
        return top_by_key_reference(x_D, k, key)
    least: float = kernels.kth(x_D, k)
    reached_N: Tensor | None = kernels.reach(x_D, least, k, k + len(x_D) // _SOME) if least else None
    if reached_N is None:  # many are equal: the first of them are soon met
        chosen_D = x_D.abs() > least
        chosen_D[_first_tied(x_D, least, k - int(chosen_D.sum()), key)] = True
        return chosen_D.nonzero()[:, 0]
    if len(reached_N) == k:
        return reached_N
    keep_N = x_D[reached_N].abs() > least
    tied = (~keep_N).nonzero()[:, 0]
    ranks = random.ranks(key, len(x_D), reached_N[tied])
    keep_N[tied[ranks.topk(k - int(keep_N.sum()), largest=False).indices]] = True
    return reached_N[keep_N]


def top_by_key_reference(x_D: Tensor, k: int, key: int) -> Tensor:
    """:func:`top_by_key` by torch."""
    order_D = random.permutation(key, len(x_D), x_D.device)  # top_k takes the first of equals
    return order_D[top_k_reference(x_D[order_D][None], k)[0]].sort().values


def _first_tied(x_D: Tensor, magnitude: float, count: int, key: int) -> Tensor:
    """Of the entries of this magnitude the first ``count`` in the key's permutation."""
    found = [torch.empty(0, dtype=torch.int64, device=x_D.device)]
    for start in range(0, len(x_D), _WALK):
        if not (left := count - sum(map(len, found))):
            break
        order = random.sample(key, len(x_D), min(_WALK, len(x_D) - start), x_D.device, start)
        found.append(order[x_D[order].abs() == magnitude][:left])
    return torch.cat(found)


def _threshold(g_D: Tensor, k: int) -> float:
    """A magnitude that a little more than k entries reach, judged by a sample: six standard deviations more."""
    places_S = _places(len(g_D), min(_SAMPLE, max(1, len(g_D) // 8), -(-_ENOUGH * len(g_D) // k)))
    expected = k * len(places_S) / len(g_D)
    rank = min(len(places_S), math.ceil(expected + 6 * math.sqrt(expected) + 8))
    return float(g_D[places_S].abs().topk(rank, sorted=False).values.amin())


@lru_cache(maxsize=64)
def _places(size: int, count: int) -> Tensor:
    """Where samples are taken: any will do, as the choice is exact."""
    return random.integers(random.key(0, stream="sample"), count, size).sort().values


def top_k_reference(g_CD: Tensor, k: int) -> Tensor:
    """:func:`top_k` by torch."""
    size_CD = g_CD.abs()
    threshold_C1 = size_CD.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_CD, tied_CD = size_CD > threshold_C1, size_CD == threshold_C1
    places_C1 = k - above_CD.sum(1, keepdim=True)
    chosen_CD = above_CD | (tied_CD & (tied_CD.cumsum(1) <= places_C1))
    return places(chosen_CD, k)


def places(chosen_CD: Tensor, k: int) -> Tensor:
    """Where each row has its k ones, int64 ``(C, k)``. How many there are is known, and not asked of a device, which
    gives any numbers from -1 on for rows with more or fewer."""
    if fast.waits(chosen_CD) and _static(chosen_CD.device):
        places_N2 = torch.nonzero_static(chosen_CD, size=len(chosen_CD) * k)
    else:
        places_N2 = chosen_CD.nonzero()
    return places_N2[:, 1].view(len(chosen_CD), k)


@lru_cache
def _static(device: torch.device) -> bool:
    """This torch can list a known number of places there, without asking how many they are."""
    try:
        torch.nonzero_static(torch.ones(1, dtype=torch.bool, device=device), size=1)
    except (NotImplementedError, RuntimeError):
        return False
    return True
