"""What every method's file uses: options, its entry in the table, building, and the plain server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.message import Message
from fedmpi.method import Method, Round, Server, State, nest, unnest
from fedmpi.ops import bits
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec


class Options(BaseModel):
    """A method's options: the keys of ``method:`` in a config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="the method")


class FeedbackOptions(Options):
    """Options of a method that error feedback can wrap."""

    feedback: bool = Field(False, description="error feedback: each client adds what it has not yet sent")


@dataclass(frozen=True)
class Setup:
    """What a method is built for, besides its options and the model."""

    seed: int = 0
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True)
class Entry:
    """One row of METHODS.

    Attributes:
      options: the class of its options.
      build: makes the method for a parameter layout; raises ConfigError for options that do not fit it.
      summary: one line for a list.
      keeps: what a client keeps between rounds.
      sums: what is added up over clients and ranks.
      source: where the algorithm comes from.
      wraps: the methods that it can be laid over (its option ``inner``); "any" for all that wrap none.
      example: options for a small model (some thousand parameters); the conformance suite runs these.
    """

    options: type[Options]
    build: Callable[[Any, Spec, Setup], Method]
    summary: str
    keeps: str
    sums: str
    source: str
    wraps: Literal["any"] | tuple[str, ...] = ()
    example: dict[str, Any] = field(default_factory=dict)


def count_of(name: str, ratio: float | None, k: int | None, size: int) -> int:
    """k coordinates of ``size``, given directly or as a ratio.

    Raises:
      ConfigError: k does not lie in 1 … size.
    """
    if k is None:
        return max(1, round((ratio or 0.0) * size))
    if not 1 <= k <= size:
        raise ConfigError(f"{name}: expected 1 to {size} (the model's parameters), got {k}")
    return k


class MeanServer(Server):
    """θ ← θ − η u, with u the optimizer's direction for the mean: federated averaging's server, and every
    sparsifier's.

    A client downloads the parameters; with ``sparse``, only those that changed since it last came, with
    their positions as indices or as a bit map, whichever is smaller, while that is smaller than all of θ.
    """

    def __init__(self, spec: Spec, optimizer: Optimizer, sparse: bool = False) -> None:
        self.size, self.optimizer, self.sparse = spec.size, optimizer, sparse

    def init(self, theta_D: Tensor) -> State:
        state = self.view(theta_D) | nest(self.optimizer.init(self.size), "optimizer.")
        if self.sparse:
            state["changed"] = torch.zeros(self.size, dtype=torch.int32)  # version of the last change
        return state

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        u_D, memory = self.optimizer.direction(unnest(state, "optimizer."), mean_S)
        theta_D, version = state["theta"].add(u_D, alpha=-round.lr), state["version"] + 1
        new = {"theta": theta_D, "version": version, **nest(memory, "optimizer.")}
        if self.sparse:
            new["changed"] = torch.where(theta_D != state["theta"], version.int(), state["changed"])
        return new

    def view(self, theta_D: Tensor) -> State:
        return {"theta": theta_D, "version": torch.tensor(0)}

    def download(self, state: State, seen: int) -> Message:
        arrays = {"theta": state["theta"][None]}
        if self.sparse:
            changed_D = state["changed"] > seen
            index_K = changed_D.nonzero()[:, 0]
            width = bits.index_width(self.size)
            positions = min(bits.nbytes(len(index_K), width), bits.nbytes(self.size))
            if 4 * len(index_K) + positions < 4 * self.size:
                arrays["theta"] = state["theta"][index_K][None]
                if positions == bits.nbytes(self.size):
                    arrays["map"] = bits.pack(changed_D[None])
                else:
                    arrays["index"] = bits.pack_integers(index_K[None], width)
        return Message(arrays)

    def reconcile(self, view: State, message: Message, version: int) -> State:
        arrays = message.arrays
        new = {"theta": arrays["theta"][0], "version": torch.tensor(version)}
        if "map" in arrays:
            changed_D = bits.unpack(arrays["map"], self.size)[0]
            new["theta"] = view["theta"].masked_scatter(changed_D, arrays["theta"][0])
        elif "index" in arrays:
            values_K = arrays["theta"][0]
            index_K = bits.unpack_integers(arrays["index"], len(values_K), bits.index_width(self.size))[0]
            new["theta"] = view["theta"].scatter(0, index_K, values_K)
        return new
