"""Collectives over mpi4py: upper-case buffer calls on a communicator of our own."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any, TypeAlias

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from fedmpi.comm.base import Comm, LostError
from fedmpi.comm.launcher import survives
from fedmpi.comm.watchdog import Watchdog

# Counts of most MPI calls are 32-bit.
_CHUNK = 1 << 30
_FAILED = 32000  # a tag of messages that say: this rank has failed
_LOSSES = {
    getattr(MPI, name, MPI.UNDEFINED)
    for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
}
_ALL_FAIL = 10.0  # seconds within which the others fail, too, if they do

_Buffer: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


class MPIComm(Comm):
    """One rank of an MPI world, on a communicator of its own.

    Under ``mpirun --with-ft ulfm`` of Open MPI the other ranks survive one that ends.

    Attributes:
      gpu_aware: MPI takes GPU tensors as they are, on all ranks: it says so, and a small sum of them came out
        right. Else they are staged through pinned host memory.

    Args:
      world: the ranks (default: all).
      timeout: seconds after which a rank that does not answer ends all (default: never). Without effect where
        MPI lets only one thread call it.

    Raises:
      LostError: from any collective, naming it, when a rank ended.
    """

    def __init__(self, world: MPI.Intracomm | None = None, timeout: float | None = None) -> None:
        world = world or MPI.COMM_WORLD
        self.survives = survives()
        version = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
        self.name = re.sub(r"\s*Version:\s*", " ", version)  # "MPICH Version:      5.0.2"
        self._watchdog: Watchdog | None = None
        self._mpi: MPI.Comm = world
        self._members = list(range(world.Get_size()))
        self._abandoned: list[Any] = []
        with self._doing("connecting"):
            self._join(world.Dup())
            self.gpu_aware = self._takes_gpus()
            if timeout is not None and MPI.Query_thread() == MPI.THREAD_MULTIPLE and self.size > 1:
                self._watchdog = Watchdog(world, timeout)

    def _join(self, comm: MPI.Comm) -> None:
        """Work on ``comm`` from here on."""
        self._mpi = comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py makes exceptions of them
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        node.Free()

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Around every call that waits for other ranks."""
        if self._watchdog is not None:
            self._watchdog.last_words = self.last_words
            self._watchdog.enter(what)
        try:
            yield
        except MPI.Exception as error:
            if not self.survives:
                raise
            failed = MPI.Group.Translate_ranks(self._mpi.Get_failed(), None, self._mpi.Get_group())
            # The call may know of it before the communicator does.
            if not (failed or error.Get_error_class() in _LOSSES or self._mpi.Is_revoked()):
                raise
            who = ", ".join(str(self._members[rank]) for rank in failed)
            raise LostError(
                f"{self.name}: rank {self._members[self.rank]}, {what}: "
                f"{f'rank {who} ended' if who else 'another rank has lost one'} ({error.Get_error_string()})"
            ) from None
        finally:
            if self._watchdog is not None:
                self._watchdog.leave()

    @property
    def members(self) -> list[int]:
        return self._members

    def shrink(self) -> None:
        with self._doing("meeting those who are left"):
            before = self._mpi
            before.Revoke()
            left = before.Shrink()
            alive = MPI.Group.Translate_ranks(left.Get_group(), None, before.Get_group())
            self._members = [self._members[rank] for rank in alive]
            if self._watchdog is not None:
                self._watchdog.members = self._members
            self._join(left)

    def settle(self) -> None:
        with self._doing("agreeing"):
            if self.survives:
                self._mpi.Agree(1)

    def _takes_gpus(self) -> bool:
        try:
            claims = bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
        except (AttributeError, OSError):
            claims = False
        claim = np.array([claims and torch.cuda.is_available()], dtype=np.int32)
        # Only then: an MPI that takes a GPU's address for the host's does not fail, it crashes.
        self._mpi.Allreduce(MPI.IN_PLACE, claim, op=MPI.MIN)
        if not claim[0]:
            return False
        sent = torch.ones(8, device=torch.device("cuda", self.local_rank % torch.cuda.device_count()))
        torch.cuda.synchronize(sent.device)
        self._mpi.Allreduce(MPI.IN_PLACE, sent, op=MPI.SUM)
        right = np.array([bool((sent == self.size).all())], dtype=np.int32)
        self._mpi.Allreduce(MPI.IN_PLACE, right, op=MPI.MIN)
        return bool(right[0])

    def _stage(self, x: Tensor) -> Tensor:
        if not (self.gpu_aware and x.is_cuda):
            return super()._stage(x)
        x = x.detach().contiguous()
        torch.cuda.current_stream(x.device).synchronize()  # MPI does not wait for the stream
        return x

    def _summable(self, x: Tensor) -> Tensor:
        wire = super()._summable(x)
        if wire.is_cuda:
            torch.cuda.current_stream(wire.device).synchronize()
        return wire

    def _sum(self, tensor: Tensor) -> None:
        with self._doing(f"summing {tensor.numel()} {tensor.dtype}"):
            for piece in _pieces(_buffer(tensor.view(-1))):
                self._mpi.Allreduce(MPI.IN_PLACE, piece, op=MPI.SUM)

    def _sizes(self, n: int) -> list[int]:
        sizes = np.empty(self.size, dtype=np.int64)
        self._mpi.Allgather(np.array([n], dtype=np.int64), sizes)
        return [int(s) for s in sizes]

    def _broadcast(self, data: bytes, root: int) -> bytes:
        with self._doing(f"broadcasting from rank {root}"):
            size = np.array([len(data)], dtype=np.int64)
            self._mpi.Bcast(size, root)
            buffer = _mutable(data) if self.rank == root else np.empty(int(size[0]), dtype=np.uint8)
            for piece in _pieces(buffer):
                self._mpi.Bcast(piece, root)
            return data if self.rank == root else buffer.tobytes()

    def _gather(self, data: bytes, root: int) -> list[bytes]:
        with self._doing(f"gathering on rank {root}"):
            sizes = self._sizes(len(data))
            if self.rank != root:
                for piece in _pieces(np.frombuffer(data, dtype=np.uint8)):
                    self._mpi.Send(piece, root)
                return []
            parts = []
            for rank, size in enumerate(sizes):
                buffer = np.empty(size, dtype=np.uint8) if rank != root else _mutable(data)
                if rank != root:
                    for piece in _pieces(buffer):
                        self._mpi.Recv(piece, rank)
                parts.append(buffer.tobytes())
            return parts

    def _allgather(self, data: bytes) -> list[bytes]:
        with self._doing(f"gathering {len(data)} bytes"):
            sizes = self._sizes(len(data))
            if sum(sizes) > _CHUNK:
                return [self._broadcast(data if r == self.rank else b"", r) for r in range(self.size)]
            ends = np.cumsum(sizes)
            buffer = np.empty(int(ends[-1]), dtype=np.uint8)
            starts = [int(e) - s for e, s in zip(ends, sizes, strict=True)]
            self._mpi.Allgatherv(_mutable(data), (buffer, (sizes, starts)))
            return [buffer[s:e].tobytes() for s, e in zip(starts, ends, strict=True)]

    def _allgather_rows(self, row: Tensor, rows: Tensor) -> None:
        with self._doing(f"gathering {len(row)} bytes a rank"):
            if rows.numel() <= _CHUNK:
                self._mpi.Allgather(_buffer(row), _buffer(rows))
                return
            rows[self.rank] = row
            for rank in range(self.size):
                for piece in _pieces(_buffer(rows[rank])):
                    self._mpi.Bcast(piece, rank)

    def _alltoall_rows(self, sent: Tensor, received: Tensor) -> None:
        with self._doing(f"exchanging {sent.shape[1]} bytes a rank"):
            self._exchange(list(_buffer(sent)), list(_buffer(received)))

    def _alltoall(self, parts: Sequence[bytes]) -> list[bytes]:
        with self._doing(f"exchanging {sum(map(len, parts))} bytes"):
            sizes = np.empty(self.size, dtype=np.int64)
            self._mpi.Alltoall(np.array([len(part) for part in parts], dtype=np.int64), sizes)
            received = [np.empty(int(size), dtype=np.uint8) for size in sizes]
            self._exchange([np.frombuffer(part, dtype=np.uint8) for part in parts], received)
            return [buffer.tobytes() for buffer in received]

    def _exchange(self, sent: Sequence[Any], received: Sequence[Any]) -> None:
        """``sent[r]`` goes to rank r, ``received[r]`` is filled by it. Point to point: Alltoallv counts and
        displaces in 32 bits."""
        received[self.rank][:] = sent[self.rank]
        others = [rank for rank in range(self.size) if rank != self.rank]
        pending = [self._mpi.Irecv(piece, rank) for rank in others for piece in _pieces(received[rank])]
        pending += [self._mpi.Isend(piece, rank) for rank in others for piece in _pieces(sent[rank])]
        try:
            MPI.Request.Waitall(pending)
        except MPI.Exception:
            self._abandoned += pending  # with their buffers, into which MPI may still write
            raise

    def fail(self, why: str) -> None:
        """Ends all ranks, unless all have failed within some seconds, or ULFM lets the others know."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        if self.survives:
            self._mpi.Revoke()
        elif others:
            empty = [np.empty(0, dtype=np.uint8) for _ in range(2)]
            pending = [self._mpi.Irecv(empty[0], rank, _FAILED) for rank in others]
            pending += [self._mpi.Isend(empty[1], rank, _FAILED) for rank in others]
            until = monotonic() + _ALL_FAIL
            while not MPI.Request.Testall(pending):
                if monotonic() > until:
                    sys.stderr.write(
                        f"fedmpi: {self.name}: rank {self.rank} failed: {why}; ending all ranks\n"
                    )
                    self.abort()
                sleep(0.01)

    def abort(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.Abort(1)
        os._exit(1)  # an MPI whose Abort returns would leave us half alive


def _buffer(x: Tensor) -> Any:
    """What mpi4py sends from and receives into: an array, or a GPU tensor as it is."""
    return x if x.is_cuda else x.numpy()


def _pieces(buffer: Any) -> Iterator[Any]:
    for start in range(0, len(buffer), _CHUNK):
        yield buffer[start : start + _CHUNK]


def _mutable(data: bytes) -> _Buffer:
    # mpi4py takes read-only send buffers, but Bcast's is also a receive buffer.
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def _how_to_survive() -> str:
    open_mpi = "Open MPI" in MPI.Get_library_version() and hasattr(MPI.Comm, "Shrink")
    return "off: mpirun --with-ft ulfm" if open_mpi else "no"


def probe() -> dict[str, str]:
    """What this MPI is and can do, for ``fedmpi doctor``."""
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    comm = MPIComm()
    total = torch.ones(1000) * comm.rank
    comm.sum([total])
    expected = comm.size * (comm.size - 1) / 2
    works = bool((total == expected).all()) and len(comm.allgather(b"x" * comm.rank)) == comm.size
    return {
        "library": comm.name,
        "standard": ".".join(map(str, MPI.Get_version())),
        "thread level": levels[MPI.Query_thread()],
        "fault tolerance (ULFM)": "on: the others survive a rank that ends"
        if survives()
        else _how_to_survive(),
        "GPU tensors": "taken as they are" if comm.gpu_aware else "staged through pinned host memory",
        "ranks": f"{comm.size}, {comm.local_size} on this machine",
        "a real collective": "sums and gathers correctly" if works else "WRONG RESULT",
    }
