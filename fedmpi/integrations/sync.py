"""``fedmpi.sync``: a model's gradients averaged by a call of the job's own.

average = fedmpi.sync(model, {"name": "signsgd", "feedback": True})
loss.backward(); average(); optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedmpi.comm.base import Comm, together
from fedmpi.errors import ConfigError
from fedmpi.integrations.ddp import Scaler
from fedmpi.integrations.job import AnyMethod, Job
from fedmpi.integrations.modules import device_of, shapes_of, trained, uncompiled
from fedmpi.integrations.ranks import among, matching, same_ranks

T = TypeVar("T")


class Sync:
    """Averages a model's gradients when called: between ``backward()`` and ``optimizer.step()``.

    For methods that need all gradients at once (which :func:`fedmpi.ddp.attach` takes in one group too, without
    overlap with the backward pass), and for models without DDP, or inside its ``no_sync()``.
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
          group: the ranks to average over (default: a DDP module's own, else all).

        Raises:
          ConfigError, CommError: as :func:`fedmpi.ddp.attach`; or ``group`` is not the DDP module's.
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
            self._parameters = trained(inner, ignored)
        self._job = Job(shapes_of(self._parameters), method, comm, settings, device_of(self._parameters))

    def __call__(self) -> None:
        """Replace each parameter's gradient by the mean over all ranks. One that some ranks lack counts as zero there;
        one that all lack stays missing, as under DDP."""
        self._job.average(self._parameters, self._scaler)

    def stats(self) -> dict[str, Any]:
        """Steps, bytes and seconds so far on this rank."""
        return self._job.stats()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`fedmpi.integrations.ddp.State.state_dict`."""
        return self._job.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """As :meth:`fedmpi.integrations.ddp.State.load_state_dict`."""
        self._job.load_state_dict(saved)

    def run(self, task: Callable[[Job], T]) -> T:
        """``task`` of the job, between two steps."""
        return task(self._job)
