"""The protocol of a method: a compressor (client → server) and a server rule.

Both are pure: they take state and return new state, so that a step can be dropped, repeated or checkpointed. The
objects hold only constants (the layout, the options); nothing here or in ``methods/`` communicates.

A compressor turns gradients into messages, and messages into vectors of S numbers that *can be summed* over clients
and ranks (S = D for sparse values or signs, d for subspace coordinates, R·C for a sketch). The engine sums them; the
server turns the weighted mean into new parameters, once. A wrapper (error feedback, look-back) therefore changes the
compressor only, and works over every method.

Shape suffixes: C clients, D parameters, S numbers that are summed for one client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.message import Layout, Message, row_nbytes
from fedmpi.spec import Spec

State = dict[str, Tensor]
"""Named tensors. Those of clients have a leading axis C; ``init`` gives one client's, without it."""


class Round(NamedTuple):
    """What every rank knows about a round before it starts."""

    seed: int
    t: int
    """Its number, from 0."""
    lr: float
    """The server's learning rate η in this round."""
    rounds_per_epoch: int = 1
    """Rounds in which every client takes part once: clients / cohort, rounded up."""

    @property
    def epoch(self) -> int:
        """e, from 0."""
        return self.t // self.rounds_per_epoch

    @property
    def ends_epoch(self) -> bool:
        """The next round belongs to the next epoch."""
        return (self.t + 1) % self.rounds_per_epoch == 0

    def key(self, stream: str) -> int:
        """The key of a stream that all clients and the server share in this round."""
        return random.key(self.seed, self.t, -1, stream)


class Segment(NamedTuple):
    """Consecutive numbers of a decoded vector, combined by weighted mean, sum of votes, sum, or minimum with 0."""

    size: int
    kind: Literal["mean", "votes", "total", "least"]


@dataclass(frozen=True)
class Context:
    """One call's clients.

    Attributes:
      round: the round.
      clients_C: int64, the clients' ids; always on the CPU.
      steps_C: int64, on the CPU, the number τ of local steps that each gradient is the sum of.
      shared: what the server has published to all clients (:meth:`Server.shared`).
      part: the number of the tensor, where each tensor is compressed by itself.
    """

    round: Round
    clients_C: Tensor
    steps_C: Tensor
    shared: State = field(default_factory=dict)
    part: int | None = None

    def keys(self, stream: str) -> Tensor:
        """One key for each client, int64 ``(C,)``, on the CPU."""
        stream = stream if self.part is None else f"{stream}, part {self.part}"
        return random.keys(self.round.seed, self.round.t, self.clients_C, stream)

    def select(self, index: Tensor) -> Context:
        return replace(self, clients_C=self.clients_C[index], steps_C=self.steps_C[index])

    def within(self, part: int) -> Context:
        """The context of tensor ``part`` of the same clients; its keys differ."""
        return replace(self, part=part)


class Merge(ABC):
    """Merges slices of several senders' messages, so that each rank averages one slice and none receives all messages.
    A message has one array, and maybe an optional one.

    Attributes:
      array: the array's name.
      align: slices start at multiples of this many entries.
    """

    def __init__(self, array: str, align: int = 64) -> None:
        self.array, self.align = array, align

    @abstractmethod
    def __call__(
        self, rows_WN: Tensor, start: int, round: Round, optional_WB: Tensor | None = None
    ) -> Tensor:
        """Merge entries ``start`` to ``start + N``, both multiples of :attr:`align`, of W senders into ``(N,)``: what a
        single sender would send for their mean.

        ``optional_WB``: the senders' :attr:`Compressor.optional` arrays, zeros where one has none; None: none has."""

    def message(self, merged_1N: Tensor, optional_WB: Tensor | None = None) -> Message:
        """The message that holds all merged entries."""
        return Message({self.array: merged_1N})


