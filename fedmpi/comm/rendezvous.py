"""Where the ranks of a torch.distributed group meet: torchrun's environment, MPI, or Slurm's variables.

Slurm's variables alone give everything but a port. Rank 0 then listens on
``10000 + (131 * SLURM_JOB_ID + SLURM_STEP_ID) % 20000``: below the range that systems hand out by themselves,
and another one for each step; MASTER_ADDR and MASTER_PORT override host and port.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fedmpi.comm.base import together
from fedmpi.errors import CommError

_started = 0  # groups of this process so far: a second one must not read the keys of the first


class Place(NamedTuple):
    """A rank's place before the ranks have met.

    Attributes:
      rank, size: this rank and how many there are.
      local_rank: this rank among those on its machine.
      store: connects all ranks.
      where: the store's address, for people.
      served: rank 0 holds the store, which ends with it.
    """

    rank: int
    size: int
    local_rank: int
    store: Store
    where: str
    served: bool


def find(variables: str, environ: Mapping[str, str], timeout: float) -> Place:
    """This rank's place as the launcher's ``variables`` tell it ("torchrun", "mpi" or "slurm").

    Raises:
      CommError: a variable is missing or no number, or rank 0's store cannot be reached within ``timeout``.
    """
    if variables == "mpi":
        return _from_mpi(timeout)
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if variables == "torchrun":
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local_rank = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0
        number = _number(environ, "MASTER_PORT")
    else:
        rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
        local_rank = _number(environ, "SLURM_LOCALID")
        job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
        host = host or slurm_host(environ)
        number = _number(environ, "MASTER_PORT") if port else 10000 + (131 * job + step) % 20000
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not rank < size:
        raise CommError(f"rank: expected 0 to {size - 1} for {size} ranks, got {rank}")
    if not host:
        raise CommError("MASTER_ADDR: expected rank 0's host, got nothing")
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt {attempt}", _store(host, number, served and rank == 0, rank, timeout))
    return Place(rank, size, local_rank, store, f"{host}:{number}", served)


def _number(environ: Mapping[str, str], variable: str) -> int:
    text = environ.get(variable, "")
    if not text.isdigit():
        raise CommError(f"{variable}: expected a whole number, got {text or 'nothing'}")
    return int(text)


def slurm_host(environ: Mapping[str, str]) -> str:
    """Rank 0's host: the first of the step's nodes (``gpu[03-05,9],x`` → ``gpu03``), this one if it is alone."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        return environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _from_mpi(timeout: float) -> Place:
    from fedmpi.comm.mpi import MPIComm

    mpi = MPIComm()
    store, where = None, b""
    with together(mpi, "starting the group's store"):
        if mpi.rank == 0:
            host = "127.0.0.1" if mpi.local_size == mpi.size else socket.gethostname()
            store = _store(host, 0, True, 0, timeout)
            where = f"{host} {store.port}".encode()
    host, port = mpi.broadcast(where).decode().split()
    if store is None:
        store = _store(host, int(port), False, mpi.rank, timeout)
    return Place(mpi.rank, mpi.size, mpi.local_rank, store, f"{host}:{port}", served=True)


def _store(host: str, port: int, serves: bool, rank: int, timeout: float) -> TCPStore:
    try:
        return TCPStore(host, port, None, serves, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        what = f"rank 0 cannot listen on port {port}" if serves else f"no rank 0 at {host}:{port}"
        raise CommError(
            f"torch.distributed: rank {rank}: {what} within {timeout:g} s ({brief(error)}); "
            "MASTER_ADDR and MASTER_PORT name another address"
        ) from None


def meet(place: Place, facts: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Wait until all ranks have come, and return what each tells of itself.

    Raises:
      CommError: naming the ranks that did not come within ``timeout`` seconds.
    """
    global _started
    _started += 1
    keys = [f"fedmpi {_started} rank {rank}" for rank in range(place.size)]
    try:
        place.store.set(keys[place.rank], json.dumps(facts))
        place.store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        try:
            missing = [rank for rank, key in enumerate(keys) if not place.store.check([key])]
        except RuntimeError:
            missing = []
        who = f"ranks {missing} of {place.size} did not come" if missing else "the ranks did not meet"
        raise CommError(
            f"torch.distributed: rank {place.rank}: {who} to {place.where} within {timeout:g} s ({brief(error)})"
        ) from None
    return [json.loads(place.store.get(key)) for key in keys]


def absent(place: Place, grace: float = 3.0) -> list[int]:
    """The ranks that do not tell within ``grace`` seconds that they, too, lost the others."""
    missing = [0] if place.served else []  # what a silent store means
    try:
        if place.served:  # a plain connection fails quietly where torch's prints a stack trace
            host, _, port = place.where.rpartition(":")
            socket.create_connection((host, int(port)), grace).close()
        place.store.set_timeout(timedelta(seconds=grace))
        return silent(place.store, place.rank, place.size, grace, missing, f"fedmpi {_started} ")
    except (OSError, RuntimeError):
        return missing  # rank 0, with the store, has gone


def silent(
    store: Store, rank: int, size: int, grace: float = 3.0, missing: Sequence[int] = (), prefix: str = ""
) -> list[int]:
    """The ranks of a group that do not tell through its store that they, too, lost the others; ``missing`` where the
    store ends before it says anything."""
    keys = [f"{prefix}lost {rank}" for rank in range(size)]
    end, missing = time.monotonic() + grace, list(missing)
    with suppress(RuntimeError):
        store.set(keys[rank], "")
        while missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    return missing


def brief(error: BaseException) -> str:
    """The first line of an error of torch.distributed, without its C++ place and general advice."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"^\[\S+:\d+\] ", "", line).split(". This is typically")[0]
