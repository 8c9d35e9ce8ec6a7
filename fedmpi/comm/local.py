"""Ranks as threads of one process: the same collectives without MPI, for laptops and tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from fedmpi.comm.base import Comm, LostError, RankError
from fedmpi.errors import ConfigError

T = TypeVar("T")
_MOST = 1024  # ranks of one process


class _Meeting:
    """One slot a rank, and a barrier to meet at."""

    def __init__(self, size: int, timeout: float) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)


class LocalComm(Comm):
    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, rank, size
        self.name = "threads" if size > 1 else "one process"
        self._meeting = meeting

    def _exchange(self, value: Any, use: Callable[[list[Any]], T]) -> T:
        """Show ``value`` to all ranks and compute ``use`` of all values while they stand still."""
        self._meeting.slots[self.rank] = value
        self._wait()
        result = use(self._meeting.slots)
        with suppress(LostError):  # of who has seen all and ended since, the next call tells
            self._wait()
        return result

    def _wait(self) -> None:
        try:
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise LostError(f"rank {self.rank}: another rank ended or did not come in time") from None

    def _sum(self, tensor: Tensor) -> None:
        def add(slots: list[Any]) -> Tensor:
            total: Tensor = slots[0].clone()
            for other in slots[1:]:
                total += other
            return total

        tensor.copy_(self._exchange(tensor, add))

    def _broadcast(self, data: bytes, root: int) -> bytes:
        result: bytes = self._exchange(data, lambda slots: slots[root])
        return result

    def _gather(self, data: bytes, root: int) -> list[bytes]:
        return self._exchange(data, lambda slots: list(slots) if self.rank == root else [])

    def _allgather(self, data: bytes) -> list[bytes]:
        return self._exchange(data, list)

    def _allgather_rows(self, row: Tensor, rows: Tensor) -> None:
        def copy(slots: list[Any]) -> None:
            for mine, other in zip(rows, slots, strict=True):
                mine.copy_(other)

        self._exchange(row, copy)

    def _alltoall_rows(self, sent: Tensor, received: Tensor) -> None:
        def copy(slots: list[Any]) -> None:
            for mine, others in zip(received, slots, strict=True):
                mine.copy_(others[self.rank])

        self._exchange(sent, copy)

    def _alltoall(self, parts: Sequence[bytes]) -> list[bytes]:
        return self._exchange(parts, lambda slots: [others[self.rank] for others in slots])

    def abort(self) -> None:
        self._meeting.barrier.abort()


def solo() -> Comm:
    """The only rank."""
    return LocalComm(0, 1, _Meeting(1, 1.0))


def run_ranks(size: int, main: Callable[[Comm], T], timeout: float = 600.0) -> list[T]:
    """Run ``main`` on ``size`` ranks, a thread each, and return their results in rank order.

    Raises:
      ConfigError: more ranks than threads can be had.
      The first rank's own error, when one fails; the others are ended by it.
    """
    if size > _MOST:
        raise ConfigError(f"--local-ranks: expected at most {_MOST:,}, a thread each, got {size:,}")
    meeting = _Meeting(size, timeout)
    results: list[Any] = [None] * size
    errors: list[tuple[int, int, BaseException]] = []

    def rank_main(rank: int) -> None:
        comm = LocalComm(rank, size, meeting)
        try:
            results[rank] = main(comm)
        except BaseException as error:  # carried to the caller's thread below
            reported = 2 if isinstance(error, LostError) else isinstance(error, RankError)
            errors.append((int(reported), rank, error))
            comm.abort()

    threads = [threading.Thread(target=rank_main, args=(r,), name=f"rank {r}") for r in range(1, size)]
    for thread in threads:
        thread.start()
    rank_main(0)  # in the caller's thread, where Ctrl-C arrives
    for thread in threads:
        thread.join()
    if errors:
        # A rank's own comes first, then what another one reported, last who only noticed that one is gone.
        raise min(errors, key=lambda e: e[:2])[2]
    return results
