"""Models whose parameters are sharded over some of the ranks (DTensors, as FSDP2 and tensor parallelism make them).

    mesh = init_device_mesh("cuda", (nodes, 8), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh["shard"])
    average = fedmpi.sync(model, method, group=mesh["replicate"].get_group())

Who shards the parameters reduces their gradients over the shards. What is left to average are this rank's own parts,
over the ranks that hold the same parts of the other replicas: each such column of the mesh is a job by itself, but for
what must be the same on all ranks, which they agree on: settings, a step that does not count, a state that is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedmpi import random
from fedmpi.comm.base import Comm, Gathers, together
from fedmpi.errors import CommError, ConfigError
from fedmpi.integrations.settings import Settings, Shapes


class Shards:
    """The other shards of this rank's replica, and, all ranks of the mesh.

    Attributes:
      place: where this rank is among the shards, and how many they are, for each dimension that shards.
      full: the whole parameters' shapes.
    """

    def __init__(self, replicas: Comm, across: Sequence[dist.ProcessGroup], full: Shapes) -> None:
        """Called by all ranks of the mesh.

        Args:
          replicas: the ranks that hold what this one holds of the other replicas.
          across: those that hold the other parts of this one, a group for each dimension.
        """
        from fedmpi.comm.torch import TorchComm

        self._replicas, self.full = replicas, full
        self._across = [TorchComm(group, backend="gloo") for group in across]
        self.place = [[comm.rank, comm.size] for comm in self._across]
        self._here = dist.get_rank()

    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's text, in rank order."""
        parts: list[tuple[int, str]] = [(self._here, data.decode())]
        for comm in (self._replicas, *self._across):
            told = comm.allgather(json.dumps(parts).encode())
            parts = [(rank, text) for some in told for rank, text in json.loads(some)]
        return [text.encode() for _, text in sorted(parts)]

    def all(self, yes: bool) -> bool:
        """``yes`` on all shards of this replica: the same on all ranks, where replicas are of one mind."""
        for comm in self._across:
            yes = bool(comm.allgather_tensor(torch.tensor([yes])).all())
        return yes

    def fail(self, why: str) -> None:
        """Let all who may be waiting for this rank know that it cannot go on."""
        for comm in (self._replicas, *self._across):
            comm.fail(why)

    def seed(self, seed: int) -> int:
        """Another one for each shard: equal groups must not draw equal numbers."""
        return random.key(seed, stream=f"shard {self.place}") if self.place else seed


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: itself, unless it is a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def gradient_of(name: str, parameter: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, which is there.

    Raises:
      ConfigError: it is laid out in another way than the parameter.
    """
    gradient = parameter.grad
    assert gradient is not None
    if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        raise ConfigError(
            f"model: the gradient of parameter {name} is laid out as {gradient.placements}, expected as the parameter "  # type: ignore[attr-defined]
            f"itself, {parameter.placements}; redistribute it before it is averaged"  # type: ignore[attr-defined]
        )
    return local(gradient)


def across(parameters: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
    """The groups over which the parameters are sharded, one for each dimension of more than one rank; none if each
    rank holds all of them.

    Raises:
      ConfigError: some are sharded over ranks of ``group``, or not all in the same way.
    """
    meshes = {name: p.device_mesh for name, p in parameters.items() if is_sharded(p)}  # type: ignore[attr-defined]
    if not meshes:
        return []
    averaged = set(dist.get_process_group_ranks(group or dist.group.WORLD)) - {dist.get_rank()}
    over = {name: sorted(mesh.mesh.flatten().tolist()) for name, mesh in meshes.items()}
    for name, ranks in over.items():
        if averaged & set(ranks):
            raise ConfigError(_sharded_over(name, ranks))
    first = next(iter(over))
    for name in parameters:
        if over.get(name) != over[first]:
            has = f"sharded over ranks {over[name]}" if name in over else "whole on every rank"
            raise ConfigError(
                f"model: parameter {name} is {has}, and {first} is sharded over ranks {over[first]}; expected all over "
                "the same ranks, or shards drift apart: fully_shard the outermost module, too, without ignored_params, "
                "and call fedmpi.sync before the first forward (or after model.reshard())"
            )
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for mesh in meshes.values():
        for dim in range(mesh.ndim):
            members = mesh.get_group(dim)
            if members.size() > 1:
                groups.setdefault(tuple(dist.get_process_group_ranks(members)), members)
    return list(groups.values())


def _sharded_over(name: str, ranks: Collection[int]) -> str:
    return (
        f"model: parameter {name} is sharded over ranks {list(ranks)}, and sync was to average over some of them, "
        "whose gradients FSDP2 has averaged already; shard over the inner dimension of a mesh alone, "
        'fully_shard(module, mesh=mesh["shard"]), and name the replicas: '
        'fedmpi.sync(model, method, group=mesh["replicate"].get_group()); '
        "a job of one replica has nothing to compress here"
    )


def split(settings: Settings, shapes: Shapes, shards: Shards | None) -> tuple[Shapes, Shapes]:
    """The parameters that are averaged exactly, and the others: the same on all shards, but for empty ones."""
    exact, rest = settings.split(shapes)
    if shards is None:
        return exact, rest
    whole, _ = settings.split(shards.full)
    exact = {name: shape for name, shape in shapes.items() if name in whole or 0 in shape}
    return exact, {name: shape for name, shape in shapes.items() if name not in exact}


# What replicas start from

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20


def same_start(
    everyone: Gathers, parameters: Mapping[str, Tensor], place: Sequence[Sequence[int]] = ()
) -> None:
    """Compare the parameters with the other replicas'. Called by all ranks.

    Raises:
      CommError: on all ranks: replicas do not start from the same ones, and would stay apart.
      ConfigError: a parameter has no values yet.
    """
    with together(everyone, "looking at its parameters"):
        mine = {"place": place, "digests": {name: _digest(name, local(p)) for name, p in parameters.items()}}
    first: dict[str, tuple[int, dict[str, Any]]] = {}
    for rank, offer in enumerate(everyone.allgather(json.dumps(mine).encode())):
        told = json.loads(offer)
        other, theirs = first.setdefault(json.dumps(told["place"]), (rank, told["digests"]))
        for name, digest in told["digests"].items():
            if theirs.get(name) != digest:
                raise CommError(
                    f"model: parameter {name} is not the same on rank {other} and rank {rank}, and averaged gradients "
                    "keep them apart; expected replicas that start alike: give all ranks the same seed "
                    "(torch.manual_seed) or checkpoint, or broadcast rank 0's parameters, before fedmpi.sync"
                )


@torch.no_grad()
def _digest(name: str, parameter: Tensor) -> int:
    """A number that hardly two different tensors share, computed where the tensor lies."""
    if parameter.is_meta:
        raise ConfigError(
            f"model: parameter {name} is on the meta device, expected one with values; call model.to_empty(device=…) "
            "and initialize or load it before fedmpi.sync"
        )
    if parameter.dtype.itemsize not in _INTEGERS or parameter.layout != torch.strided:
        return 0
    bits_D = parameter.detach().contiguous().view(-1).view(_INTEGERS[parameter.dtype.itemsize])
    total = torch.tensor(bits_D.numel(), device=bits_D.device)
    odd = 2 * torch.arange(min(_CHUNK, bits_D.numel()), device=bits_D.device) + 1
    for part in bits_D.split(_CHUNK):  # wraps around, alike everywhere
        total = total * 0x5851F42D4C957F2D + (part.long() * odd[: len(part)]).sum()
    return int(total)
