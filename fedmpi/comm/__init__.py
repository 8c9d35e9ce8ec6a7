"""Collectives between ranks: MPI, threads of one process, or nobody else."""

from __future__ import annotations

from fedmpi.comm.base import Comm, together
from fedmpi.comm.connect import connect
from fedmpi.comm.local import run_ranks, solo

__all__ = ["Comm", "connect", "run_ranks", "solo", "together"]
