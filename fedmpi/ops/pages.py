"""Memory for long vectors, in huge pages where the system gives them on request.

Fresh memory comes page by page, each of which the system clears when it is first written: of a vector of 80 MB in pages
of 4 KiB that takes longer than what most kernels do with it, in pages of 2 MiB a third of it. Linux gives those to
whoever asks (``madvise``, where ``/sys/kernel/mm/transparent_hugepage/enabled`` says madvise); elsewhere nothing
happens.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LEAST = 1 << 22  # bytes: of fewer, most would lie outside of whole huge pages
_SMALL_PAGE = 1 << 12
_HUGEPAGE = 14  # MADV_HUGEPAGE


def huge(x: Tensor) -> Tensor:
    """``x``, whose memory nobody has written yet, and which is to be written in huge pages."""
    advise = _advise() if x.device.type == "cpu" and x.nbytes >= LEAST else None
    if advise is not None:
        first = -(-x.data_ptr() // _SMALL_PAGE) * _SMALL_PAGE
        length = (x.data_ptr() + x.nbytes - first) // _SMALL_PAGE * _SMALL_PAGE
        advise(first, length, _HUGEPAGE)  # a refusal changes nothing
    return x


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """``torch.empty``, in huge pages."""
    return huge(torch.empty(shape, dtype=dtype, device=device))


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of this shape and type, there, in huge pages."""
    return huge(torch.empty_like(x, memory_format=torch.contiguous_format))


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """``torch.zeros``, in huge pages."""
    return empty(*shape, dtype=dtype, device=device).zero_()


@lru_cache(maxsize=1)
def _advise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return advise
