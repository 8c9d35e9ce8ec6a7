"""Finds out how this process was started and connects it to the other ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fedmpi.comm.base import Comm
from fedmpi.comm.local import solo
from fedmpi.errors import CommError

# Which variable tells the number of ranks, by launcher. srun's PMIx and PMI do not tell the size of the
# step; Slurm does.
_SIZES = (("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE"), ("mpiexec (MPICH)", "PMI_SIZE"))
_INSTALL = "pip install 'fedmpi[mpi]' brings one (Open MPI), or load your cluster's MPI module"


def launcher(environ: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """The launcher and its number of ranks; None for a process started alone."""
    for name, variable in _SIZES:
        if environ.get(variable, "").isdigit():
            return name, int(environ[variable])
    if "PMIX_RANK" in environ or "PMI_RANK" in environ:
        size = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
        return ("srun" if "SLURM_JOB_ID" in environ else "a PMI launcher"), int(size)
    return None


def connect(environ: Mapping[str, str] = os.environ) -> Comm:
    """This process's end: one rank of many under mpirun, mpiexec or srun, else the only rank.

    A process that was started alone, or as the only rank, never touches MPI.

    Raises:
      CommError: there should be several ranks, but no MPI library, or one of another launcher.
    """
    found = launcher(environ)
    if found is None or found[1] == 1:
        return solo()
    name, size = found
    try:
        from fedmpi.comm.mpi import MPIComm

        comm = MPIComm()
    except (ImportError, RuntimeError) as error:
        raise CommError(
            f"{name} started {size} ranks, but mpi4py finds no MPI library ({error}); {_INSTALL}"
        ) from None
    if comm.size != size:
        raise CommError(
            f"{name} started {size} ranks, but {comm.name} sees {comm.size}: mpi4py uses another MPI than "
            "the launcher; start with that MPI's own mpirun, or point MPI4PY_LIBMPI to the launcher's library"
        )
    return comm
