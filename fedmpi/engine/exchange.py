"""How ranks that have one message each come to their mean, with no aggregator: data-parallel training.

What a rank sends in a step, for W ranks, messages of b bytes and S numbers that are summed:

=========  =======================================  ====================================================
way        bytes sent                               fits
=========  =======================================  ====================================================
sum        2 (W−1)/W · 4 S (an all-reduce)          every method; small where S is (coordinates, sketches)
gather     (W−1) · b                                sparse and look-back messages while W is small; every
                                                    rank keeps what the W senders' receivers keep
merge      2 (W−1)/W · b (all-to-all, all-gather)   signs under a majority vote, bf16, fp16; bounded for any W
owner      b, and (W−1) · 4 S as owner of a part    look-back in parts, each of which one rank averages: it
                                                    alone keeps the W receivers' state of that part
=========  =======================================  ====================================================

Ways are pure: what receivers keep (``peers``, a leading axis W) goes in and comes out, so that a step can be
taken back. Each has two halves, so that the last collective of one message may be under way while the next message
is coded; that collective is launched in the first half, so that their order is that of the messages. A rank whose
gradient is not finite says so within the same collective, and the step counts on none. What few messages have
(:attr:`~fedmpi.method.Compressor.optional`) follows in one more, once all know that some have it.

Shape suffixes: W ranks, S summed numbers, B bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from time import perf_counter
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.engine.sums import Sum
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message, concat, from_bytes, from_rows, to_bytes, to_rows
from fedmpi.method import Compressor, Context, State, believed

T = TypeVar("T")
Mean = tuple[Tensor | None, State]
Way = Literal["auto", "sum", "gather", "merge", "owner"]
GATHER_BYTES = 1 << 30  # of peers' state that "auto" lets a rank keep


class Exchange(ABC):
    """One way for one compressor.

    Attributes:
      wire: seconds spent in collectives so far.
      reuse: a mean lies where the last one did.
    """

    name: ClassVar[str]
    reuse = False

    def __init__(self, comm: Comm, up: Compressor, exact: bool = False) -> None:
        self.comm, self.up, self.exact = comm, up, exact
        self.wire = 0.0
        self._kept: Sum | None = None

    def init(self) -> State:
        """The peers' state before the first message."""
        return {}

    def mean(self, message: Message, before: State, peers: State, ctx: Context, usable: bool = True) -> Mean:
        """Both halves: :meth:`begin`, and what it returns."""
        return self.begin(message, before, peers, ctx, usable)()

    @abstractmethod
    def begin(
        self, message: Message, before: State, peers: State, ctx: Context, usable: bool = True
    ) -> Callable[[], Mean]:
        """Send a message. What comes back waits for the others' and returns the mean ``(S,)`` of all ranks' messages
        (of an integer method: the sum, or its sign), the same on every rank, and the peers' new state; None when a
        rank's message is not ``usable``.

        Args:
          message: this rank's.
          before: this rank's state before it compressed that.
          peers: from :meth:`init` or the step before.
        """

    def _wait(self, collective: Callable[[], T]) -> T:
        started = perf_counter()
        result = collective()
        self.wire += perf_counter() - started
        return result

    def _flag(self, message: Message, usable: bool) -> int:
        """The byte beside a message: 0, 1 where it is usable, 2 where an optional array of it follows."""
        optional = self.up.optional
        return int(usable) * (1 + (optional is not None and len(message.arrays[optional]) > 0))

    def _optional(self, message: Message, flags_W: Tensor) -> tuple[Tensor, Tensor]:
        """The optional arrays of all ranks that have one, in one more collective where there is any, and which have
        (bool)."""
        name, has_W = self.up.optional, flags_W > 1
        assert name is not None
        mine, field = message.arrays[name], self.up.layout()[name]
        if not bool(has_W.any()):
            return mine, has_W
        told = self._wait(
            lambda: self.comm.allgather(to_bytes(Message({name: mine[0][None]})) if len(mine) else b"")
        )
        got = [from_bytes(f, {name: field._replace(ragged=False)}, 1).arrays[name] for f in told if f]
        if [bool(f) for f in told] != has_W.tolist():
            raise MessageError(f"message: array {name!r} came from other ranks than those that had one")
        return torch.cat(got), has_W

    def _zero(self) -> Sum:
        if self._kept is not None and self.reuse:
            self._kept.clear()
        else:
            up = self.up
            self._kept = Sum(up.size, integer=up.integer, exact=self.exact, terms=self.comm.size, flag=True)
        return self._kept

    def _decoded(self, total: Sum, message: Message, peers: State, ctx: Context) -> State:
        """Adds some ranks' messages to the mean; returns their receivers' new state."""
        count, weight = message.clients, 1 / self.comm.size
        if not total.integer and not total.exact:
            rows_CS = total.total_S.expand(count, -1)
            return self.up.add(rows_CS, message, peers, ctx, [weight] * count)
        v_CS, peers = self.up.decompress(message, peers, ctx)
        total.add(v_CS, torch.full((count,), weight, dtype=torch.float64))
        return peers

    def _everybody(self, ctx: Context) -> Context:
        """The context of all ranks' messages; rank r is client r."""
        ranks_W = torch.arange(self.comm.size)
        return Context(ctx.round, ranks_W, ctx.steps_C.expand(self.comm.size), ctx.shared, ctx.part)