class Compressor(ABC):
    """One direction's codec, batch-first: every function takes C clients at once.

    Attributes:
      spec: the parameters' layout.
      size: S, the length of a decoded vector.
      additive: True if v(a) + v(b) == v(a + b) for any senders of one round with the same shared state, where v is
        compress, then decompress: gradients of several clients may then be summed before they are encoded.
      replayable: True if a message decodes to the same vector at any time, without state.
      integer: True if decoded values are small integers, which are summed as integers, one vote for each client.
      presence: how many of the S numbers, the last ones, count the clients that had a gradient in a row
        (:attr:`~fedmpi.spec.Spec.rows`).
      optional: the name of a ragged array with at most one row for each client, which most messages lack.
      merge: how ranks can divide the averaging; None if they cannot.
      tells: True if ``compress`` accepts non-finite input and sets :attr:`~fedmpi.message.Message.finite`; callers need
        not check.
      counters: the names that :meth:`count` returns; they appear in every round's metrics.
    """

    additive: bool = False
    replayable: bool = True
    integer: bool = False
    presence: int = 0
    optional: str | None = None
    merge: Merge | None = None
    tells: bool = False
    counters: tuple[str, ...] = ()

    def __init__(self, spec: Spec, size: int | None = None) -> None:
        self.spec = spec
        self.size = spec.size if size is None else size

    @property
    def segments(self) -> tuple[Segment, ...]:
        """How the S numbers are combined over clients. Votes beside other kinds are ±1 in float32."""
        return (Segment(self.size, "votes" if self.integer else "mean"),)

    def init(self) -> State:
        """A client's state before its first message, without the axis C, on the CPU; {} for a stateless method."""
        return {}

    def init_peer(self) -> State:
        """What the receiver keeps for one client. :meth:`init` has the same names: the sender's copy of an entry must
        stay equal to the receiver's."""
        return {}

    def verify(self, state: State) -> None:  # noqa: B027 (most states may hold any finite values)
        """Check the values of client states that were read from a file, whose types and shapes are right.

        Raises:
          MessageError: a value that no message could have left there.
        """

    @abstractmethod
    def layout(self) -> Layout:
        """The arrays of a message; the receiver checks messages against it."""

    def nbytes(self) -> int | None:
        """Bytes of one client's message without its optional array; None if messages differ in size."""
        return row_nbytes({name: field for name, field in self.layout().items() if name != self.optional})

    @abstractmethod
    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        """Encode gradients ``(C, D)``; returns the messages and the clients' new state."""

    @abstractmethod
    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        """Decode messages into what is summed, ``(C, S)``, and the new peer state."""

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        """Decode messages and add each, times its weight, to its row of float32 totals (rows may share memory).
        Returns the new peer state."""
        v_CS, peer = self.decompress(message, peer, ctx)
        for total_S, v_S, weight in zip(total_CS, v_CS, weights, strict=True):
            total_S.add_(v_S, alpha=weight)
        return peer

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        """Gradients ``(C, D)`` of decoded vectors; the identity where S = D."""
        return v_CS[:, : self.size - self.presence]

    def transpose(self, v_CS: Tensor, ctx: Context) -> Tensor:
        """The transpose ``(C, D)`` of an additive method's (linear) encoding; by default its lift."""
        return self.lift(v_CS, ctx)

    def count(self, message: Message) -> dict[str, int]:
        """Counts for the metrics, by the names of :attr:`counters`."""
        return {}


_RENAMED = {
    "first": "Server.between(state, index, mean_S, round)",
    "memory": "Decoder.memory(), of the method's decoder",
    "gradient": "Decoder.direction(memory, mean_S, round, out), of the method's decoder",
}


