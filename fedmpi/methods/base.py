"""What every method's file uses: options, its entry in the table, building, and the plain server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message
from fedmpi.method import Decoder, Method, Round, Server, State, nest, unnest
from fedmpi.ops import bits
from fedmpi.ops.steps import changed_since, mark, mark_at, step, step_and_mark
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
        theta_D, version = state["theta"], state["version"] + 1
        new = {"version": version, **nest(memory, "optimizer.")}
        if not self.sparse:
            return new | {"theta": step(theta_D, u_D, -round.lr)}
        new["theta"], new["changed"] = step_and_mark(theta_D, u_D, -round.lr, state["changed"], version)
        return new

    def moved(self, state: State, theta_D: Tensor, index_K: Tensor | None = None) -> State:
        """Parameters, version and changes after a step from ``state`` to ``theta_D``, of these parameters only."""
        version = state["version"] + 1
        new = {"theta": theta_D, "version": version}
        if self.sparse:
            both = state["theta"], theta_D, state["changed"], version
            new["changed"] = mark(*both) if index_K is None else mark_at(*both, index_K)
        return new

    def view(self, theta_D: Tensor) -> State:
        return {"theta": theta_D, "version": torch.tensor(0)}

    def download(self, state: State, seen: int) -> Message:
        if self.sparse:
            return Message(pack_changes(state["theta"], state["changed"] > seen))
        return Message({"theta": state["theta"][None]})

    def sizes(self, state: State, seen: Sequence[int]) -> list[Message]:
        if not self.sparse or type(self).download is not MeanServer.download or not seen:
            return super().sizes(state, seen)
        counts = changed_since(state["changed"], list(seen))
        return [Message(shape_of_changes(count, self.size)) for count in counts]

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        positions = dict.fromkeys(("map", "index"), (torch.uint8, (-1,))) if self.sparse else {}
        return {"theta": (torch.float32, (-1,)), **positions}

    def reconcile(self, view: State, message: Message, version: int) -> State:
        theta_D = apply_changes(view["theta"], message.arrays)
        return {"theta": theta_D, "version": torch.tensor(version)}


class _Room:
    """Memory for a history's rows, of which ``end`` are written, and never again."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.end = buffer, 0

    def append(self, rows: Tensor) -> None:
        self.buffer[self.end : self.end + len(rows)] = rows
        self.end += len(rows)


def remember(history: Tensor, row: Tensor, keep: int) -> Tensor:
    """A history, a row a round, with a new one at its end; the last ``keep`` of them.

    The new row is written behind the old ones, where these end with what their memory holds and there is room: most
    rounds copy nothing else. A history is what it was before, also after a second call with it.
    """
    if not keep:
        return history[:0]
    room: _Room | None = getattr(history, "_room", None)
    last = history[max(0, len(history) + 1 - keep) :]
    if room is None or room.end == len(room.buffer) or len(history) != room.end - history._first:  # type: ignore[attr-defined]
        room = _Room(history.new_empty(keep + keep // 8 + 1, *history.shape[1:]))
        room.append(last)
    room.append(row[None])
    rows = room.buffer[room.end - len(last) - 1 : room.end]
    rows._room, rows._first = room, room.end - len(rows)  # type: ignore[attr-defined]
    return rows


def missed_rounds(state: State, seen: int, names: tuple[str, ...]) -> Message | None:
    """The download that brings a client of version ``seen`` the rounds since then, from a state's histories ``names``;
    None where they do not go back that far."""
    kept, missed = len(state[names[0]]), int(state["version"]) - seen
    if missed > kept:
        return None
    return Message({name: state[name][kept - missed :][None] for name in names})


def _positions(count: int, size: int) -> Literal["index", "map"] | None:
    """How the positions of so many changed values of ``size`` travel; None: all values do."""
    indices, bit_map = bits.nbytes(count, bits.index_width(size)), bits.nbytes(size)
    if 4 * count + min(indices, bit_map) >= 4 * size:
        return None
    return "map" if bit_map <= indices else "index"


def pack_changes(theta_D: Tensor, changed_D: Tensor) -> dict[str, Tensor]:
    """The arrays of a download that brings whoever holds the unchanged entries to ``theta_D``: the changed values
    and their positions, as indices or as a bit map, or all values, whichever is smallest."""
    size, index_K = len(theta_D), changed_D.nonzero()[:, 0]
    positions = _positions(len(index_K), size)
    if positions is None:
        return {"theta": theta_D[None]}
    values = {"theta": theta_D[index_K][None]}
    if positions == "map":
        return values | {"map": bits.pack(changed_D[None])}
    return values | {"index": bits.pack_integers(index_K[None], bits.index_width(size))}


def shape_of_changes(count: int, size: int) -> dict[str, Tensor]:
    """The arrays of :func:`pack_changes` for so many changed values of ``size``, without memory."""
    positions = _positions(count, size)
    arrays = {"theta": torch.empty(1, size if positions is None else count, device="meta")}
    if positions is not None:
        length = bits.nbytes(size) if positions == "map" else bits.nbytes(count, bits.index_width(size))
        arrays[positions] = torch.empty(1, length, dtype=torch.uint8, device="meta")
    return arrays


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
