"""Collectives through Horovod, in jobs that already train with it: its background thread does the sending."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import horovod.torch as hvd
import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.errors import CommError

# Horovod hands its counts to MPI, where most are 32-bit.
_CHUNK = 1 << 30
# What Horovod's all-reduce knows; float16 it adds up with a rounding after each term.
_SUMS = (torch.float32, torch.float64, torch.int32, torch.int64)


class HorovodComm(Comm):
    """All of Horovod's ranks.

    Horovod matches tensors by name. Ours depend on the collective alone: unnamed ones are numbered together
    with the job's own, which ranks may start in different orders.

    Raises:
      CommError: ``hvd.init()`` was not called.
    """

    def __init__(self) -> None:
        if not hvd.is_initialized():
            raise CommError("Horovod: expected hvd.init() before fedmpi.horovod is used")
        self.rank, self.size, self.local_size = hvd.rank(), hvd.size(), hvd.local_size()
        self.name = "Horovod"

    def _summable(self, x: Tensor) -> Tensor:
        if x.dtype in _SUMS:
            return x
        return x.float() if x.is_floating_point() else x.int()

    def _sum(self, tensor: Tensor) -> None:
        for piece in tensor.view(-1).split(_CHUNK):
            hvd.allreduce_(piece, op=hvd.Sum, name=f"fedmpi.sum.{piece.dtype}.{len(piece)}")

    def _broadcast(self, data: bytes, root: int) -> bytes:
        size = hvd.broadcast(torch.tensor([len(data)]), root, name="fedmpi.broadcast.size")
        buffer = _tensor(data) if self.rank == root else torch.empty(int(size), dtype=torch.uint8)
        for piece in buffer.split(_CHUNK):
            hvd.broadcast_(piece, root, name="fedmpi.broadcast")
        return data if self.rank == root else _bytes(buffer)

    def _gather(self, data: bytes, root: int) -> list[bytes]:
        parts = self._alltoall([data if rank == root else b"" for rank in range(self.size)])
        return parts if self.rank == root else []

    def _allgather(self, data: bytes) -> list[bytes]:
        sizes = [int(n) for n in hvd.allgather(torch.tensor([len(data)]), name="fedmpi.allgather.sizes")]
        if sum(sizes) > _CHUNK:
            return [self._broadcast(data if r == self.rank else b"", r) for r in range(self.size)]
        if not sum(sizes):
            return [b""] * self.size
        together = hvd.allgather(_tensor(data), name="fedmpi.allgather")
        return [_bytes(part) for part in together.split(sizes)]

    def _allgather_rows(self, row: Tensor, rows: Tensor) -> None:
        step = max(1, _CHUNK // self.size)
        for start in range(0, len(row), step):
            piece = row[start : start + step]
            gathered = hvd.allgather(piece, name=f"fedmpi.allgather.rows.{len(piece)}")
            rows[:, start : start + step] = gathered.view(self.size, -1)

    def _alltoall_rows(self, sent: Tensor, received: Tensor) -> None:
        step = max(1, _CHUNK // self.size)
        for start in range(0, sent.shape[1], step):
            piece = sent[:, start : start + step].contiguous()
            got = hvd.alltoall(piece, name=f"fedmpi.alltoall.rows.{piece.shape[1]}")
            received[:, start : start + step] = got

    def _alltoall(self, parts: Sequence[bytes]) -> list[bytes]:
        splits = torch.tensor([len(part) for part in parts], dtype=torch.int32)
        together, sizes = hvd.alltoall(_tensor(b"".join(parts)), splits, name="fedmpi.alltoall")
        return [_bytes(part) for part in together.split(sizes.tolist())]

    def abort(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the launcher ends the others


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
