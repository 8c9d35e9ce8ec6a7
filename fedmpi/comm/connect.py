"""Connects this process to the other ranks that its launcher started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal, TypeAlias, get_args

from fedmpi.comm.base import Comm
from fedmpi.comm.guard import guarded
from fedmpi.comm.launcher import Launch, launcher, survives
from fedmpi.comm.local import solo
from fedmpi.errors import CommError

Choice: TypeAlias = Literal["auto", "mpi", "gloo", "nccl"]

_INSTALL = "pip install 'fedmpi[mpi]' brings one (Open MPI), or load your cluster's MPI module"


def connect(
    comm: str = "auto", *, environ: Mapping[str, str] = os.environ, timeout: float | None = None
) -> Comm:
    """This process's end: one rank of many under mpirun, mpiexec, srun or torchrun, else the only rank.

    A process that was started alone, or as the only rank, touches neither MPI nor torch.distributed.

    Args:
      comm: "mpi"; "gloo" or "nccl" of torch.distributed; "auto" for MPI under an MPI launcher, else NCCL
        where every rank has a GPU of its own, else Gloo.
      environ: the launcher's variables.
      timeout: seconds that the ranks wait for one that does not answer (default: MPI for ever, the others 300);
        while they connect, for one that has ended or is stopped (default: 300).

    Raises:
      CommError: there should be several ranks, but this ``comm`` cannot connect them.
    """
    if comm not in get_args(Choice):
        raise CommError(f"comm: expected one of {', '.join(get_args(Choice))}, got {comm!r}")
    if comm == "nccl":
        from fedmpi.comm.torch import require_gpu

        require_gpu()
    launch = launcher(environ)
    if launch is None or launch.size == 1:
        return solo()
    if comm == "mpi" or (comm == "auto" and launch.mpi):
        try:
            with guarded(launch.size, timeout):
                return _mpi(launch, timeout)
        except ImportError as error:
            if comm == "mpi" or launch.variables != "slurm":  # srun's ranks can do without
                raise CommError(
                    f"{launch.name} started {launch.size} ranks, but mpi4py finds no MPI library ({error}); {_INSTALL}"
                ) from None
    from fedmpi.comm.torch import TIMEOUT, TorchComm

    with guarded(launch.size, timeout) if launch.variables == "mpi" else nullcontext():  # through MPI_Init
        return TorchComm.start(comm, environ=environ, timeout=timeout or TIMEOUT)


def reason(environ: Mapping[str, str] = os.environ) -> str:
    """Why :func:`connect` takes what it takes by itself, for people."""
    launch = launcher(environ)
    if launch is None:
        return "this process was started alone"
    if launch.size == 1:
        return f"{launch.name} started one rank"
    if launch.mpi:
        return f"{launch.name} starts MPI ranks"
    return f"{launch.name} is no MPI launcher"


def _mpi(launch: Launch, timeout: float | None) -> Comm:
    """
    Raises:
      ImportError: there is no MPI library.
      CommError: there is one, but of another launcher.
    """
    try:
        if survives():
            import mpi4py

            mpi4py.rc.finalize = False  # with a dead rank MPI_Finalize may hang; Open MPI's ULFM does without
        from fedmpi.comm.mpi import MPIComm

        comm = MPIComm(timeout=timeout)
    except RuntimeError as error:  # mpi4py's word for a library that cannot be loaded
        raise ImportError(str(error)) from None
    if comm.size != launch.size:
        raise CommError(
            f"{launch.name} started {launch.size} ranks, but {comm.name} sees {comm.size}: mpi4py uses another "
            "MPI than the launcher; start with that MPI's own mpirun, point MPI4PY_LIBMPI to the launcher's "
            "library, or take comm: gloo"
        )
    return comm
