"""The collectives that fedmpi needs, over buffers only: nothing is ever pickled.

Every collective is called by all ranks in the same order. Wire bytes are what goes into and comes out of
the collectives' buffers on this rank; how often the library moves them on the way is its own affair. What
a rank sends itself never counts. Bytes that all get count once where they come from; a tensor's rows count
once for each other rank that they go to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fedmpi.errors import CommError, FedMPIError
from fedmpi.phases import phased


class Comm(ABC):
    """One rank's end.

    Attributes:
      rank, size: this rank and how many there are.
      local_rank, local_size: this rank among those on its machine, and how many they are.
      name: how the ranks are connected, for people.
      device: where tensors travel from without a copy; those of other devices are staged there and back.
      sent, received: wire bytes so far.
      survives: the others can go on without a rank that ended: they get a LostError, then call :meth:`shrink`.
      last_words: what is to be said when this rank has to end all of them, after the reason.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device = torch.device("cpu")
    sent: int = 0
    received: int = 0
    survives: bool = False
    last_words: str = ""

    @property
    def members(self) -> list[int]:
        """The ranks that are still there, by the numbers that their launcher gave them."""
        return list(range(self.size))

    def shrink(self) -> None:
        """Meet those who are left, after a LostError: rank, size and :attr:`members` are theirs from here on.

        Raises:
          LostError: one more ended; to be called again.
        """
        raise LostError(f"{self.name} cannot go on without a rank")

    def settle(self) -> None:  # noqa: B027 (nothing is the right thing where a rank's end is the others')
        """Where ranks survive: agree that all are still there.

        Raises:
          LostError: one ended. All get it, or none.
        """

    @phased("wire")
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over all ranks, in place, in the order given.

        float16 and bfloat16 travel, and are added up, as float32 where the library cannot add them.
        """
        for tensor in tensors:
            self.start_sum(tensor)()

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to :meth:`sum` one tensor, and return what waits for the end. Between the two the tensor must be left
        alone; other collectives may go out. Some libraries do all of it here."""
        if self.size == 1 or not tensor.numel():
            return lambda: None
        wire = self._summable(self._stage(tensor))
        wait = self._start_sum(wire)
        self.sent += wire.nbytes
        self.received += wire.nbytes

        def finish() -> None:
            wait()
            if wire.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(wire, non_blocking=wire.device.type == "cpu")

        return finish

    @phased("wire")
    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        """``root``'s bytes, on every rank."""
        if self.size == 1:
            return data
        data = self._broadcast(data, root)
        if self.rank == root:
            self.sent += len(data)
        else:
            self.received += len(data)
        return data

    @phased("wire")
    def gather(self, data: bytes, root: int = 0) -> list[bytes]:
        """Every rank's bytes (of any lengths) on ``root``, in rank order; an empty list elsewhere."""
        if self.size == 1:
            return [data]
        parts = self._gather(data, root)
        if self.rank == root:
            self.received += sum(map(len, parts)) - len(data)
        else:
            self.sent += len(data)
        return parts

    @phased("wire")
    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes (of any lengths) on every rank, in rank order."""
        if self.size == 1:
            return [data]
        parts = self._allgather(data)
        self.sent += len(data)
        self.received += sum(map(len, parts)) - len(data)
        return parts

    @phased("wire")
    def allgather_tensor(self, x: Tensor) -> Tensor:
        """Every rank's ``x``, of one shape and dtype on all ranks: ``(W, *x.shape)`` in rank order."""
        return self.start_allgather_tensor(x)()

    def start_allgather_tensor(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin an :meth:`allgather_tensor`, as :meth:`start_sum` does; ``x`` must be left alone until its end."""
        if self.size == 1 or not x.numel():
            copy = x.new_empty((self.size, *x.shape)).copy_(x.detach())
            return lambda: copy
        wire = self._stage(x)
        rows = self._room(x, (self.size, *x.shape))
        wait = self._start_allgather_rows(_as_bytes(wire), _as_bytes(rows).view(self.size, -1))
        self.sent += (self.size - 1) * x.nbytes
        self.received += (self.size - 1) * x.nbytes

        def finish(sent: Tensor = wire) -> Tensor:
            wait()
            return self._back(rows, x)  # until here what is sent stays alive

        return finish

    @phased("wire")
    def alltoall_tensor(self, x: Tensor) -> Tensor:
        """Row r of ``x`` ``(W, ...)`` goes to rank r; returns ``(W, ...)``, whose row r is from rank r.

        Raises:
          CommError: ``x`` has not one row a rank.
        """
        if x.ndim == 0 or len(x) != self.size:
            raise CommError(f"alltoall_tensor: expected x of {self.size} rows, got shape {tuple(x.shape)}")
        if self.size == 1 or not x.numel():
            return x.detach().clone(memory_format=torch.contiguous_format)
        wire = self._stage(x)
        result = self._room(x, x.shape)
        self._alltoall_rows(_as_bytes(wire).view(self.size, -1), _as_bytes(result).view(self.size, -1))
        self.sent += (self.size - 1) * x[0].nbytes
        self.received += (self.size - 1) * x[0].nbytes
        return self._back(result, x)

    @phased("wire")
    def alltoall(self, parts: Sequence[bytes]) -> list[bytes]:
        """``parts[r]`` (of any length) goes to rank r; returns what each rank sent here, in rank order.

        Raises:
          CommError: there is not one part a rank.
        """
        if len(parts) != self.size:
            raise CommError(f"alltoall: expected {self.size} parts, got {len(parts)}")
        if self.size == 1:
            return list(parts)
        received = self._alltoall(parts)
        self.sent += sum(map(len, parts)) - len(parts[self.rank])
        self.received += sum(map(len, received)) - len(received[self.rank])
        return received

    def _stage(self, x: Tensor) -> Tensor:
        """``x`` contiguous on :attr:`device`; a copy only where it is not. A host copy of GPU memory is pinned."""
        x = x.detach()
        if x.device == self.device:
            return x.contiguous()
        if self.device.type == "cpu":
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
        return x.contiguous().to(self.device)

    def _room(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Where what comes for ``x`` arrives: pinned, if it goes on to a GPU. Torch keeps pinned memory for the next
        one, and hands it out once copies from it are done."""
        pinned = self.device.type == "cpu" and x.device != self.device
        return torch.empty(shape, dtype=x.dtype, device=self.device, pin_memory=pinned)

    def _back(self, received: Tensor, x: Tensor) -> Tensor:
        """It, where ``x`` lies; the host does not wait for what goes on from it."""
        return received.to(x.device, non_blocking=self.device.type == "cpu")

    def _summable(self, x: Tensor) -> Tensor:
        """``x`` in a type that :meth:`_sum` can add."""
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    # Buffers below are contiguous, on self.device and not empty; rows are uint8 (W, bytes).

    @abstractmethod
    def _sum(self, tensor: Tensor) -> None: ...

    def _start_sum(self, tensor: Tensor) -> Callable[[], None]:
        self._sum(tensor)
        return lambda: None

    @abstractmethod
    def _allgather_rows(self, row: Tensor, rows: Tensor) -> None: ...

    def _start_allgather_rows(self, row: Tensor, rows: Tensor) -> Callable[[], None]:
        """``row`` stays alive until the end."""
        self._allgather_rows(row, rows)
        return lambda: None

    @abstractmethod
    def _alltoall_rows(self, sent: Tensor, received: Tensor) -> None: ...

    @abstractmethod
    def _alltoall(self, parts: Sequence[bytes]) -> list[bytes]: ...

    @abstractmethod
    def _broadcast(self, data: bytes, root: int) -> bytes: ...

    @abstractmethod
    def _gather(self, data: bytes, root: int) -> list[bytes]: ...

    @abstractmethod
    def _allgather(self, data: bytes) -> list[bytes]: ...

    @abstractmethod
    def abort(self) -> None:
        """End all ranks because this one failed alone. Under MPI it does not return."""

    def fail(self, why: str) -> None:  # noqa: B027 (threads end each other, Horovod finds out by itself)
        """Let the others, who may be waiting for this rank, know that it cannot go on. Where the library allows it,
        theirs raise LostError with ``why``, and this end is of no use any more; under MPI all ranks are ended, unless
        all of them fail."""


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


class RankError(CommError):
    """An error that another rank reported; every rank raises the same one."""


class LostError(CommError):
    """This rank lost the others (one ended, or did not come in time): each that notices says so itself."""


class Gathers(Protocol):
    """Ranks that can tell each other something: a :class:`Comm`, or several."""

    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes on every rank, in rank order."""


@contextmanager
def together(comm: Gathers, doing: str) -> Iterator[None]:
    """Run a part that may fail on some ranks only: then it fails on all, with the same message.

    Ranks always meet at the end of the block, so that none waits for one that has failed.
    """
    error: FedMPIError | None = None
    try:
        yield
    except FedMPIError as e:
        error = e
    reports = comm.allgather(b"" if error is None else f"{type(error).__name__}: {error}".encode())
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report:
            raise RankError(f"rank {rank} failed in {doing}: {report.decode()}")
