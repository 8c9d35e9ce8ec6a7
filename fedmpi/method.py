"""The protocol of a method: a compressor (client → server) and a server rule.

Both are pure: state goes in and comes out, so that a step can be dropped, repeated or checkpointed without either
noticing. The objects hold only constants (the layout, the options); nothing here or in ``methods/`` communicates.

A compressor turns gradients into messages, and messages into vectors of S numbers that *can be summed* over clients
and ranks (S = D for sparse values or signs, d for subspace coordinates, R·C for a sketch). The engine sums them; the
server turns the weighted mean into new parameters, once. So a wrapper (error feedback, look-back) deals with one end of
the compressor only, and works over every method.

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
    """Rounds in which every client comes once: clients / cohort, rounded up."""

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
    """A stretch of what is summed: to clients' weighted mean, the sum of their votes or numbers, or the least and 0."""

    size: int
    kind: Literal["mean", "votes", "total", "least"]


@dataclass(frozen=True)
class Context:
    """One call's clients.

    Attributes:
      round: the round.
      clients_C: int64, their ids; on the CPU, wherever their gradients lie.
      steps_C: int64, on the CPU, local steps τ that each gradient is the sum of.
      shared: what the server has published to all (:meth:`Server.shared`).
      part: the tensor that this call is about, where each is compressed by itself.
    """

    round: Round
    clients_C: Tensor
    steps_C: Tensor
    shared: State = field(default_factory=dict)
    part: int | None = None

    def keys(self, stream: str) -> Tensor:
        """One key a client, int64 ``(C,)``, on the CPU as the ids are: whoever draws says where."""
        stream = stream if self.part is None else f"{stream}, part {self.part}"
        return random.keys(self.round.seed, self.round.t, self.clients_C, stream)

    def select(self, index: Tensor) -> Context:
        return replace(self, clients_C=self.clients_C[index], steps_C=self.steps_C[index])

    def within(self, part: int) -> Context:
        """The same clients' tensor ``part``: other keys."""
        return replace(self, part=part)


class Merge(ABC):
    """How parts of messages' only array (but for an optional one) become what stands in the mean's message: ranks then
    average a part each, and nobody receives everybody's.

    Attributes:
      array: its name.
      align: a part begins at a multiple of so many entries.
    """

    def __init__(self, array: str, align: int = 64) -> None:
        self.array, self.align = array, align

    @abstractmethod
    def __call__(
        self, rows_WN: Tensor, start: int, round: Round, optional_WB: Tensor | None = None
    ) -> Tensor:
        """What ``W`` senders' entries ``start`` … ``start + N`` come to ``(N,)``: what one sender would send for their
        mean, as the server would have decided on it. Both are multiples of :attr:`align`.

        ``optional_WB``: the senders' :attr:`Compressor.optional` arrays, zeros for who has none; None: nobody has."""

    def message(self, merged_1N: Tensor, optional_WB: Tensor | None = None) -> Message:
        """The message of all entries that calls made."""
        return Message({self.array: merged_1N})


class Compressor(ABC):
    """One direction's codec, batch-first: every function takes C clients at once.

    Attributes:
      spec: the parameters' layout.
      size: S, how many numbers of a client are summed.
      additive: decoded vectors fulfil v(a) + v(b) = v(a + b) whoever sends a, b and a + b (in a round, with the same
        shared state): gradients of several clients may be summed before they are encoded.
      replayable: a message decodes to the same vector whenever it is decoded, without any state.
      integer: decoded values are small integers, summed as integers, one vote a client.
      presence: the last of the S numbers, one a row (:attr:`~fedmpi.spec.Spec.rows`), that count who had a gradient
        there instead of saying what it was.
      optional: the ragged array, at most one row a client, that most messages lack.
      merge: None, or how ranks can share out the averaging.
      tells: messages say whether gradients were finite (:attr:`~fedmpi.message.Message.finite`): nobody else need look.
      counters: names of what :meth:`count` counts, shown in every round's metrics.
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
        """What the S numbers are. Votes beside others are ±1 in float32."""
        return (Segment(self.size, "votes" if self.integer else "mean"),)

    def init(self) -> State:
        """A client's state before its first message, without the axis C, on the CPU; {} for a stateless method."""
        return {}

    def init_peer(self) -> State:
        """What the receiver keeps of one client. The same names stand in :meth:`init`: the sender's copy
        of an entry is what it believes the receiver to hold, and must stay equal to it."""
        return {}

    def verify(self, state: State) -> None:  # noqa: B027 (most states may hold any finite values)
        """Look at values of clients' states from outside, whose types and shapes are right.

        Raises:
          MessageError: some that no message could have left there.
        """

    @abstractmethod
    def layout(self) -> Layout:
        """The arrays of a message, for the receiver to check."""

    def nbytes(self) -> int | None:
        """Bytes of a client's message without its optional array, where every one has the same; else None."""
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
        """Decode messages and add each, times its weight, to its row of float32 totals, which may be one and the same
        row. Returns the new peer state."""
        v_CS, peer = self.decompress(message, peer, ctx)
        for total_S, v_S, weight in zip(total_CS, v_CS, weights, strict=True):
            total_S.add_(v_S, alpha=weight)
        return peer

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        """The gradients ``(C, D)`` that decoded vectors stand for (identity where S = D)."""
        return v_CS[:, : self.size - self.presence]

    def transpose(self, v_CS: Tensor, ctx: Context) -> Tensor:
        """The transpose ``(C, D)`` of an additive method's encoding, which is linear: its lift, where that is."""
        return self.lift(v_CS, ctx)

    def count(self, message: Message) -> dict[str, int]:
        """For the metrics; keys are :attr:`counters`."""
        return {}


