"""The collectives that fedmpi needs, over buffers only: nothing is ever pickled.

Every collective is called by all ranks in the same order. Wire bytes are what goes into and comes out of
the collectives' buffers on this rank; how often the library moves them on the way is its own affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from fedmpi.errors import CommError, FedMPIError


class Comm(ABC):
    """One rank's end.

    Attributes:
      rank, size: this rank and how many there are.
      local_size: how many share this machine.
      name: how the ranks are connected, for people.
      sent, received: wire bytes so far.
    """

    name: str
    rank: int
    size: int
    local_size: int
    sent: int = 0
    received: int = 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each contiguous tensor over all ranks, in place, in the order given."""
        if self.size > 1:
            for tensor in tensors:
                self._sum(tensor)
                self.sent += tensor.nbytes
                self.received += tensor.nbytes

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

    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes (of any lengths) on every rank, in rank order."""
        if self.size == 1:
            return [data]
        parts = self._allgather(data)
        self.sent += len(data)
        self.received += sum(map(len, parts)) - len(data)
        return parts

    @abstractmethod
    def _sum(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def _broadcast(self, data: bytes, root: int) -> bytes: ...

    @abstractmethod
    def _gather(self, data: bytes, root: int) -> list[bytes]: ...

    @abstractmethod
    def _allgather(self, data: bytes) -> list[bytes]: ...

    @abstractmethod
    def abort(self) -> None:
        """End all ranks because this one failed alone. Under MPI it does not return."""


class RankError(CommError):
    """An error that another rank reported; every rank raises the same one."""


@contextmanager
def together(comm: Comm, doing: str) -> Iterator[None]:
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
