"""How messages become their mean: the only place where those of clients or of ranks meet.

A pass of one compressor: :meth:`Way.open` it for a roster, :meth:`Way.take` this rank's messages, :meth:`Way.send`;
what that returns waits for the others and gives the mean. A roster is a cohort of a federated run (any number of
clients a rank) or the ranks themselves (one each: data-parallel training, drop-ins). What a rank sends of messages of b
bytes and S summed numbers, among W ranks:

=========  =======================================  ====================================================
way        bytes sent                               fits
=========  =======================================  ====================================================
sum        2 (W−1)/W · 4 S (an all-reduce)          every method; small where S is (coordinates, sketches);
                                                    a cohort with ``topology: allreduce``
owner      its messages, and (W−1) · 4 S as an      a cohort with ``topology: aggregator``; look-back in
           owner that answers                       parts, each of which one rank averages: it alone keeps
                                                    the W receivers' state of that part
gather     (W−1) · b                                one message a rank: sparse and look-back messages while
                                                    W is small; every rank keeps what W receivers keep
merge      2 (W−1)/W · b (all-to-all, all-gather)   one message a rank: signs under a majority vote, bf16,
                                                    fp16, blockwise; bounded for any W
=========  =======================================  ====================================================

The last collective is launched by :meth:`Way.send`, so that it may be under way while the next message is coded and
the order of collectives is that of the messages. Where ranks have one message each, one that is not usable (its
gradient is not finite) says so within the same collective, and the pass comes to nothing on all. What few messages have
(:attr:`~fedmpi.method.Compressor.optional`) follows in one more collective, once all know that some have it.

Shape suffixes: N clients of a pass, C of them at a time, W ranks, S summed numbers, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError, MessageError
from fedmpi.meet.base import End, Held, Peers, Roster, Way
from fedmpi.meet.sums import Sums
from fedmpi.message import CPU, Message, concat, from_bytes, from_rows, to_bytes, to_rows
from fedmpi.method import Compressor, Context, State, believed, placed
from fedmpi.ops import flags
from fedmpi.ops.flags import Flag

Name = Literal["auto", "sum", "gather", "merge", "owner"]
GATHER_BYTES = 1 << 30  # of peers' state that "auto" lets a rank keep
_CHUNK_VALUES = 1 << 24  # decoded numbers at a time when one rank decodes many clients


class SumWay(Way):
    """Each rank decodes and adds up what it took; the sums are all-reduced.

    Args:
      flags: ranks tell each other in the sum whether their messages are usable.
    """

    name = "sum"

    def __init__(
        self, comm: Comm, up: Compressor, sums: Sums, peers: Peers | None = None, flags: bool = True
    ) -> None:
        super().__init__(comm, up, sums, peers)
        self.flags = flags

    def open(self, roster: Roster) -> None:
        super().open(roster)
        self._total = self._zero(self.flags)

    def take(
        self, weights_C: Tensor, message: Message, before: State, ctx: Context, usable: Flag = True
    ) -> None:
        if usable is not False:
            # The receivers' state lies beside the senders', which it equals.
            self._add(self._total, weights_C, message, believed(self.up, before) if before else {}, ctx)
        if isinstance(usable, Tensor):
            self._total.flag_1.copy_(~usable)
        elif not usable:
            self._total.flag_1.fill_(1)

    def send(self) -> End:
        total, share = self._total, self.share
        del self._total
        summed = self._wait(lambda: total.start_over(self.comm))

        def end() -> Tensor | None:
            self._wait(summed)
            return total.value(share) if not self.flags or self._passed(total.flag_1[0] == 0) else None

        return end


class _OneEach(Way):
    """Each rank has one message."""

    def take(
        self, weights_C: Tensor, message: Message, before: State, ctx: Context, usable: Flag = True
    ) -> None:
        self._mine, self._usable = message, usable

    def _flags(self, *shape: int) -> Tensor:
        """The byte beside the message: 0, 1 where it is usable, 2 where an optional array of it follows."""
        optional, usable, device = self.up.optional, self._usable, self.sums.device
        flag = 1 + (optional is not None and len(self._mine.arrays[optional]) > 0)
        if isinstance(usable, Tensor):
            return (usable.to(torch.uint8) * flag).expand(shape)
        return torch.full(shape, int(usable) * flag, dtype=torch.uint8, device=device)

    def _optional(self, mine: Tensor, flags_W: Tensor) -> tuple[Tensor, Tensor]:
        """The optional arrays of all ranks that have one, in one more collective where there is any, and which have
        (bool, on the CPU, as the flags are)."""
        name, has_W = self.up.optional, flags_W > 1
        assert name is not None
        field = self.up.layout()[name]
        if not bool(has_W.any()):
            return mine, has_W
        told = self._wait(
            lambda: self.comm.allgather(to_bytes(Message({name: mine[0][None]})) if len(mine) else b"")
        )
        layout = {name: field._replace(ragged=False)}
        got = [from_bytes(f, layout, 1, mine.device).arrays[name] for f in told if f]
        if [bool(f) for f in told] != has_W.tolist():
            raise MessageError(f"message: array {name!r} came from other ranks than those that had one")
        return torch.cat(got), has_W


class GatherWay(_OneEach):
    """Every rank gets every message and decodes all of them."""

    name = "gather"

    def init(self) -> State:
        return _of_ranks(self.comm, self.up)

    def send(self) -> End:
        sent, roster = self._send(), self.roster

        def end() -> Tensor | None:
            everybody = sent()
            return None if everybody is None else self._decode(everybody, roster)

        return end

    def _decode(self, everybody: Message, roster: Roster) -> Tensor:
        total, ctx = self._zero(True), roster.ctx(torch.arange(self.comm.size))
        peers = self.peers.get(ctx.clients_C) if self.peers is not None else {}
        peers = self._add(total, roster.weights, everybody, peers, ctx)
        if self.peers is not None:
            self.peers.put(ctx.clients_C, peers)
        return total.value()

    def _send(self) -> Callable[[], Message | None]:
        """What waits for all ranks' messages, and returns them, or None."""
        layout, optional, message = self.up.layout(), self.up.optional, self._mine
        if self.up.nbytes() is None:  # of different lengths: framed, and an empty frame is not usable
            frame = to_bytes(message, self._usable)
            frames = self._wait(lambda: self.comm.allgather(frame))
            if not all(frames):
                self.good = False
                return lambda: None
            self.good = True
            return lambda: concat([from_bytes(f, layout, 1) for f in frames]).to(self.sums.device)
        if optional is not None:
            del layout[optional]
        sent = to_rows(Message({name: message.arrays[name] for name in layout}))
        row_B = torch.cat([sent, self._flags(1, 1)], 1)[0]
        gathered = self._wait(lambda: self.comm.start_allgather_tensor(row_B))

        def rows() -> Message | None:
            rows_WB = self._wait(gathered)
            # Where optional arrays may follow the host has to know who has one: then it knows both.
            flags_W = rows_WB[:, -1] if optional is None else rows_WB[:, -1].cpu()
            if not self._passed((flags_W > 0).all()):
                return None
            everybody = from_rows(rows_WB[:, :-1], layout)
            if optional is None:
                return everybody
            rows_NB, has_W = self._optional(message.arrays[optional], flags_W)
            return Message(everybody.arrays | {optional: rows_NB}, {optional: has_W.long()})

        return rows


