"""Collectives over torch.distributed: Gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from fedmpi.comm.base import Comm, LostError
from fedmpi.comm.launcher import launcher
from fedmpi.comm.placement import gpu_index
from fedmpi.comm.rendezvous import Place, absent, brief, find, meet, silent
from fedmpi.errors import CommError

TIMEOUT = 300.0
_FAILED = "failed"  # where a group's store says why its first rank failed

# What Gloo and NCCL add up, and what carries the types that they do not.
_SUMS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8}
_SUMS |= {torch.int32, torch.int64}
_WIDER = {torch.int16: torch.int32}

_open: weakref.WeakSet[TorchComm] = weakref.WeakSet()
_here: Place | None = None  # this process's place in the group of all ranks, where it was started here


class TorchComm(Comm):
    """One rank of a torch.distributed group.

    Its collectives run on a group of their own, so that a thread may use it while the job goes on with its
    group (NCCL's over a part of the ranks run on the given group itself, because torch names a group that only
    its members start by how many each has started before). All ranks of the group, and only they, construct their
    ends together.

    Args:
      group: the job's group (default: all ranks).
      backend: "gloo" or "nccl" (default: the group's own).
      device: where NCCL's buffers lie (default: the group's device, else the current one).
      timeout: seconds that a collective waits for the other ranks.

    Raises:
      CommError: there is no such group, or this backend cannot work here.
      LostError: from any collective, naming it, when a rank ended or did not come in time. Under NCCL,
        whose collectives run behind the host, torch's own watchdog ends the process instead.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        backend: str | None = None,
        device: torch.device | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if not dist.is_initialized():
            raise CommError(
                "group: expected an initialized process group (torch.distributed.init_process_group), got none"
            )
        backend = backend or _backend(group)
        if backend not in ("gloo", "nccl"):
            raise CommError(f"backend: expected gloo or nccl, got {backend!r}")
        if backend == "nccl":
            self.device = device or _gpu_of(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise CommError("group: expected one that this rank belongs to")
        self.name, self._timeout, self._lost = backend, timeout, ""
        self._works: dict[object, Any] = {}  # under way: nobody else may hold one, it keeps connections open
        whole = group is None or self.size == dist.get_world_size()
        self._place = _here if whole else None
        self._ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        with self._doing("starting a group of its own"):
            self._group: Any = self._own(group, whole)
            self._find_neighbours()

    @classmethod
    def among(cls, store: Store, rank: int, size: int, timeout: float) -> TorchComm:
        """A Gloo end of ranks that only a store connects, whether torch.distributed is initialized or not. Called by
        all of them.

        Raises:
          LostError: one did not come.
        """
        end = cls.__new__(cls)
        end.rank, end.size, end.name, end._timeout, end._lost = rank, size, "gloo", timeout, ""
        end._works, end._place, end._ranks, end._store = {}, None, list(range(size)), store
        _open.add(end)
        with end._doing("starting a group"):
            end._group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
            end._find_neighbours()
        return end

    def _find_neighbours(self) -> None:
        hosts = self._allgather(socket.gethostname().encode())
        self.local_size = hosts.count(hosts[self.rank])
        self.local_rank = hosts[: self.rank].count(hosts[self.rank])

    def _own(self, group: dist.ProcessGroup | None, whole: bool) -> Any:
        """Its methods are called, not torch.distributed's functions: torch does not know a private group."""
        if self.name != "gloo":
            return dist.new_group(None, timedelta(seconds=self._timeout), self.name) if whole else group
        _open.add(self)
        self._store, members = _private(group, self._timeout)
        return members

    @classmethod
    def start(
        cls, backend: str = "auto", *, environ: Mapping[str, str] = os.environ, timeout: float = TIMEOUT
    ) -> TorchComm:
        """Start a group from torchrun's environment, from MPI or from Slurm's variables (see rendezvous.py).

        A group that the job has started before is wrapped instead. ``auto`` takes NCCL where every rank has
        a GPU of its own, else Gloo.

        Raises:
          CommError: no launcher, a rank that did not come in time, or NCCL where it cannot work.
        """
        if dist.is_initialized():
            return cls(backend=None if backend == "auto" else backend, timeout=timeout)
        launch = launcher(environ)
        if launch is None:
            raise CommError(
                "torch.distributed: expected torchrun's, MPI's or Slurm's variables, got none; start it with "
                "torchrun --nproc-per-node N -m fedmpi …, mpirun or srun"
            )
        if backend == "nccl":
            require_gpu()
        here = find(launch.variables, environ, timeout)
        device = None if backend == "gloo" else _share(here.local_rank)
        facts = meet(here, {"host": socket.gethostname(), "gpu": _identity(device)}, timeout)
        backend = _choose(backend, facts)
        if backend == "gloo":
            device = None
        if device is not None:
            torch.cuda.set_device(device)
        _initialize(here, backend, device, timeout)
        return cls(device=device, timeout=timeout)

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        if self._lost:
            raise LostError(self._lost)
        try:
            yield
        except RuntimeError as error:
            who = "a rank"
            if self.name == "gloo":
                # Connections close with the last reference to the group: then the others notice, too, and tell.
                traceback.clear_frames(error.__traceback__)
                self.close()
                if why := self._said():
                    self._lost = f"{self.name}: rank {self.rank} of {self.size}, {what}: {why}"
                    raise LostError(self._lost) from None
                if missing := self._missing():
                    who = f"rank {', '.join(missing)}"
            self._lost = (
                f"{self.name}: rank {self.rank} of {self.size}, {what}: {who} ended or did not come "
                f"within {self._timeout:g} s ({brief(error)})"
            )
            raise LostError(self._lost) from None

    def _missing(self) -> list[str]:
        """The ranks that ended, in a group of its own by their ranks in the job, too."""
        if self._place is not None:
            return [str(rank) for rank in absent(self._place)]
        return [
            str(rank) if rank == self._ranks[rank] else f"{rank} ({self._ranks[rank]} of the job)"
            for rank in silent(self._store, self.rank, self.size)
        ]

    def _summable(self, x: Tensor) -> Tensor:
        if x.dtype in _SUMS:
            return x
        if x.dtype not in _WIDER:
            raise CommError(f"sum: expected real numbers that {self.name} can add, got {x.dtype}")
        return x.to(_WIDER[x.dtype])

    def _sum(self, tensor: Tensor) -> None:
        self._start_sum(tensor)()

    def _start_sum(self, tensor: Tensor) -> Callable[[], None]:
        return self._started(
            f"summing {tensor.numel()} {tensor.dtype}",
            lambda: self._group.allreduce([tensor]),
        )

    def _started(self, what: str, launch: Callable[[], Any]) -> Callable[[], None]:
        ticket = object()
        with self._doing(what):
            self._works[ticket] = launch()

        def wait() -> None:
            with self._doing(what):
                self._works.pop(ticket).wait()

        return wait

    def _allgather_rows(self, row: Tensor, rows: Tensor) -> None:
        self._start_allgather_rows(row, rows)()

    def _start_allgather_rows(self, row: Tensor, rows: Tensor) -> Callable[[], None]:
        return self._started(
            f"gathering {len(row)} bytes a rank",
            lambda: self._group._allgather_base(rows.view(-1), row),
        )

    def _alltoall_rows(self, sent: Tensor, received: Tensor) -> None:
        with self._doing(f"exchanging {sent.shape[1]} bytes a rank"):
            self._exchange(received, sent)

    def _alltoall(self, parts: Sequence[bytes]) -> list[bytes]:
        with self._doing(f"exchanging {sum(map(len, parts))} bytes"):
            sent = [len(part) for part in parts]
            sizes = torch.tensor(sent, device=self.device)
            arriving = torch.empty_like(sizes)
            self._exchange(arriving, sizes)
            received: list[int] = arriving.tolist()
            buffer = torch.empty(sum(received), dtype=torch.uint8, device=self.device)
            data = self._tensor(b"".join(parts))
            self._exchange(buffer, data, received, sent)
            return [part.numpy().tobytes() for part in buffer.cpu().split(received)]

    def _exchange(
        self, received: Tensor, sent: Tensor, theirs: Sequence[int] = (), mine: Sequence[int] = ()
    ) -> None:
        self._group.alltoall_base(received, sent, list(theirs), list(mine)).wait()

    def _broadcast(self, data: bytes, root: int) -> bytes:
        with self._doing(f"broadcasting from rank {root}"):
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            size = torch.tensor([len(data)], device=self.device)
            self._group.broadcast([size], options).wait()
            if not size.item():
                return b""
            mine = self.rank == root
            buffer = self._tensor(data) if mine else size.new_empty(int(size.item()), dtype=torch.uint8)
            self._group.broadcast([buffer], options).wait()
            return data if mine else buffer.cpu().numpy().tobytes()

    # Lengths differ, which neither library's own gathers allow: an exchange moves no more bytes than they would.

    def _gather(self, data: bytes, root: int) -> list[bytes]:
        parts = self._alltoall([data if rank == root else b"" for rank in range(self.size)])
        return parts if self.rank == root else []

    def _allgather(self, data: bytes) -> list[bytes]:
        return self._alltoall([data] * self.size)

    def _tensor(self, data: bytes) -> Tensor:
        if not data:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)

    def close(self) -> None:
        """Let go of what is under way and of the group, whose connections and threads end with it."""
        self._works.clear()
        self._group = None

    def fail(self, why: str) -> None:
        """What the others raise says why (over Gloo, whose group is this end's own)."""
        if self._lost or self.name != "gloo":
            return
        with suppress(RuntimeError):  # the store went with a rank
            self._store.compare_set(_FAILED, "", f"rank {self.rank} failed: {why}")
        self._lost = f"{self.name}: rank {self.rank} of {self.size} has failed before: {why}"
        self.close()

    def _said(self) -> str:
        """Why the first rank that failed did."""
        with suppress(RuntimeError):
            if self._store.check([_FAILED]):
                return str(self._store.get(_FAILED).decode())
        return ""

    def abort(self) -> None:
        """End this process; the others find its connections closed."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def require_gpu() -> None:
    """
    Raises:
      CommError: NCCL cannot work here.
    """
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        lack = "no GPU that torch can use" if dist.is_nccl_available() else "torch was built without NCCL"
        raise CommError(f"comm: nccl needs a GPU on every rank, but here is {lack}; take gloo or auto")


def _initialize(here: Place, backend: str, device: torch.device | None, timeout: float) -> None:
    global _here
    try:
        dist.init_process_group(
            backend,
            store=here.store,
            rank=here.rank,
            world_size=here.size,
            timeout=timedelta(seconds=timeout),
            device_id=device,
        )
    except RuntimeError as error:
        raise CommError(
            f"{backend}: rank {here.rank} of {here.size}: cannot connect to the other ranks ({brief(error)}); "
            f"{backend.upper()}_SOCKET_IFNAME names the network interface to take"
        ) from None
    _here = here


def _private(group: dist.ProcessGroup | None, timeout: float) -> tuple[Any, Any]:
    """A Gloo group of the members of ``group``, started by them alone and unknown to torch, which counts the groups
    that each rank has started, and its store. Their first rank names it."""
    group = group or dist.group.WORLD
    assert group is not None
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, group_src=0, group=group)
    store = dist.distributed_c10d.PrefixStore(f"fedmpi/{name[0]}", dist.distributed_c10d._get_default_store())
    return store, dist.ProcessGroupGloo(store, group.rank(), group.size(), timedelta(seconds=timeout))


@atexit.register
def _end() -> None:
    """End Gloo's threads while Python is still there: one that lets go of a tensor after that aborts the process.

    The job's default group is its own to destroy, unless it was started here; extra ones that it left would abort.
    """
    for comm in list(_open):
        comm.close()
    if not dist.is_initialized():
        return
    if _here is not None:
        dist.destroy_process_group()
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and dist.get_backend(group) == "gloo":
            dist.destroy_process_group(group)


def _backend(group: dist.ProcessGroup | None) -> str:
    # A group may have one library for each kind of device ("cpu:gloo,cuda:nccl").
    names = str(dist.get_backend_config(group))
    return "nccl" if "nccl" in names and torch.cuda.is_available() else str(dist.get_backend(group))


def _gpu_of(group: dist.ProcessGroup | None) -> torch.device:
    require_gpu()
    group = group or dist.group.WORLD
    bound: torch.device | None = None if group is None else group.bound_device_id
    return bound or torch.device("cuda", torch.cuda.current_device())


def _share(local_rank: int) -> torch.device | None:
    """This rank's GPU: several ranks share one where there are fewer."""
    count = torch.cuda.device_count() if dist.is_nccl_available() else 0
    return torch.device("cuda", gpu_index(local_rank, count)) if count else None


def _identity(device: torch.device | None) -> str:
    """The same for two ranks that hold the same GPU, even where each sees but one as cuda:0."""
    return "" if device is None else str(torch.cuda.get_device_properties(device).uuid)


def _choose(backend: str, facts: Sequence[Mapping[str, Any]]) -> str:
    """Gloo or NCCL, the same on every rank, from what all ranks told."""
    holders: dict[str, int] = {}
    for rank, fact in enumerate(facts):
        first = holders.setdefault(fact["gpu"], rank)
        if not fact["gpu"] or first != rank:
            if backend == "nccl":
                lack = f"has none on {fact['host']}" if not fact["gpu"] else f"shares one with rank {first}"
                raise CommError(
                    f"comm: nccl needs a GPU of its own for every rank, but rank {rank} {lack}; take gloo or auto"
                )
            return "gloo"
    return "nccl" if backend == "auto" else backend
