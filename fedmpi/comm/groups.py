"""Ranks in groups that work side by side, each with collectives of its own."""

from __future__ import annotations

from fedmpi.comm.base import Comm
from fedmpi.errors import CommError


def split(comm: Comm, groups: int) -> tuple[Comm, int]:
    """This MPI rank's end within its group, and the group's number from 0; groups are of neighbouring ranks.

    Raises:
      CommError: the ranks do not divide evenly.
    """
    if groups == 1:
        return comm, 0
    if comm.size % groups:
        raise CommError(
            f"--side-by-side: expected a number that divides the {comm.size} ranks, got {groups}; "
            f"start more processes, e.g. mpirun -n {groups} fedmpi sweep …"
        )
    from mpi4py import MPI

    from fedmpi.comm.mpi import MPIComm

    number = comm.rank * groups // comm.size
    if not isinstance(comm, MPIComm):
        raise CommError(f"--side-by-side: expected ranks of MPI (mpirun, mpiexec, srun), got {comm.name}")
    group: Comm = MPIComm(MPI.Intracomm(MPI.COMM_WORLD.Split(number, comm.rank)))
    # The machine's cores are shared with the other groups.
    group.local_rank, group.local_size = comm.local_rank, comm.local_size
    return group, number
