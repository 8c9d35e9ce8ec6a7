"""Where the ranks run: machine, rank among those there, its share of the CPUs, its GPU."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError


class Seat(NamedTuple):
    """Where one rank runs.

    Attributes:
      rank: among all.
      host: its machine.
      local_rank: among those on that machine.
      cpus: how many CPUs are its own, at least 1: the threads that it can use without taking another rank's.
      gpu: its GPU, the same text for two ranks only if they share it; "" without one.
    """

    rank: int
    host: str
    local_rank: int
    cpus: int
    gpu: str


def seats(comm: Comm, environ: Mapping[str, str] = os.environ) -> list[Seat]:
    """The seats of all ranks, on every rank. Collective. Wakes the GPUs' driver."""
    ranks = _exchange(comm, environ)
    gpus = [json.loads(part) for part in comm.allgather(json.dumps(_visible()).encode())]
    result = []
    for rank, (host, *_) in enumerate(ranks):
        local_rank = sum(other == host for other, *_ in ranks[:rank])
        gpu = gpus[rank][gpu_index(local_rank, len(gpus[rank]))] if gpus[rank] else ""
        result.append(Seat(rank, host, local_rank, _cpus(rank, ranks), gpu))
    return result


def own_cpus(comm: Comm, environ: Mapping[str, str] = os.environ) -> int:
    """How many CPUs are this rank's own: :attr:`Seat.cpus`. Collective."""
    return _cpus(comm.rank, _exchange(comm, environ))


def _exchange(comm: Comm, environ: Mapping[str, str]) -> list[list[Any]]:
    mine = [socket.gethostname(), sorted(os.sched_getaffinity(0)), *_granted(environ)]
    return [json.loads(part) for part in comm.allgather(json.dumps(mine).encode())]


def _cpus(rank: int, ranks: list[list[Any]]) -> int:
    host, cpus, on_node, per_task = ranks[rank]
    return share(cpus, [mask for other, mask, *_ in ranks if other == host], on_node, per_task)


def share(
    cpus: Collection[int], masks: Sequence[Collection[int]], on_node: int | None, per_task: int | None
) -> int:
    """How many CPUs are a rank's own.

    Args:
      cpus: those that it may run on.
      masks: the same of every rank on its machine, itself included. A CPU of n ranks counts 1/n for each.
      on_node: how many CPUs of the machine Slurm granted to all of them together; None outside Slurm.
      per_task: how many it granted to each; None where nothing was said.
    """
    users = Counter(cpu for mask in masks for cpu in mask)
    own = int(sum(Fraction(1, users[cpu]) for cpu in cpus))
    # Without binding, a rank may run on CPUs that are another job's.
    if on_node is not None:
        own = min(own, on_node // len(masks))
    if per_task is not None:
        own = min(own, per_task)
    return max(1, own)


def gpu_index(local_rank: int, count: int) -> int:
    """Which of the GPUs that a rank sees is its own: in turn, so that several ranks share where there are fewer.
    A rank that was bound to one sees only that."""
    return local_rank % count


def _granted(environ: Mapping[str, str]) -> tuple[int | None, int | None]:
    def number(variable: str) -> int | None:
        text = environ.get(variable, "")
        return int(text) if text.isdigit() and int(text) else None

    return number("SLURM_CPUS_ON_NODE"), number("SLURM_CPUS_PER_TASK")


def _visible() -> list[str]:
    """The GPUs that this process sees, by name and by what tells one from another."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        gpus.append(f"{found.name} {str(found.uuid)[:8]}")
    return gpus


def compute_device(wish: str, comm: Comm) -> torch.device:
    """Where this rank computes: :func:`own_device`, which becomes the current one of its kind.

    Raises:
      ConfigError: there is none such, or it cannot be used.
    """
    device = own_device(wish, comm)
    if device.type == "cpu":
        return device
    getattr(torch, device.type).set_device(device)
    try:
        torch.zeros(1, dtype=torch.float64, device=device)  # fixed-point sums need it
    except (RuntimeError, TypeError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"device: {wish} cannot be used ({said:.200}); expected one with float64: take device: cpu"
        ) from None
    return device


def own_device(wish: str, comm: Comm) -> torch.device:
    """Which device a rank's is.

    Args:
      wish: auto (its own GPU where it sees one, else the CPU), cpu, cuda (its own GPU), cuda:N, or another accelerator
        that torch knows.

    Raises:
      ConfigError: there is none such.
    """
    kind, _, number = wish.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.device_count() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    count = _count(kind)
    if not count or int(number or 0) >= count:
        there = f"{count} of that kind" if count else "none"
        raise ConfigError(
            f"device: expected auto, cpu, cuda or cuda:N, and an accelerator that this process sees, got {wish}; torch "
            f"{torch.__version__} finds {there} here: device: auto takes what there is"
        )
    if not number and comm.device.type == kind:  # NCCL's
        return comm.device
    return torch.device(kind, int(number) if number else gpu_index(comm.local_rank, count))


def _count(kind: str) -> int:
    """How many accelerators of a kind this process sees."""
    try:
        module = getattr(torch, torch.device(kind).type, None)
    except RuntimeError:
        return 0  # no kind that torch knows
    if module is None or not hasattr(module, "set_device") or not module.is_available():
        return 0
    return int(module.device_count())


def identity(device: torch.device) -> str:
    """The same text for two ranks that compute on the same one."""
    unique = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return f"{socket.gethostname()} {device} {unique}"
