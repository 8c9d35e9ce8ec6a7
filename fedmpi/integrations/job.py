"""A drop-in's compression as its job sees it: one method's reducer, or ``auto``'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedmpi import methods
from fedmpi.comm.base import Comm, LostError, together
from fedmpi.integrations import auto
from fedmpi.integrations.modules import warn_of_nothing
from fedmpi.integrations.reducer import Reducer
from fedmpi.integrations.say import say_at_end, table
from fedmpi.integrations.settings import Settings, Shapes
from fedmpi.integrations.shards import Shards
from fedmpi.message import CPU
from fedmpi.methods.base import Options

T = TypeVar("T")
AnyMethod = Options | auto.AutoOptions | dict[str, Any] | str


class Job:
    """One method's reducer, or the ones that ``auto`` tries, which compute on ``device``."""

    def __init__(
        self,
        shapes: Shapes,
        method: AnyMethod,
        comm: Comm,
        settings: dict[str, Any],
        device: torch.device = CPU,
        shards: Shards | None = None,
    ) -> None:
        with together(shards or comm, "reading its method and settings"):
            options, checked = auto.parse(method), Settings.of(**settings)
        if comm.size > 1:
            say_at_end(comm.rank if shards is None else dist.get_rank(), self, Job.stats)
        self.alone = comm.size == 1  # nothing is to be averaged, and so nothing compressed
        self._auto: auto.Auto | None = None
        self._as_torch = shards is None and options == methods.parse("bf16") and checked.says_nothing
        if isinstance(options, auto.AutoOptions):
            self._auto = auto.Auto(shapes, options, comm, settings, device, shards)
        else:
            warn_of_nothing(shards.full if shards else shapes, options, checked)
            self._reducer = Reducer(shapes, options, comm, device, shards, **settings)

    @property
    def reducer(self) -> Reducer:
        return self._auto.reducer if self._auto else self._reducer

    @property
    def place(self) -> list[list[int]]:
        """This rank's among the shards; empty where each holds whole parameters."""
        return self.reducer.shards.place if self.reducer.shards else []

    def between_steps(self) -> Reducer:
        return self._auto.between_steps() if self._auto else self._reducer

    @property
    def settled(self) -> bool:
        """:attr:`reducer` stays."""
        return self._auto is None

    @property
    def plain(self) -> bool:
        """Buckets may go as they are, in bf16: plain bf16, of which no setting says how."""
        return self._as_torch if self._auto is None else self._auto.plain

    def stats(self) -> dict[str, Any]:
        return self.reducer.stats() | (self._auto.facts() if self._auto else {})

    def follow(self, before: Job) -> None:
        """:meth:`stats` go on from those of a job that this one stands in for."""
        self.reducer.follow(before.reducer)

    def table(self) -> str:
        """What each message came to, a line each: its tensors, method and bytes."""
        return table(self.reducer.layers())

    def run(self, task: Callable[[Job], T]) -> T:
        """``task`` of this job, between two steps."""
        return task(self)

    def average(self, parameters: Mapping[str, Tensor], scaler: Any) -> None:
        """A step of :meth:`Reducer.average`; what is raised on one rank is known to all.

        Args: scaler: the job's GradScaler, or None.
        """
        if self.alone:
            self.reducer.passed(0, last=True)
            return
        try:
            self.between_steps().average(parameters, scaler.get_scale() if scaler else 1.0)
        except BaseException as error:
            self.failed(error)
            raise

    def failed(self, error: BaseException) -> None:
        """A step cannot be finished here: the other ranks, which may wait, are told."""
        shards = self.reducer.shards
        if shards is not None:  # those of other columns of the mesh do not notice by themselves
            shards.fail(str(error) if isinstance(error, LostError) else f"{type(error).__name__}: {error}")
        elif not isinstance(error, LostError):
            self.reducer.comm.fail(f"{type(error).__name__}: {error}")

    def forget(self) -> None:
        """What was kept between steps; the steps stay. Called by all ranks."""
        for group in self.reducer.groups:
            group.reset()

    def reset(self) -> None:
        """Begin anew. Called by all ranks."""
        if self._auto:
            self._auto.restart()
        else:
            self._reducer.reset()

    def state_dict(self) -> dict[str, Any]:
        return self.reducer.state_dict() | {"measuring": self._auto is not None and self._auto.chosen is None}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if self._auto:
            self._auto.load(saved)
        else:
            self.reducer.load_state_dict(saved)