_RENAMED = {
    "first": "Server.between(state, index, mean_S, round)",
    "memory": "Decoder.memory(), of the method's decoder",
    "gradient": "Decoder.direction(memory, mean_S, round, out), of the method's decoder",
}


class Decoder(ABC):
    """From means to directions, without parameters: all that a DDP hook needs of a method's far end. ``memory`` below
    is what :meth:`memory` gave, or any state with the same entries (a server's, a view)."""

    def memory(self) -> State:
        """What is kept between rounds, before the first; {} where nothing is."""
        return {}

    def shared(self, memory: State) -> State:
        """What senders need of it to compress."""
        return {}

    def between(self, memory: State, index: int, mean_S: Tensor, round: Round) -> State:
        """The memory after pass ``index``, which is not the last, whose senders' vectors have the mean ``mean_S``."""
        return memory

    @abstractmethod
    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The gradient ``(D,)`` that the last pass's mean stands for, and the new memory.

        Args:
          mean_S: the mean; of an integer method the sum, or a majority, packed as :attr:`Merge.array` of a message.
          out: ``(D,)``, contiguous, where the gradient may stand; None: nowhere given.
        """


class Server(ABC):
    """What turns the sum of messages into new parameters, and what clients download.

    ``state`` holds at least ``theta`` (D,) and ``version``, the number of finished rounds that changed it. A *view* is
    what somebody holds who knows only θ₀, the seed and the downloads it got: :meth:`view` then
    :meth:`reconcile`. Ranks that do not aggregate keep a view, exactly as a client does.

    Attributes:
      weighted: clients count by their number of samples; else one client, one vote.
      samples: training samples of its own, from which :meth:`prepare` gets a gradient; 0 for none.
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
        """What shape each entry of a state that somebody else wrote must have: :meth:`init`'s, but that an entry that
        starts without rows (a history) may have any number of them."""
        fresh = {name: tuple(value.shape) for name, value in self.init(theta_D).items()}
        return {
            name: (len(state[name]), *shape[1:]) if shape and not shape[0] else shape
            for name, shape in fresh.items()
        }

    @abstractmethod
    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        """The state after a round; ``mean_S`` is its clients' mean (of an integer method: their sum)."""

    def skip(self, state: State, round: Round) -> State:
        """The state after a round without a message that counts; one version ahead if there is a download."""
        return state

    @abstractmethod
    def view(self, theta_D: Tensor) -> State:
        """What a client holds that knows θ₀ and the seed: version 0."""

    @abstractmethod
    def download(self, state: State, seen: int) -> Message:
        """What brings a client of version ``seen`` up to date, as the message of one client."""

    def sizes(self, state: State, seen: Sequence[int]) -> list[Message]:
        """For each version :meth:`download`'s message, to be measured only: its arrays may lie on the device meta."""
        return [self.download(state, version) for version in seen]

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        """The arrays that a download may have: dtype and shape of one client's, -1 for any length; None: not said."""
        return None

    @abstractmethod
    def reconcile(self, view: State, message: Message, version: int) -> State:
        """The view after a download that brings it to ``version``: its parameters equal the server's to the bit."""

    def between(self, state: State, index: int, mean_S: Tensor, round: Round) -> State:
        """As :meth:`Decoder.between`, of a state or a view."""
        return state

    def prepare(self, state: State, g_D: Tensor) -> State:
        """The state before round 0 of a server with ``samples``, whose gradient is ``g_D``: a version of its own."""
        return state

    def facts(self, state: State) -> dict[str, float]:
        """What a run's summary says of a state or a view."""
        return {}

    def frozen(self, state: State) -> Tensor | None:
        """Parameters that stay as they are while clients train, bool ``(D,)``, of a state or a view."""
        return None

    def parameters(self, state: State) -> Tensor:
        """θ ``(D,)`` of a state or a view."""
        return state["theta"]

    def shared(self, state: State) -> State:
        """What clients need of a state or a view to compress."""
        return {}


@dataclass(frozen=True)
class Method:
    """One way to send a vector, and what becomes of the mean.

    Attributes:
      passes: the compressors of a round, one after the other; all but few methods have one. Each compresses the same
        gradients, once the vectors of the one before are averaged and :meth:`Server.between` (or
        :meth:`Decoder.between`) has made of their mean what it then finds in ``shared``. What clients keep is the
        last one's state; those before it only read that.
      server: from the mean to new parameters, for `fedmpi train`.
      decoder: from the mean to a direction, for drop-ins; None where the server changes parameters itself.

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
        """The decoder, for a job that steps with an optimizer of its own.

        Raises:
          ConfigError: there is none.
        """
        if self.decoder is None:
            raise ConfigError(
                "method: expected one whose server only averages, this one changes parameters itself; "
                "train with it through `fedmpi train`, also with mode: data_parallel"
            )
        return self.decoder


def placed(state: Mapping[str, Tensor], device: torch.device) -> State:
    """A state there: what :meth:`Compressor.init` and :meth:`Decoder.memory` make lies on the CPU."""
    return {name: value.to(device) for name, value in state.items()}


def nest(state: Mapping[str, Tensor], prefix: str = "inner.") -> State:
    """A wrapped part's state (or arrays) under a prefix."""
    return {prefix + name: value for name, value in state.items()}


def unnest(state: Mapping[str, Tensor], prefix: str = "inner.") -> State:
    """The inverse of :func:`nest`."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def believed(up: Compressor, state: State) -> State:
    """The peer state that a sender with ``state`` believes the receiver to hold."""
    return {name: state[name] for name in up.init_peer()}
