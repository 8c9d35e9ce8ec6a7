"""What every method's file uses: options, its entry in the table, building, and the plain server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message
from fedmpi.method import Decoder, Method, Round, Server, State, nest, unnest
from fedmpi.ops import bits
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec
from fedmpi.validation import Strict


class Options(Strict):
    """A method's options: the keys of ``method:`` in a config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="the method")

    @property
    def separable(self) -> bool:
        """It means the same applied to groups of tensors one by one: no number counts over the whole model."""
        return False

    @property
    def own_momentum(self) -> bool:
        """What it keeps stands for momentum: no server's rule but sgd goes with it."""
        return False

    @property
    def rate_note(self) -> str:
        """Which learning rate it needs, against uncompressed training; "" where it needs no other one. Figures are
        those of ``configs/results/link.json`` and ``link-mlp.json`` (SGD with momentum, two models)."""
        return ""


class FeedbackOptions(Options):
    """Options of a method that error feedback can wrap."""

    feedback: bool = Field(False, description="error feedback: each client adds what it has not yet sent")


@dataclass(frozen=True)
class Setup:
    """What a method is built for, besides its options and the model."""

    seed: int = 0
    clients: int | None = None
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
      wraps: the methods that it can be laid over (its option ``inner``); "any" for all that wrap none and have
        one pass.
      two_passes: its messages mean something only beside the round's first pass: no wrapper goes over it.
      example: options for a small model (some thousand parameters); the conformance suite runs these,
      variants: and, by name, these options on top of them.
    """

    options: type[Options]
    build: Callable[[Any, Spec, Setup], Method]
    summary: str
    keeps: str
    sums: str
    source: str
    wraps: Literal["any"] | tuple[str, ...] = ()
    two_passes: bool = False
    example: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


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


class Mean(Decoder):
    """The mean as it is: of every method whose messages decode to the gradients themselves."""

    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return mean_S, memory


class MeanServer(Server):
    """θ ← θ − η u, with u the optimizer's direction for the mean: federated averaging's server, and every
    sparsifier's.

    A client downloads the parameters; with ``sparse``, only those that changed since it last came, with
    their positions as indices or as a bit map, whichever is smaller, while that is smaller than all of θ.
    """

    def __init__(self, spec: Spec, optimizer: Optimizer, sparse: bool = False) -> None:
        self.size, self.optimizer, self.sparse = spec.size, optimizer, sparse

    def init(self, theta_D: Tensor) -> State:
        state = self.view(theta_D) | nest(self.optimizer.init(self.size, theta_D.device), "optimizer.")
        if self.sparse:
            state["changed"] = torch.zeros_like(theta_D, dtype=torch.int32)  # version of the last change
        return state

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        u_D, memory = self.optimizer.direction(unnest(state, "optimizer."), mean_S)
        return self.moved(state, state["theta"].add(u_D, alpha=-round.lr)) | nest(memory, "optimizer.")

    def moved(self, state: State, theta_D: Tensor) -> State:
        """Parameters, version and changes after a step from ``state`` to ``theta_D``."""
        version = state["version"] + 1
        new = {"theta": theta_D, "version": version}
        if self.sparse:
            new["changed"] = torch.where(theta_D != state["theta"], version.int(), state["changed"])
        return new

    def view(self, theta_D: Tensor) -> State:
        return {"theta": theta_D, "version": torch.tensor(0)}

    def download(self, state: State, seen: int) -> Message:
        if self.sparse:
            return Message(pack_changes(state["theta"], state["changed"] > seen))
        return Message({"theta": state["theta"][None]})

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        positions = dict.fromkeys(("map", "index"), (torch.uint8, (-1,))) if self.sparse else {}
        return {"theta": (torch.float32, (-1,)), **positions}

    def reconcile(self, view: State, message: Message, version: int) -> State:
        theta_D = apply_changes(view["theta"], message.arrays)
        return {"theta": theta_D, "version": torch.tensor(version)}


def remember(history: Tensor, row: Tensor, keep: int) -> Tensor:
    """A history, a row a round, with a new one at its end; the last ``keep`` of them."""
    rows = torch.cat([history, row[None]])
    return rows[max(0, len(rows) - keep) :]


def missed_rounds(state: State, seen: int, names: tuple[str, ...]) -> Message | None:
    """The download that brings a client of version ``seen`` the rounds since then, from a state's histories ``names``;
    None where they do not go back that far."""
    kept, missed = len(state[names[0]]), int(state["version"]) - seen
    if missed > kept:
        return None
    return Message({name: state[name][kept - missed :][None] for name in names})


def pack_changes(theta_D: Tensor, changed_D: Tensor) -> dict[str, Tensor]:
    """The arrays of a download that brings whoever holds the unchanged entries to ``theta_D``: the changed values
    and their positions, as indices or as a bit map, or all values, whichever is smallest."""
    size, index_K = len(theta_D), changed_D.nonzero()[:, 0]
    width = bits.index_width(size)
    positions = min(bits.nbytes(len(index_K), width), bits.nbytes(size))
    if 4 * len(index_K) + positions >= 4 * size:
        return {"theta": theta_D[None]}
    values = {"theta": theta_D[index_K][None]}
    if positions == bits.nbytes(size):
        return values | {"map": bits.pack(changed_D[None])}
    return values | {"index": bits.pack_integers(index_K[None], width)}


def apply_changes(theta_D: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    """The parameters after a download that :func:`pack_changes` made."""
    values_K = arrays["theta"][0]
    if "map" in arrays:
        fits = arrays["map"].shape[1] == bits.nbytes(len(theta_D)) and "index" not in arrays
        changed_D = bits.unpack(arrays["map"], len(theta_D))[0] if fits else None
        if changed_D is None or int(changed_D.sum()) != len(values_K):
            raise MessageError(
                f"download: {len(values_K)} values do not fit its map of {len(theta_D)} parameters"
            )
        return theta_D.masked_scatter(changed_D, values_K)
    if "index" in arrays:
        width = bits.index_width(len(theta_D))
        if arrays["index"].shape[1] != bits.nbytes(len(values_K), width):
            raise MessageError(f"download: {len(values_K)} values do not fit its indices")
        index_K = bits.unpack_integers(arrays["index"], len(values_K), width)[0]
        if bool((index_K.diff() <= 0).any()) or bool((index_K[-1:] >= len(theta_D)).any()):
            raise MessageError(f"download: expected increasing indices below {len(theta_D)}")
        return theta_D.scatter(0, index_K, values_K)
    return values_K