class SumExchange(Exchange):
    """Each rank decodes its own message; the vectors are all-reduced."""

    name = "sum"

    def begin(
        self, message: Message, before: State, peers: State, ctx: Context, usable: bool = True
    ) -> Callable[[], Mean]:
        total = self._zero()
        if usable:
            self._decoded(total, message, believed(self.up, before), ctx)
        total.flag_1.fill_(not usable)
        summed = self._wait(lambda: total.start_over(self.comm))

        def end() -> Mean:
            self._wait(summed)
            return (total.value() if float(total.flag_1) == 0 else None), peers

        return end


class GatherExchange(Exchange):
    """Every rank gets every message and decodes all of them."""

    name = "gather"

    def init(self) -> State:
        return {
            name: value.expand(self.comm.size, *value.shape).clone()
            for name, value in self.up.init_peer().items()
        }

    def begin(
        self, message: Message, before: State, peers: State, ctx: Context, usable: bool = True
    ) -> Callable[[], Mean]:
        sent = self._send(message, usable)

        def end() -> Mean:
            everybody = sent()
            return (None, peers) if everybody is None else self._decode(everybody, peers, ctx)

        return end

    def _decode(self, everybody: Message, peers: State, ctx: Context) -> tuple[Tensor, State]:
        total = self._zero()
        peers = self._decoded(total, everybody, peers, self._everybody(ctx))
        return total.value(), peers

    def _send(self, message: Message, usable: bool) -> Callable[[], Message | None]:
        """What waits for all ranks' messages, and returns them, or None."""
        layout, optional = self.up.layout(), self.up.optional
        if self.up.nbytes() is None:  # of different lengths: framed, and an empty frame is not usable
            frames = self._wait(lambda: self.comm.allgather(to_bytes(message) if usable else b""))
            return lambda: concat([from_bytes(f, layout, 1) for f in frames]) if all(frames) else None
        if optional is not None:
            del layout[optional]
        flag_1 = torch.tensor([[self._flag(message, usable)]], dtype=torch.uint8)
        row_B = torch.cat([to_rows(Message({name: message.arrays[name] for name in layout})), flag_1], 1)[0]
        gathered = self._wait(lambda: self.comm.start_allgather_tensor(row_B))

        def rows() -> Message | None:
            rows_WB = self._wait(gathered)
            if not bool(rows_WB[:, -1].all()):
                return None
            everybody = from_rows(rows_WB[:, :-1], layout)
            if optional is None:
                return everybody
            rows_NB, has_W = self._optional(message, rows_WB[:, -1])
            return Message(everybody.arrays | {optional: rows_NB}, {optional: has_W.long()})

        return rows


class VoteExchange(GatherExchange):
    """Every rank gets every message, and merges them. The mean is their majority, packed as a message is: for two
    ranks, and a server that takes it so (:meth:`fedmpi.method.Server.gradient`)."""

    def _decode(self, everybody: Message, peers: State, ctx: Context) -> tuple[Tensor, State]:
        up, optional_WB = self.up, None
        assert up.merged is not None  # build() saw to it
        if up.optional is not None:
            optional_WB = _each(everybody.arrays[up.optional], everybody.lengths[up.optional].bool())
        merged_N = up.merge(everybody.arrays[up.merged], 0, ctx.round, optional_WB)
        if optional_WB is None:
            return merged_N, peers
        v_1S, _ = up.decompress(up.merged_message(merged_N[None], optional_WB), {}, ctx)
        return v_1S[0], peers


