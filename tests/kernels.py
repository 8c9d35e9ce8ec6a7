"""Functions of fedmpi.ops by their compiled kernels and by torch, and what to feed them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fedmpi import random
from fedmpi.ops import fast

quick = settings(deadline=None, max_examples=15)
keys = st.integers(-(2**63), 2**63 - 1)


@contextmanager
def served_by(package: str) -> Iterator[None]:
    """Kernels of ``fedmpi.ops.compiled``, or those of ``fedmpi.ops.triton`` in Triton's interpreter, on the CPU."""
    before = fast.KERNELS["cpu"]
    fast.KERNELS["cpu"] = fast.KERNELS["cuda"] if package == "triton" else before
    try:
        yield
    finally:
        fast.KERNELS["cpu"] = before


@contextmanager
def smallest(size: int, threads: int = 1) -> Iterator[None]:
    """Kernels from ``size`` numbers on, in so many threads."""
    before = fast.SMALLEST, fast.LOADED
    fast.SMALLEST = fast.LOADED = size
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        fast.SMALLEST, fast.LOADED = before
        torch.set_num_threads(1)


def by_kernel(function: Callable[..., Any], *arguments: Any, threads: int = 1) -> Any:
    with smallest(0, threads):
        return function(*arguments)


def by_torch(function: Callable[..., Any], *arguments: Any) -> Any:
    with smallest(sys.maxsize):
        return function(*arguments)


def normals(key: int, *shape: int) -> Tensor:
    count = 1
    for n in shape:
        count *= n
    return random.normal(random.key(key, stream="x"), count).view(shape)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal types, shapes and bits: 0.0 is not −0.0."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}.get(a.dtype, a.dtype)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))
