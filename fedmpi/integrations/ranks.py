"""The ranks that average with each other: those of a process group, and whose collectives they use."""

from __future__ import annotations

import torch.distributed as dist

from fedmpi.comm.base import Comm
from fedmpi.errors import CommError, ConfigError


def among(group: dist.ProcessGroup | None, comm: Comm | str) -> Comm:
    """Collectives among the ranks of ``group`` that nobody else uses."""
    if isinstance(comm, str):
        if comm == "group":
            from fedmpi.comm.torch import TorchComm

            return TorchComm(group, backend="gloo")
        if comm != "mpi":
            raise ConfigError(f"comm: expected group, mpi or a Comm, got {comm!r}")
        from fedmpi.comm.mpi import MPIComm

        comm = MPIComm()
    return matching(comm, group)


def matching(comm: Comm, group: dist.ProcessGroup | None) -> Comm:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if (comm.size, comm.rank) != (size, rank):
        raise CommError(
            f"comm: expected rank {rank} of {size}, as in the module's process group, got {comm.rank} of {comm.size}"
        )
    return comm


def same_ranks(group: dist.ProcessGroup | None, own: dist.ProcessGroup) -> dist.ProcessGroup:
    """A DDP module's own group; ``group`` may only say the same."""
    if group is not None and group is not own:
        ranks = dist.get_process_group_ranks(group), dist.get_process_group_ranks(own)
        if ranks[0] != ranks[1]:
            raise ConfigError(
                f"group: expected the ranks of the module's own, {ranks[1]}, got {ranks[0]}; leave it out, or give the "
                "module inside (ddp.module)"
            )
    return own
