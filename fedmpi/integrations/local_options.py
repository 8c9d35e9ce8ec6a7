"""What :func:`fedmpi.local_sgd` takes, and what is checked of it before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, model_validator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedmpi.comm.base import Comm
from fedmpi.comm.connect import connect
from fedmpi.errors import ConfigError
from fedmpi.integrations.fragments import Fragment
from fedmpi.integrations.modules import uncompiled
from fedmpi.integrations.ranks import among, matching
from fedmpi.integrations.settings import Settings
from fedmpi.validation import Strict, checked, suggest

_RATES = {"sgd": 1.0, "nesterov": 0.7}  # the second: DiLoCo's


class LocalOptions(Strict):
    """When ranks average, and what they make of the mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every: int | None = Field(
        100, ge=1, description="H, steps from one synchronisation to the next; None: a function"
    )
    outer: Literal["sgd", "momentum", "nesterov", "adam", "yogi"] = "nesterov"
    lr: float | None = Field(
        None, gt=0, description="the outer rate (sgd: 1, nesterov: 0.7; the others need one)"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    epsilon: float = Field(1e-3, gt=0)
    warmup: int = Field(
        0, ge=0, description="first steps, each of which averages the parameters exactly, by sgd at rate 1"
    )
    fragments: int = Field(
        1, ge=1, description="parts of the model that are synchronised at steps of their own"
    )
    overlap: int = Field(0, ge=0, description="τ, steps that are computed while a part is under way")
    alpha: float = Field(0.5, ge=0, lt=1, description="with overlap: the weight of a rank's own parameters")
    inner: Literal["keep", "reset"] = Field(
        "keep", description="the optimizer's state after a synchronisation"
    )

    @model_validator(mode="after")
    def _fits(self) -> LocalOptions:
        if self.lr is None and self.outer not in _RATES:
            raise ValueError(f"lr: expected a rate with outer: {self.outer}, got none")
        return self

    @property
    def rate(self) -> float:
        return _RATES[self.outer] if self.lr is None else self.lr

    def length(self, every: object) -> int:
        """
        Raises:
          ConfigError: so few steps do not fit the rest.
        """
        least = max(1, self.fragments, self.overlap + 1)
        if type(every) is not int or every < least:
            raise ConfigError(
                f"every: expected a whole number from {least} with fragments: {self.fragments} and overlap: "
                f"{self.overlap}, got {every!r}"
            )
        return every


def connected(group: dist.ProcessGroup | None, comm: Comm | str) -> Comm:
    if isinstance(comm, Comm):
        return comm if group is None else matching(comm, group)
    if comm not in ("auto", "group", "mpi"):
        raise ConfigError(f"comm: expected auto, group, mpi or a Comm, got {comm!r}")
    if dist.is_initialized() or comm == "group" or group is not None:
        return among(group, "group" if comm == "auto" else comm)
    return connect(comm)


def opened(model: object, optimizer: object) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The module inside, and the DDP around it.

    Raises:
      ConfigError: the model is none, or the optimizer.
    """
    inside = uncompiled(model)
    ddp = inside if isinstance(inside, DistributedDataParallel) else None
    inside = ddp.module if ddp is not None else inside
    if not isinstance(inside, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type(inside).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inside, ddp


def options_of(every: int | None, settings: Mapping[str, Any]) -> tuple[LocalOptions, Settings]:
    """The arguments for local updates, and the reducers' settings.

    Raises:
      ConfigError: an unknown one, or a value of the wrong type or range.
    """
    local = {name: value for name, value in settings.items() if name in LocalOptions.model_fields}
    options = checked(LocalOptions, local | {"every": every})
    if "start_after" in settings:
        raise ConfigError("start_after: expected warmup here, which counts the optimizer's steps")
    valid = [*LocalOptions.model_fields, *Settings.model_fields]
    for name in settings:
        if name not in valid:
            raise ConfigError(f"{name}: unknown; {suggest(name, valid)}")
    others = {name: value for name, value in settings.items() if name not in local}
    return options, Settings.of(**others, start_after=options.warmup)


def check_trained(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    ddp: DistributedDataParallel | None,
    group: dist.ProcessGroup | None,
) -> None:
    """
    Raises:
      ConfigError: the optimizer trains what nobody averages, or DDP averages over these ranks already.
    """
    own = set(module.parameters())
    strange = sum(p not in own for each in optimizer.param_groups for p in each["params"])
    if strange:
        raise ConfigError(
            f"optimizer: expected parameters of the model, {strange} of its are not; nobody would average them"
        )
    if ddp is None:
        return
    ranks, inside = (
        set(dist.get_process_group_ranks(g or dist.group.WORLD)) for g in (group, ddp.process_group)
    )
    if len(ranks) > 1 and ranks <= inside:
        raise ConfigError(
            "model: its DistributedDataParallel averages gradients over the same ranks in every step; give the module "
            "inside (ddp.module), or wrap it over a part of the ranks (process_group=…)"
        )


def check_rate(fragments: Sequence[Fragment], options: LocalOptions) -> None:
    """
    Raises:
      ConfigError: a method whose mean has no length, at a rate that nobody chose; one with a momentum of its own, under
        another one.
    """
    own = [f.reducer.options.name for f in fragments if f.reducer.options.own_momentum]
    if own and options.outer != "sgd":
        raise ConfigError(
            f"outer: expected sgd with {own[0]}, whose residual stands for outer momentum, got {options.outer}; "
            'outer="sgd"'
        )
    votes = any(group.method.up.integer for fragment in fragments for group in fragment.groups)
    if votes and options.lr is None:
        raise ConfigError(
            "lr: expected an outer rate with a majority vote, which is ±1 in every parameter, got none; or take "
            "feedback: true or vote: mean, whose means have lengths"
        )
