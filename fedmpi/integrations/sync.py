"""``fedmpi.sync``: a model's gradients averaged by a call of the job's own.

average = fedmpi.sync(model, {"name": "signsgd", "feedback": True})
loss.backward(); average(); optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedmpi.comm.base import Comm, together
from fedmpi.errors import ConfigError
from fedmpi.integrations.ddp import Scaler
from fedmpi.integrations.job import AnyMethod, Job
from fedmpi.integrations.modules import device_of, shapes_of, still, trained, uncompiled
from fedmpi.integrations.ranks import among, matching, same_ranks
from fedmpi.integrations.scaling import look_for_scaler, unscaled, warn_of_scaler
from fedmpi.integrations.shards import Shards, across, same_start

T = TypeVar("T")


class Sync:
    """Averages a model's gradients when called: between ``backward()`` and ``optimizer.step()``.

    For methods that need all gradients at once (which :func:`fedmpi.ddp.attach` takes in one group too, without
    overlap with the backward pass), and for models without DDP, or inside its ``no_sync()``. So for those that FSDP2
    shards over the inner dimension of a mesh: what is compressed is what goes between the replicas.

        fully_shard(model, mesh=mesh["shard"])
        average = fedmpi.sync(model, method, group=mesh["replicate"].get_group())

    A step in which a gradient is not finite, on any rank of the mesh, leaves what is kept between steps alone, and
    gradients that are not finite on all: a GradScaler skips it everywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        method: AnyMethod,
        *,
        group: dist.ProcessGroup | None = None,
        comm: Comm | str = "group",
        scaler: Scaler | None = None,
        **settings: Any,
    ) -> None:
        """Called by all ranks of the group.

        Args: as those of :func:`fedmpi.ddp.attach`, and
          model: any module.
          group: the ranks to average over (default: a DDP module's own, else all). Of a sharded model those that
            hold the same shards of each replica; then all ranks of the mesh call this together.

        Raises:
          ConfigError, CommError: as :func:`fedmpi.ddp.attach`; or ``group`` is not the DDP module's, or has ranks that
            the model is sharded over; or the ranks do not start from the same parameters.
        """
        inner = uncompiled(model)
        ignored: set[str] = set()
        if isinstance(inner, DistributedDataParallel):
            group = same_ranks(group, inner.process_group)
            ignored, inner = set(inner.parameters_to_ignore), inner.module
        if not isinstance(inner, nn.Module):
            raise ConfigError(f"model: expected a torch.nn.Module, got {type(inner).__name__}")
        self._scaler = scaler
        if isinstance(comm, str):
            comm = among(group, comm)
        elif group is not None:
            matching(comm, group)
        with together(comm, "looking at its parameters"):
            self._parameters = trained(inner, ignored, shards=True)
            groups = across(self._parameters, group)
        shards = None
        if groups:
            shards = Shards(comm, groups, {name: tuple(p.shape) for name, p in self._parameters.items()})
        held = {name: p for name, p in inner.named_parameters() if name not in ignored}
        same_start(shards or comm, held, shards.place if shards else ())
        self._module, self._ignored = inner, ignored
        self._scaled: tuple[torch.amp.GradScaler, torch.optim.Optimizer] | None = None
        if scaler is None and comm.size > 1:
            look_for_scaler(self, self._parameters.values(), Sync._scaled_by)
        self._job = Job(
            shapes_of(self._parameters), method, comm, settings, device_of(self._parameters), shards
        )

    def __call__(self) -> None:
        """Replace each parameter's gradient by the mean over all ranks. One that some ranks lack counts as zero there;
        one that all lack stays missing, as under DDP.

        Raises:
          ConfigError: the model has other parameters than it had, by name, shape or type.
        """
        if self._scaled is not None:
            self._look_at_scale(*self._scaled)
        try:
            self._parameters = still(self._module, self._parameters, self._ignored)
        except ConfigError as error:
            self._job.failed(error)
            raise
        self._job.average(self._parameters, self._scaler)

    def _scaled_by(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        self._scaled = scaler, optimizer

    def _look_at_scale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """A scaler that was not given made the first step: are gradients still scaled when they come here?"""
        self._scaled = None
        if not unscaled(scaler, optimizer):
            warn_of_scaler("fedmpi.sync")
            self._job.forget()
            self._scaler = scaler

    def stats(self) -> dict[str, Any]:
        """Steps, bytes and seconds so far on this rank."""
        return self._job.stats()

    def table(self) -> str:
        """A line a message: its tensors, method, bytes."""
        return self._job.table()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`fedmpi.integrations.ddp.State.state_dict`."""
        return self._job.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """As :meth:`fedmpi.integrations.ddp.State.load_state_dict`."""
        self._job.load_state_dict(saved)

    def run(self, task: Callable[[Job], T]) -> T:
        """``task`` of the job, between two steps."""
        return task(self._job)