class MergeExchange(Exchange):
    """Rank r gets everybody's r-th part of the message, merges those, and sends the result to all."""

    name = "merge"
    _ALIGN = 64  # entries of a part: whole words of random bits

    def begin(
        self, message: Message, before: State, peers: State, ctx: Context, usable: bool = True
    ) -> Callable[[], Mean]:
        up, ranks = self.up, self.comm.size
        assert up.merged is not None  # build() saw to it
        name, field = up.merged, up.layout()[up.merged]
        length = field.row[0]
        part = -(-length // ranks)
        part += -part % self._ALIGN
        entries_N = torch.zeros(ranks * part, dtype=field.dtype)
        entries_N[:length] = message.arrays[name][0]
        flags_W1 = torch.full((ranks, 1), self._flag(message, usable), dtype=torch.uint8)
        sent_WB = torch.cat([entries_N.view(ranks, part).view(torch.uint8), flags_W1], 1)
        got_WB = self._wait(lambda: self.comm.alltoall_tensor(sent_WB))
        rows_WN = got_WB[:, :-1].contiguous().view(field.dtype)
        optional_WB = None
        if up.optional is not None and bool(got_WB[:, -1].all()):
            optional_WB = _each(*self._optional(message, got_WB[:, -1]))
        merged_N = up.merge(rows_WN, self.comm.rank * part, ctx.round, optional_WB)
        all_1 = got_WB[:, -1].min()[None]
        part_B = torch.cat([merged_N.view(torch.uint8), all_1])
        gathered = self._wait(lambda: self.comm.start_allgather_tensor(part_B))

        def end() -> Mean:
            parts_WB = self._wait(gathered)
            if not bool(parts_WB[:, -1].all()):
                return None, peers
            whole_1N = parts_WB[:, :-1].contiguous().view(field.dtype).view(1, -1)[:, :length]
            v_1S, _ = up.decompress(up.merged_message(whole_1N, optional_WB), {}, ctx)
            return v_1S[0], peers

        return end


def _each(rows_NB: Tensor, has_W: Tensor) -> Tensor | None:
    """The optional array of each rank, zeros for one without; None where no rank has one."""
    if not len(rows_NB):
        return None
    optional_WB = rows_NB.new_zeros(len(has_W), *rows_NB.shape[1:])
    optional_WB[has_W] = rows_NB
    return optional_WB


class OwnerExchange(GatherExchange):
    """One rank gets every message, averages, and sends the mean to all."""

    name = "owner"

    def __init__(self, comm: Comm, up: Compressor, exact: bool = False, owner: int = 0) -> None:
        super().__init__(comm, up, exact)
        self.owner = owner

    def init(self) -> State:
        return super().init() if self.comm.rank == self.owner else {}

    def begin(
        self, message: Message, before: State, peers: State, ctx: Context, usable: bool = True
    ) -> Callable[[], Mean]:
        frames = self._wait(lambda: self.comm.gather(to_bytes(message) if usable else b"", self.owner))
        answer = b""
        if self.comm.rank == self.owner and all(frames):
            everybody = concat([from_bytes(f, self.up.layout(), 1) for f in frames])
            mean_S, peers = self._decode(everybody, peers, ctx)
            answer = to_bytes(Message({"mean": mean_S[None]}))
        answer = self._wait(lambda: self.comm.broadcast(answer, self.owner))
        return lambda: ((from_bytes(answer).arrays["mean"][0] if answer else None), peers)


_WAYS: dict[str, type[Exchange]] = {w.name: w for w in (SumExchange, GatherExchange, MergeExchange)}


def build(
    comm: Comm,
    up: Compressor,
    way: Way = "auto",
    exact: bool = False,
    owner: int | None = None,
    room: float = GATHER_BYTES,
    packed: bool = False,
) -> Exchange:
    """The way asked for; with ``auto``, the one that sends least.

    With ``exact``, what bf16 and fp16 sum is not rounded a second time. A method whose receivers keep state
    (look-back) is gathered, since a sum would send all its numbers in every step; unless W receivers' state
    takes more than ``room`` bytes: then it goes to its ``owner``, or, where there is none, is summed.

    Args:
      packed: a majority may stay packed.

    Raises:
      ConfigError: the compressor does not fit it.
    """
    if way == "auto":
        way = _choose(comm, up, exact, owner is not None, room)
        if packed and way == "gather" and up.merged is not None and up.integer:
            return VoteExchange(comm, up, exact)
    if way == "merge" and up.merged is None:
        raise ConfigError(
            "exchange: merge is for signsgd with a majority vote, bf16 and fp16; expected sum or gather"
        )
    if way == "owner":
        return OwnerExchange(comm, up, exact, owner or 0)
    return _WAYS[way](comm, up, exact)


def _choose(comm: Comm, up: Compressor, exact: bool, owned: bool, room: float) -> Way:
    if comm.size == 1:
        return "sum"
    if up.merged is not None and (up.integer or not exact):  # what is rounded again is not exact
        return (
            "merge" if comm.size > 2 else "gather"
        )  # two send as much either way, and one collective is faster
    peers = sum(value.nbytes for value in up.init_peer().values())
    if peers:
        if comm.size * peers <= room:
            return "gather"
        return "owner" if owned else "sum"
    summed = 2 / comm.size * 4 * up.size
    one = up.nbytes()
    return "gather" if one is None or one < summed else "sum"