class Decoder(ABC):
    """Turns means into gradients without knowing the parameters; drop-ins need nothing else of a server. ``memory`` is
    what :meth:`memory` returned, or any state with the same entries (a server's, a view)."""

    def memory(self) -> State:
        """The memory before the first round; {} for none."""
        return {}

    def shared(self, memory: State) -> State:
        """What senders need of the memory to compress."""
        return {}

    def between(self, memory: State, index: int, mean_S: Tensor, round: Round) -> State:
        """The memory after pass ``index``, not the last one, whose decoded vectors have the mean ``mean_S``."""
        return memory

    @abstractmethod
    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The gradient ``(D,)`` that the last pass's mean stands for, and the new memory.

        Args:
          mean_S: the mean; for an integer method the sum, or the majority packed as in :attr:`Merge.array`.
          out: ``(D,)``, contiguous, memory that the result may use; None: allocate.
        """


class Server(ABC):
    """Turns the mean of messages into new parameters, and makes the clients' downloads.

    ``state`` holds at least ``theta`` (D,) and ``version``, the number of finished rounds that changed it. A *view* is
    the state of a client, which knows θ₀, the seed and its downloads: :meth:`view`, then :meth:`reconcile`. Ranks that
    do not aggregate keep a view as well.

    Attributes:
      weighted: True if clients count by their number of samples; else each counts once.
      samples: the number of training samples of the server's own, for :meth:`prepare`; 0 for none.
    """

    weighted: bool = True
    samples: int = 0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in _RENAMED.items():
            if old in vars(cls):
                raise ConfigError(f"{cls.__name__}.{old}: this is now {new}")

    @abstractmethod
    def init(self, theta_D: Tensor) -> State: ...

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        """The shapes that the entries of a state from a file must have: those of :meth:`init`, but an entry that starts
        without rows (a history) may have any number of rows."""
        fresh = {name: tuple(value.shape) for name, value in self.init(theta_D).items()}
        return {
            name: (len(state[name]), *shape[1:]) if shape and not shape[0] else shape
            for name, shape in fresh.items()
        }

    @abstractmethod
    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        """The state after a round; ``mean_S`` is the mean of its clients (for an integer method their sum)."""

    def skip(self, state: State, round: Round) -> State:
        """The state after a round without any valid message; its version is one higher if there is a download."""
        return state

    @abstractmethod
    def view(self, theta_D: Tensor) -> State:
        """The view of version 0, of a client that knows θ₀ and the seed."""

    @abstractmethod
    def download(self, state: State, seen: int) -> Message:
        """The message that brings a client of version ``seen`` up to date."""

    def sizes(self, state: State, seen: Sequence[int]) -> list[Message]:
        """For each version :meth:`download`'s message, to be measured only: its arrays may lie on the device meta."""
        return [self.download(state, version) for version in seen]

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        """The arrays that a download may have, by name: dtype and shape, -1 for any length; None if not declared."""
        return None

    @abstractmethod
    def reconcile(self, view: State, message: Message, version: int) -> State:
        """The view after a download that brings it to ``version``: its parameters equal the server's to the bit."""

    def between(self, state: State, index: int, mean_S: Tensor, round: Round) -> State:
        """:meth:`Decoder.between` for a state or a view."""
        return state

    def prepare(self, state: State, g_D: Tensor) -> State:
        """The state before round 0 of a server with ``samples``, whose gradient is ``g_D``, one version higher."""
        return state

    def facts(self, state: State) -> dict[str, float]:
        """Entries of a run's summary."""
        return {}

    def frozen(self, state: State) -> Tensor | None:
        """A bool mask ``(D,)`` of parameters that clients must not change; None for none."""
        return None

    def parameters(self, state: State) -> Tensor:
        """θ ``(D,)`` of a state or a view."""
        return state["theta"]

    def shared(self, state: State) -> State:
        """What clients need of a state or a view to compress."""
        return {}


@dataclass(frozen=True)
class Method:
    """Compressors, and what makes parameters or gradients of the mean of their messages.

    Attributes:
      passes: the compressors of a round in their order; most methods have one. All compress the same gradients. Between
        two passes the decoded vectors are averaged, and :meth:`Server.between` (or :meth:`Decoder.between`) turns the
        mean into what the next pass finds in ``shared``. Clients keep the last pass's state; the others only read it.
      server: turns the mean into new parameters, for `fedmpi train`.
      decoder: turns the mean into a gradient, for drop-ins; None if the method cannot be a drop-in.

    Raises:
      ConfigError: passes are not a tuple of compressors.
    """

    passes: tuple[Compressor, ...]
    server: Server
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        passes = self.passes
        if not isinstance(passes, tuple) or not passes or not all(isinstance(p, Compressor) for p in passes):
            raise ConfigError(
                f"Method: passes: expected a tuple of compressors, got {passes!r}; what was Method(up, server) "
                f"is Method((up,), server, decoder), what was Method(up, server, first) Method((first, up), …)"
            )

    @property
    def up(self) -> Compressor:
        """The last pass."""
        return self.passes[-1]

    def directions(self) -> Decoder:
        """The decoder, for a job with an optimizer of its own.

        Raises:
          ConfigError: the method has none.
        """
        if self.decoder is None:
            raise ConfigError(
                "method: expected one whose server only averages, this one changes parameters itself; "
                "train with it through `fedmpi train`, also with mode: data_parallel"
            )
        return self.decoder


def placed(state: Mapping[str, Tensor], device: torch.device) -> State:
    """A copy of a state on ``device``; :meth:`Compressor.init` and :meth:`Decoder.memory` return states on the CPU."""
    return {name: value.to(device) for name, value in state.items()}


def nest(state: Mapping[str, Tensor], prefix: str = "inner.") -> State:
    """The state (or arrays) of what is wrapped, with a prefix before every name."""
    return {prefix + name: value for name, value in state.items()}


def unnest(state: Mapping[str, Tensor], prefix: str = "inner.") -> State:
    """The inverse of :func:`nest`."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def believed(up: Compressor, state: State) -> State:
    """The sender's copy of the receiver's state."""
    return {name: state[name] for name in up.init_peer()}
