"""When and how compiled kernels run in place of their torch references: numba's on the CPU, Triton's on CUDA.

Every kernel returns the very bits of its reference, whatever the number of threads: both add up in the same fixed
order. So it is no part of a result whether numba is installed, how many threads a rank has, or on which side of
``SMALLEST`` a vector lies, and ``reproducible`` runs need not ask.

Kernels hold no GIL and get their threads here, not from numba's ``parallel``: its threading layers abort the
process when two threads (ranks played by threads) are in a kernel at once, or die with a fork.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedmpi.ops import pages

# Below so many numbers torch stays: importing numba and loading a kernel takes a second, compiling some seconds.
SMALLEST = 1 << 16
LOADED = 1  # where the kernels of a kind are there already
KEPT = 1 << 30
_PIECES = 4  # of the work, for each thread: a core that others use as well does fewer of them


# Which package's kernels serve tensors of a kind of device, and what it needs; all others have the torch reference.
KERNELS = {"cpu": ("fedmpi.ops.compiled", "numba"), "cuda": ("fedmpi.ops.triton", "triton")}


def compiled(name: str, *tensors: Tensor, count: int | None = None, having: str = "") -> ModuleType | None:
    """The kernels of this name for the tensors' device; None where the torch reference has to do: for a device or a
    name that has none, without what they are compiled by, for tensors that need a gradient, and for too few numbers
    (``count``, else the first tensor's). ``having``: a function that not every package has."""
    package, _ = KERNELS.get(tensors[0].device.type, ("", ""))
    if not package or any(t.device != tensors[0].device for t in tensors):
        return None
    module = f"{package}.{name}"
    least = LOADED if module in sys.modules else SMALLEST
    if (tensors[0].numel() if count is None else count) < least:
        return None
    if any(t.requires_grad for t in tensors):
        return None
    kernels = _module(module, tensors[0].device.type)
    return None if having and not hasattr(kernels, having) else kernels


def waits(x: Tensor) -> bool:
    """A question about its numbers makes the host wait for a device, which costs more than work that can be saved
    by the answer."""
    return x.device.type != "cpu"


def none(odd_1: Tensor) -> bool | Tensor:
    """Whether a kernel, which sets ``odd_1`` to 1, met nothing odd: of a device for whoever asks to wait for."""
    return odd_1[0] == 0 if waits(odd_1) else not odd_1


@lru_cache
def lacking(device: str) -> str | None:
    """Why no kernels serve this type of device; None where they do."""
    package, needs = KERNELS.get(device, ("", ""))
    if not package:
        return "there are none for it"
    try:
        import_module(needs)  # missing, or made for another numpy
    except ImportError as error:
        return f"{needs} cannot be imported ({error})"
    problem = getattr(import_module(package), "problem", lambda: "")()
    return problem or None


@lru_cache
def _module(module: str, device: str) -> ModuleType | None:
    if lacking(device) is not None or find_spec(module) is None:
        return None
    return import_module(module)


class _Own(threading.local):
    """What each thread keeps for itself."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device], Tensor] = {}
        self.spare: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}


_own = _Own()


def scratch(name: str, rows: int, size: int, device: torch.device) -> Tensor:
    """An uninitialised float32 buffer ``(rows, size)``, this thread's until its next call with this name.

    The system hands out fresh memory page by page, which takes longer than two copies of it. Up to ``KEPT`` bytes
    are kept for the next call. On other devices, whose memory torch keeps and orders by stream, it is a new one.
    """
    if device.type != "cpu":
        return torch.empty(rows, size, device=device)
    count, key = rows * size, (name, device)
    buffer = _own.buffers.pop(key, None)
    if buffer is None or len(buffer) < count:
        del buffer  # freed before a larger one is asked for
        buffer = pages.empty(count, device=device)
    if 4 * len(buffer) <= KEPT:
        _own.buffers[key] = buffer
    return buffer[:count].view(rows, size)


def fresh(like: Tensor) -> Tensor:
    """An uninitialised tensor of this shape and type: one that this thread was given back, if one fits."""
    spare = _own.spare.pop((like.shape, like.dtype, like.device), None)
    return pages.empty_like(like) if spare is None else spare


def give_back(x: Tensor) -> None:
    """``x`` came from :func:`fresh` and nobody needs it, or a view of it, any more. One of a kind is kept."""
    if x.nbytes <= KEPT and x.device.type == "cpu":
        _own.spare[x.shape, x.dtype, x.device] = x


def run(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """``kernel(first, last, *arguments)`` over all of ``range(count)``, in torch's number of threads.

    The items of the range must be independent of each other.
    """
    threads = min(torch.get_num_threads(), count)
    if 0 < max((getattr(x, "size", 0) for x in arguments), default=0) < SMALLEST:
        threads = 1  # others would only begin when it is done
    if threads <= 1:
        kernel(0, count, *arguments)
        return
    pieces = min(count, _PIECES * threads)
    todo = [(i * count // pieces, (i + 1) * count // pieces) for i in reversed(range(pieces))]

    def work() -> None:
        while True:
            try:
                first, last = todo.pop()  # atomic
            except IndexError:
                return
            kernel(first, last, *arguments)

    others = [_pool(threads).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
