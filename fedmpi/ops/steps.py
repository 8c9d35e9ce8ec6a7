"""A server's step on the parameters, and which of them it changed.  Shape suffix: D parameters."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fedmpi.ops import fast, pages

_BLOCK = 1 << 16  # parameters, for each thread: what is stepped is still in the cache when it is compared


def step(theta_D: Tensor, u_D: Tensor, alpha: float) -> Tensor:
    """θ + alpha · u."""
    return torch.add(theta_D, u_D, alpha=alpha, out=pages.empty_like(theta_D))


def mark(before_D: Tensor, after_D: Tensor, changed_D: Tensor, version: Tensor) -> Tensor:
    """The version (int32) of each parameter's last change: ``version`` where it is another one than before."""
    kernels = _kernels(before_D, after_D, changed_D)
    if kernels is None:
        return mark_reference(before_D, after_D, changed_D, version)
    out_D = pages.empty_like(changed_D)
    arrays = before_D.numpy(), after_D.numpy(), changed_D.numpy(), np.int32(int(version)), out_D.numpy()
    fast.run(kernels.mark, -(-len(out_D) // kernels.BLOCK), *arrays)
    return out_D


def mark_reference(before_D: Tensor, after_D: Tensor, changed_D: Tensor, version: Tensor) -> Tensor:
    """:func:`mark` by torch."""
    return torch.where(after_D != before_D, version.int(), changed_D)


def add_at(theta_D: Tensor, index_K: Tensor, u_K: Tensor, alpha: float) -> Tensor:
    """θ + alpha · u at different places."""
    return pages.empty_like(theta_D).copy_(theta_D).index_add_(0, index_K, u_K, alpha=alpha)


def mark_at(before_D: Tensor, after_D: Tensor, changed_D: Tensor, version: Tensor, index_K: Tensor) -> Tensor:
    """:func:`mark` where only these may have changed."""
    out_D = pages.empty_like(changed_D).copy_(changed_D)
    differs_K = after_D[index_K] != before_D[index_K]
    return out_D.index_copy_(0, index_K, torch.where(differs_K, version.int(), changed_D[index_K]))


def step_and_mark(
    theta_D: Tensor, u_D: Tensor, alpha: float, changed_D: Tensor, version: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`step`, and :func:`mark` after it, in one pass."""
    kernels = _kernels(theta_D, theta_D, changed_D)
    if kernels is None:
        after_D = step(theta_D, u_D, alpha)
        return after_D, mark_reference(theta_D, after_D, changed_D, version)
    after_D, out_D = pages.empty_like(theta_D), pages.empty_like(changed_D)
    size, now = _BLOCK * torch.get_num_threads(), np.int32(int(version))
    parts = zip(*(x.split(size) for x in (theta_D, u_D, after_D, changed_D, out_D)), strict=True)
    for theta, u, after, changed, out in parts:
        torch.add(theta, u, alpha=alpha, out=after)
        arrays = theta.numpy(), after.numpy(), changed.numpy(), now, out.numpy()
        fast.run(kernels.mark, -(-len(out) // kernels.BLOCK), *arrays)
    return after_D, out_D


def changed_since(changed_D: Tensor, versions: list[int]) -> list[int]:
    """How many parameters have changed since each of these versions, in one pass over what :func:`mark` gave."""
    top = max(versions) + 1
    kernels = fast.compiled("steps", changed_D) if changed_D.is_contiguous() else None
    if kernels is None:
        counts = torch.bincount(changed_D.clamp(max=top), minlength=top + 1)
    else:
        counts = torch.zeros(top + 1, dtype=torch.int64, device="cpu")
        kernels.histogram(changed_D.numpy(), counts.numpy())
    later = counts.flip(0).cumsum(0).flip(0).tolist()
    return [later[version + 1] for version in versions]


def changed_since_reference(changed_D: Tensor, versions: list[int]) -> list[int]:
    """:func:`changed_since`, one version after the other."""
    return [int((changed_D > version).sum()) for version in versions]


def _kernels(before_D: Tensor, after_D: Tensor, changed_D: Tensor) -> ModuleType | None:
    alike = before_D.dtype == after_D.dtype == torch.float32 and changed_D.dtype == torch.int32
    flat = all(x.is_contiguous() for x in (before_D, after_D, changed_D))
    return fast.compiled("steps", before_D, after_D, changed_D) if alike and flat else None
