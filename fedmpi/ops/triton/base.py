"""What kernels share: how they are launched, and the generator of ``fedmpi.random``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A product and a sum are two roundings, as in the references.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels go to the current device: within this to that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def blocks(count: int, size: int) -> int:
    """Blocks of ``size`` that ``count`` fill."""
    return -(-count // size)


@triton.jit
def word(key, i):
    """Words i (integers) of a key: SplitMix64, uint64."""
    x = key.to(tl.uint64, bitcast=False) + (i.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
