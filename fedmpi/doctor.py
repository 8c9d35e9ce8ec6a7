"""``fedmpi doctor``: what this process finds, and whether it works."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedmpi.comm.connect import connect, reason
from fedmpi.comm.launcher import launcher
from fedmpi.comm.placement import Seat, own_device, seats
from fedmpi.errors import CommError
from fedmpi.version import __version__


def examine() -> int:
    """Print what rank 0 finds; returns 0 when everything that was started works."""
    import torch

    launch = launcher()
    facts = {
        "fedmpi": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        **_cuda(),
        "cores": f"{len(os.sched_getaffinity(0))} for this process",
        "launcher": "none: this process was started alone"
        if launch is None
        else f"{launch.name}, {launch.size} ranks",
        "Slurm job": os.environ.get("SLURM_JOB_ID", "none"),
    }
    problem = ""
    rank, places = 0, []
    try:
        comm = connect()
        rank, places = comm.rank, seats(comm)
        facts["device: auto"] = str(own_device("auto", comm))
        facts["comm"] = f"{comm.name}, {comm.size} ranks on {comm.device.type}: {reason()}"
        if launch is None or launch.mpi:
            facts |= {f"MPI {name}": value for name, value in _mpi().items()}
    except CommError as error:
        problem = str(error)
    if rank == 0:
        for name, value in facts.items():
            print(f"{name:<28}{value}")
        if places:
            print("", *chart(places), sep="\n")
        if problem:
            print(f"fedmpi: {problem}", file=sys.stderr)
    return 1 if problem or "WRONG" in facts.get("MPI a real collective", "") else 0


def _cuda() -> dict[str, str]:
    """What torch has for GPUs, where there are any."""
    import torch

    if not torch.cuda.device_count():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    facts = {"CUDA": f"{torch.version.cuda}, driver {_driver()}, NCCL {nccl}", "kernels there": _kernels()}
    for i in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(i)
        facts[f"GPU {i}"] = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    return facts


def _driver() -> str:
    """The version that the driver tells the system."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", said)
    return found[0] if found else "unknown"


def _kernels() -> str:
    """Triton's, if one can be compiled, launched and is right."""
    from fedmpi.ops import fast

    if (why := fast.lacking("cuda")) is not None:
        return f"torch's own, slower: {why}"
    return "Triton's"


def chart(places: Sequence[Seat]) -> list[str]:
    """The map of the ranks, a line each."""
    width = max(len("machine"), *(len(place.host) for place in places)) + 2
    lines = [f"{'rank':<6}{'machine':<{width}}local rank  threads  GPU"]
    holders = Counter((place.host, place.gpu) for place in places)
    for place in places:
        sharing = holders[place.host, place.gpu] - 1
        gpu = place.gpu + (f", shared with {sharing} more" if place.gpu and sharing else "")
        lines.append(
            f"{place.rank:<6}{place.host:<{width}}{place.local_rank:<12}"
            f"{place.cpus if place.cpus == 1 else f'1 or {place.cpus}':<9}{gpu or 'none'}"
        )
    return lines


def _mpi() -> dict[str, str]:
    try:
        from fedmpi.comm.mpi import probe

        return probe()
    except (ImportError, RuntimeError) as error:
        return {"library": f"none ({error}); one rank works without: pip install 'fedmpi[mpi]' brings one"}
