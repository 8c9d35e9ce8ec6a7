"""Which launcher started this process, from the environment alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple


class Launch(NamedTuple):
    """A launch of several ranks, or of one.

    Attributes:
      name: the launcher, for people.
      size: the number of ranks.
      mpi: MPI can connect them (if a library fits the launcher).
      variables: what a group of torch.distributed can be started from.
    """

    name: str
    size: int
    mpi: bool
    variables: Literal["torchrun", "mpi", "slurm"]


# Which variable tells the number of ranks, by MPI launcher. srun's PMIx and PMI do not tell the size of the
# step; Slurm does.
_MPI_SIZES = (("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE"), ("mpiexec (MPICH)", "PMI_SIZE"))


def launcher(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """The innermost launcher of this process; None for a process started alone.

    torchrun comes first because an MPI launcher or srun may have started torchrun itself. A batch script
    has Slurm's job variables too; only srun sets the step's, so that a process there counts as alone.
    """

    def number(variable: str) -> int | None:
        return int(environ[variable]) if environ.get(variable, "").isdigit() else None

    size = number("WORLD_SIZE")
    ready = size is not None and "RANK" in environ
    if ready and size and "TORCHELASTIC_RUN_ID" in environ:
        return Launch("torchrun", size, mpi=False, variables="torchrun")
    slurm = number("SLURM_STEP_NUM_TASKS")
    for name, variable in _MPI_SIZES:
        if n := number(variable):
            srun = slurm is not None and variable == "PMI_SIZE"  # srun --mpi=pmi2 sets it as well
            return Launch("srun" if srun else name, n, mpi=True, variables="slurm" if srun else "mpi")
    if "PMIX_RANK" in environ or "PMI_RANK" in environ:
        n = slurm or number("SLURM_NTASKS") or 1
        if "SLURM_JOB_ID" in environ:
            return Launch("srun", n, mpi=True, variables="slurm" if slurm else "mpi")
        return Launch("a PMI launcher", n, mpi=True, variables="mpi")
    if ready and size and "MASTER_ADDR" in environ:
        return Launch("RANK and WORLD_SIZE", size, mpi=False, variables="torchrun")
    if slurm and "SLURM_PROCID" in environ:
        return Launch("srun", slurm, mpi=False, variables="slurm")
    return None


def survives(environ: Mapping[str, str] = os.environ) -> bool:
    """The launcher was told that a rank's end shall not be the others' (Open MPI's ULFM)."""
    # No capitals: it is Open MPI's own parameter.
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes", "enabled", "on")
