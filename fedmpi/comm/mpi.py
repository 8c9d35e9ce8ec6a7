"""Collectives over mpi4py: upper-case buffer calls on a communicator of our own."""

from __future__ import annotations

import os
import re
import sys

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from fedmpi.comm.base import Comm

# Counts of most MPI calls are 32-bit.
_CHUNK = 1 << 30


class MPIComm(Comm):
    def __init__(self, world: MPI.Intracomm | None = None) -> None:
        self._mpi = (world or MPI.COMM_WORLD).Dup()
        self.rank, self.size = self._mpi.Get_rank(), self._mpi.Get_size()
        node = self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_size = node.Get_size()
        node.Free()
        version = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
        self.name = re.sub(r"\s*Version:\s*", " ", version)  # "MPICH Version:      5.0.2"

    def _sum(self, tensor: Tensor) -> None:
        flat = tensor.detach().view(-1).numpy()
        for start in range(0, len(flat), _CHUNK):
            self._mpi.Allreduce(MPI.IN_PLACE, flat[start : start + _CHUNK], op=MPI.SUM)

    def _sizes(self, n: int) -> list[int]:
        sizes = np.empty(self.size, dtype=np.int64)
        self._mpi.Allgather(np.array([n], dtype=np.int64), sizes)
        return [int(s) for s in sizes]

    def _broadcast(self, data: bytes, root: int) -> bytes:
        size = np.array([len(data)], dtype=np.int64)
        self._mpi.Bcast(size, root)
        buffer = _mutable(data) if self.rank == root else np.empty(int(size[0]), dtype=np.uint8)
        for start in range(0, len(buffer), _CHUNK):
            self._mpi.Bcast(buffer[start : start + _CHUNK], root)
        return data if self.rank == root else buffer.tobytes()

    def _gather(self, data: bytes, root: int) -> list[bytes]:
        sizes = self._sizes(len(data))
        if self.rank != root:
            for start in range(0, len(data), _CHUNK):
                self._mpi.Send(_mutable(data)[start : start + _CHUNK], root)
            return []
        parts = []
        for rank, size in enumerate(sizes):
            buffer = np.empty(size, dtype=np.uint8) if rank != root else _mutable(data)
            if rank != root:
                for start in range(0, size, _CHUNK):
                    self._mpi.Recv(buffer[start : start + _CHUNK], rank)
            parts.append(buffer.tobytes())
        return parts

    def _allgather(self, data: bytes) -> list[bytes]:
        sizes = self._sizes(len(data))
        if sum(sizes) > _CHUNK:
            return [self._broadcast(data if r == self.rank else b"", r) for r in range(self.size)]
        ends = np.cumsum(sizes)
        buffer = np.empty(int(ends[-1]), dtype=np.uint8)
        starts = [int(e) - s for e, s in zip(ends, sizes, strict=True)]
        self._mpi.Allgatherv(_mutable(data), (buffer, (sizes, starts)))
        return [buffer[s:e].tobytes() for s, e in zip(starts, ends, strict=True)]

    def abort(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.Abort(1)
        os._exit(1)  # an MPI whose Abort returns would leave us half alive


def _mutable(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    # mpi4py takes read-only send buffers, but Bcast's is also a receive buffer.
    return np.frombuffer(bytearray(data), dtype=np.uint8)


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
        "fault tolerance (ULFM)": "functions present" if hasattr(MPI.Comm, "Shrink") else "no",
        "ranks": f"{comm.size}, {comm.local_size} on this machine",
        "a real collective": "sums and gathers correctly" if works else "WRONG RESULT",
    }
