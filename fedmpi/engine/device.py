"""Where a rank computes: the CPU or an accelerator.

Model, gradients, messages' arrays, the server's state and sums lie there; ids, weights, steps, lengths and versions on
the CPU, in every run. Initial values are made on the CPU, so that they are the same everywhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.comm.placement import compute_device, identity
from fedmpi.engine.progress import human
from fedmpi.errors import ConfigError, NumericalError
from fedmpi.message import CPU
from fedmpi.tasks.data import Split

_COPIES = (
    6  # the model's and its gradient's numbers, the server's, a client's sum, its decoded message, the mean
)
_SHARE = 4  # of what is free there, a fourth at most goes to data, and to clients' states


class Place(NamedTuple):
    """Where one rank computes.

    Attributes:
      device: there.
      ranks: that compute on the same one.
    """

    device: torch.device = CPU
    ranks: int = 1

    @classmethod
    def of(cls, wish: str, comm: Comm) -> Place:
        """As :func:`~fedmpi.comm.placement.compute_device` chooses; a guess of how many others do."""
        return cls(compute_device(wish, comm))

    def counted(self, comm: Comm) -> Place:
        """The same, once all ranks have told where they compute. Collective."""
        mine = identity(self.device).encode()
        return self._replace(ranks=comm.allgather(mine).count(mine))

    @property
    def kind(self) -> str:
        """What decides the last bits of a product: cpu, or the accelerator's name."""
        if self.device.type != "cuda":
            return self.device.type
        return f"cuda, {torch.cuda.get_device_name(self.device)}"

    def free(self) -> int | None:
        """Bytes of its memory that this rank can have now; None where there is nobody to ask."""
        ask = None if self.device == CPU else getattr(_module(self.device), "mem_get_info", None)
        return None if ask is None else int(ask(self.device)[0]) // self.ranks

    def check(self, size: int) -> None:
        """Training a vector of ``size`` numbers can fit.

        Raises:
          ConfigError: it cannot, whatever the batch is.
        """
        free, least = self.free(), 4 * size * _COPIES
        if free is not None and free < least:
            raise ConfigError(
                f"device: training {size} numbers takes at least {human(least)} of {self.device}'s memory, "
                f"{human(free)} are free for each of its {self.ranks} ranks; ways out: fewer ranks a GPU, a smaller "
                "model, device: cpu"
            )

    def holds(self, nbytes: int) -> bool:
        """So much fits there beside what training needs."""
        free = self.free()
        return free is None or nbytes <= free // _SHARE


def _module(device: torch.device) -> object:
    return getattr(torch, device.type)


def synchronize(device: torch.device) -> None:
    """Wait until all that was launched there is done: before a clock is read."""
    if device != CPU:
        _module(device).synchronize(device)  # type: ignore[attr-defined]


_MISSING = "does not have a deterministic implementation"


@contextmanager
def explained(device: torch.device, doing: str) -> Iterator[None]:
    """What only a device can lack ends with a sentence.

    Raises:
      NumericalError: its memory has run out; names the figures and the ways out.
      ConfigError: torch has an operation of a reproducible run in no form that gives the same bits again.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free = Place(device).free()
        left = "" if free is None else f" ({human(free)} are free now)"
        raise NumericalError(
            f"device: {device} ran out of memory while {doing}{left}: {_first_line(error)}; ways out: a smaller "
            "local.batch, a larger local.accumulate, a smaller test_batch, local.precision: bfloat16, store: mmap, "
            "fewer ranks a GPU, device: cpu"
        ) from None
    except RuntimeError as error:
        if device == CPU or _MISSING not in str(error):
            raise
        raise ConfigError(
            f"reproducible: torch has no form of {str(error).partition(' ')[0]} that gives the same bits again on "
            f"{device}; ways out: device: cpu, or reproducible: false"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".")[:300]


_LOCK, _USERS = threading.Lock(), [0]  # runs of this process that want the same bits; ranks may be threads


@contextmanager
def repeatable(device: torch.device, wanted: bool) -> Iterator[None]:
    """In here an accelerator gives the same bits again, where that is ``wanted``, or says that it cannot."""
    if not wanted or device == CPU:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    with _LOCK:
        _USERS[0] += 1
        if _USERS[0] == 1:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # never read
    try:
        yield
    finally:
        with _LOCK:
            _USERS[0] -= 1
            if not _USERS[0]:
                torch.use_deterministic_algorithms(False)


class Samples:
    """A split's samples, as they come to where a rank computes: they lie there once and for all where they fit, else
    each batch comes from pinned memory, while what was launched before it is computed."""

    def __init__(self, split: Split, place: Place = Place()) -> None:  # noqa: B008 - a named tuple
        self.host, self._device = split, place.device
        self._there: tuple[Tensor, Tensor] | None = None
        if place.device == CPU:
            self._there = split.x, split.y
        elif place.holds(split.x.nbytes + split.y.nbytes):
            self._there = split.x.to(place.device), split.y.to(place.device)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples ``index`` (int64, of any shape, on the CPU)."""
        if self._there is None:
            return self._sent(self.host.x, index), self._sent(self.host.y, index)
        x, y = self._there
        index = index.to(self._device, non_blocking=True)
        return x[index], y[index]

    def _sent(self, values: Tensor, index: Tensor) -> Tensor:
        rows = torch.empty((index.numel(), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
        torch.index_select(values, 0, index.reshape(-1), out=rows)
        return rows.view(*index.shape, *values.shape[1:]).to(self._device, non_blocking=True)