class VoteWay(GatherWay):
    """Every rank gets every message, and merges them. The mean is their majority, packed as a message is: for two
    ranks, and a decoder that takes it so (:meth:`fedmpi.method.Decoder.direction`)."""

    def _decode(self, everybody: Message, roster: Roster) -> Tensor:
        up, optional_WB = self.up, None
        assert up.merge is not None  # build() saw to it
        if up.optional is not None:
            optional_WB = _each(everybody.arrays[up.optional], everybody.lengths[up.optional] > 0)
        merged_N = up.merge(everybody.arrays[up.merge.array], 0, roster.now, optional_WB)
        if optional_WB is None:
            return merged_N
        ctx = roster.ctx(torch.tensor([self.comm.rank]))
        v_1S, _ = up.decompress(up.merge.message(merged_N[None], optional_WB), {}, ctx)
        return v_1S[0]


class MergeWay(_OneEach):
    """Rank r gets everybody's r-th part of the message, merges those, and sends the result to all."""

    name = "merge"

    def send(self) -> End:
        up, merge, ranks, roster = self.up, self.up.merge, self.comm.size, self.roster
        assert merge is not None  # build() saw to it
        name, field = merge.array, up.layout()[merge.array]
        length = field.row[0]
        part = -(-length // ranks)
        part += -part % merge.align
        entries_N = torch.zeros(ranks * part, dtype=field.dtype, device=self.sums.device)
        entries_N[:length] = self._mine.arrays[name][0]
        sent_WB = torch.cat([entries_N.view(ranks, part).view(torch.uint8), self._flags(ranks, 1)], 1)
        got_WB = self._wait(lambda: self.comm.alltoall_tensor(sent_WB))
        rows_WN = got_WB[:, :-1].contiguous().view(field.dtype)
        optional_WB = None
        if up.optional is not None and bool((flags_W := got_WB[:, -1].cpu()).all()):
            optional_WB = _each(*self._optional(self._mine.arrays[up.optional], flags_W))
        merged_N = merge(rows_WN, self.comm.rank * part, roster.now, optional_WB)
        part_B = torch.cat([merged_N.view(torch.uint8), got_WB[:, -1].min()[None]])
        gathered = self._wait(lambda: self.comm.start_allgather_tensor(part_B))

        def end() -> Tensor | None:
            parts_WB = self._wait(gathered)
            if not self._passed((parts_WB[:, -1] > 0).all()):
                return None
            whole_1N = parts_WB[:, :-1].contiguous().view(field.dtype).view(1, -1)[:, :length]
            ctx = roster.ctx(torch.tensor([self.comm.rank]))
            v_1S, _ = up.decompress(merge.message(whole_1N, optional_WB), {}, ctx)
            return v_1S[0]

        return end


class OwnerWay(Way):
    """One rank gets every message and averages.

    Args:
      owner: that rank.
      answers: it sends the mean to all, each of which has one message; else any number, and it alone has the mean, or
        an error that it must tell the others.
    """

    name = "owner"

    def __init__(
        self,
        comm: Comm,
        up: Compressor,
        sums: Sums,
        peers: Peers | None = None,
        owner: int = 0,
        answers: bool = True,
    ) -> None:
        super().__init__(comm, up, sums, peers)
        self.owner, self.answers = owner, answers

    def init(self) -> State:
        return _of_ranks(self.comm, self.up) if self.comm.rank == self.owner else {}

    def open(self, roster: Roster) -> None:
        super().open(roster)
        self._outbox: list[Message] = []
        self._usable: Flag = True

    def take(
        self, weights_C: Tensor, message: Message, before: State, ctx: Context, usable: Flag = True
    ) -> None:
        self._outbox.append(message)
        self._usable = self._usable & usable

    def send(self) -> End:
        frame = to_bytes(concat(self._outbox), self._usable) if self._outbox else b""
        inbox = self._wait(lambda: self.comm.gather(frame, self.owner))
        here, answer = self.comm.rank == self.owner, b""
        if not self.answers:
            return lambda: self._mean(inbox) if here else None
        if here and all(inbox):
            with flags.later(None):  # an error that only this rank finds must come before its answer
                answer = to_bytes(Message({"mean": self._mean(inbox)[None]}))
        answer = self._wait(lambda: self.comm.broadcast(answer, self.owner))
        self.good, device = bool(answer), self.sums.device
        return lambda: from_bytes(answer, device=device).arrays["mean"][0] if answer else None

    def _mean(self, inbox: list[bytes]) -> Tensor:
        total = self._zero(False)
        for positions, message in self._messages(inbox):
            ctx = self.roster.ctx(positions)
            peers = self.peers.get(ctx.clients_C) if self.peers is not None else {}
            peers = self._add(total, self.roster.weights[positions], message, peers, ctx)
            if self.peers is not None:
                self.peers.put(ctx.clients_C, peers)
        return total.value(self.share)

    def _messages(self, inbox: list[bytes]) -> Iterator[tuple[Tensor, Message]]:
        """What the frames hold, with whose messages they are: as many at a time as may be decoded together."""
        layout = self.up.layout()
        if self.answers:
            yield (
                torch.arange(self.comm.size),
                concat([from_bytes(frame, layout, 1, self.sums.device) for frame in inbox]),
            )
            return
        step = 1 if self.sums.exact else max(1, _CHUNK_VALUES // self.up.size)
        for rank, frame in enumerate(inbox):
            positions = self.roster.placed.get(rank, self.roster.clients[:0])
            if len(positions):
                message = from_bytes(frame, layout, len(positions), self.sums.device)
                for rows in torch.arange(len(positions)).split(step):
                    yield positions[rows], message.select(rows)


def _of_ranks(comm: Comm, up: Compressor) -> State:
    """What the receiver of all ranks' messages keeps before the first."""
    return {name: value.expand(comm.size, *value.shape).clone() for name, value in up.init_peer().items()}


def _each(rows_NB: Tensor, has_W: Tensor) -> Tensor | None:
    """The optional array of each rank, zeros for one without; None where no rank has one."""
    if not len(rows_NB):
        return None
    optional_WB = rows_NB.new_zeros(len(has_W), *rows_NB.shape[1:])
    optional_WB[has_W.nonzero()[:, 0].to(rows_NB.device)] = rows_NB
    return optional_WB


_WAYS: dict[str, type[Way]] = {way.name: way for way in (SumWay, GatherWay, MergeWay)}


def build(
    comm: Comm,
    up: Compressor,
    way: Name = "auto",
    exact: bool = False,
    owner: int | None = None,
    room: float = GATHER_BYTES,
    packed: bool = False,
    device: torch.device = CPU,
) -> Way:
    """The way asked for, for ranks that have one message each; with ``auto``, the one that sends least.

    With ``exact``, what bf16 and fp16 sum is not rounded a second time. A method whose receivers keep state
    (look-back) is gathered, since a sum would send all its numbers in every step; unless W receivers' state
    takes more than ``room`` bytes: then it goes to its ``owner``, or, where there is none, is summed.

    Args:
      packed: a majority may stay packed.
      device: where messages lie and are decoded; the communicator stages them if it cannot send from there.

    Raises:
      ConfigError: the compressor does not fit it.
    """
    sums, kind = Sums(exact, device=device), _WAYS.get(way)
    if way == "auto":
        way = _choose(comm, up, exact, owner is not None, room)
        votes = packed and way == "gather" and up.merge is not None and up.integer
        kind = VoteWay if votes else _WAYS.get(way)
    if way == "merge" and up.merge is None:
        raise ConfigError(
            "exchange: merge is for signsgd with a majority vote, bf16, fp16 and blockwise; expected sum or gather"
        )
    made = OwnerWay(comm, up, sums, owner=owner or 0) if kind is None else kind(comm, up, sums)
    made.peers = Held(placed(made.init(), device))
    return made


def _choose(comm: Comm, up: Compressor, exact: bool, owned: bool, room: float) -> Name:
    if comm.size == 1:
        return "sum"
    if up.merge is not None and (up.integer or not exact):  # what is rounded again is not exact
        # Two send as much either way, and one collective is faster.
        return "merge" if comm.size > 2 else "gather"
    peers = sum(value.nbytes for value in up.init_peer().values())
    if peers:
        if comm.size * peers <= room:
            return "gather"
        return "owner" if owned else "sum"
    summed = 2 / comm.size * 4 * up.size
    one = up.nbytes()
    return "gather" if one is None or one < summed else "sum"
