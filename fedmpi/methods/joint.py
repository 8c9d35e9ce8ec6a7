"""Several methods, each for a slice of one vector, as one method: one message, one state, one server.

A client's message holds the arrays of all parts, named ``part.array``; the vectors that they decode to lie one after
the other in what is summed. A part gives what its method gives alone, to the bit: it has keys of its own, votes stay
one a client beside floats that clients weigh, and each downloads by its own rule.

Shape suffixes: C clients, X numbers of the whole vector, D of one part, S numbers that are summed, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Layout, Message
from fedmpi.method import Compressor, Context, Method, Round, Segment, Server, State, nest, unnest
from fedmpi.spec import Spec


class Part(NamedTuple):
    """Tensors that travel as one vector, a slice of the whole.

    Attributes:
      name: before each of its arrays and entries of states; without a dot.
      spec: its tensors.
      at: the slice.
      method: how it travels.
      seed: of its keys, so that equal parts do not draw equal numbers.
      lr: the server's rate for it; None: the round's.
      each: of its vectors the plain sum is taken, in which every client counts 1.
    """

    name: str
    spec: Spec
    at: slice
    method: Method
    seed: int
    lr: float | None = None
    each: bool = False

    def round(self, round: Round) -> Round:
        return round._replace(seed=self.seed, lr=round.lr if self.lr is None else self.lr)

    def ctx(self, ctx: Context) -> Context:
        return replace(ctx, round=self.round(ctx.round), shared=unnest(ctx.shared, f"{self.name}."))


class Together(Compressor):
    """Messages of several compressors beside each other.

    Args:
      spec: of the whole vector.
      names, slices, ups: of the parts, in the order of what is summed.
    """

    def __init__(
        self, spec: Spec, names: Sequence[str], slices: Sequence[slice], ups: Sequence[Compressor]
    ) -> None:
        super().__init__(spec, sum(up.size for up in ups))
        self.names, self.slices, self.ups = tuple(names), tuple(slices), tuple(ups)
        self.additive = all(up.additive for up in ups)
        self.replayable = all(up.replayable for up in ups)

    def within(self, ctx: Context, index: int) -> Context:
        """The context of a part's call."""
        return ctx.within(index)

    def own(self, message: Message, index: int) -> Message:
        """A part's message of a whole one."""
        prefix = f"{self.names[index]}."
        return Message(unnest(message.arrays, prefix), unnest(message.lengths, prefix))

    def init(self) -> State:
        return self._nested(up.init() for up in self.ups)

    def init_peer(self) -> State:
        return self._nested(up.init_peer() for up in self.ups)

    def verify(self, state: State) -> None:
        for name, up in zip(self.names, self.ups, strict=True):
            up.verify(unnest(state, f"{name}."))

    def layout(self) -> Layout:
        named = zip(self.names, self.ups, strict=True)
        return {f"{name}.{array}": field for name, up in named for array, field in up.layout().items()}

    def nbytes(self) -> int | None:
        each = [up.nbytes() for up in self.ups]
        return None if None in each else sum(n for n in each if n is not None)

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        arrays: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        states = []
        for i, (name, at, up) in enumerate(zip(self.names, self.slices, self.ups, strict=True)):
            own = unnest(state, f"{name}.")
            message, after = up.compress(g_CD[:, at].contiguous(), own, self.within(ctx, i))
            arrays |= nest(message.arrays, f"{name}.")
            lengths |= nest(message.lengths, f"{name}.")
            states.append(after)
        return Message(arrays, lengths), self._nested(states)

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        values, states = self.each(message, peer, ctx)
        return torch.cat([v.float() for v in values], 1), states

    def each(self, message: Message, peer: State, ctx: Context) -> tuple[list[Tensor], State]:
        """The parts' decoded vectors, and the new peer state."""
        values, states = [], []
        for i, (name, up) in enumerate(zip(self.names, self.ups, strict=True)):
            v_CS, after = up.decompress(self.own(message, i), unnest(peer, f"{name}."), self.within(ctx, i))
            values.append(v_CS)
            states.append(after)
        return values, self._nested(states)

    def _nested(self, states: Iterable[State]) -> State:
        named = zip(self.names, states, strict=True)
        return {f"{name}.{entry}": value for name, state in named for entry, value in state.items()}


class Joint(Together):
    """One pass of several parts' methods.

    Attributes:
      parts: those that take part in it.
    """

    def __init__(self, spec: Spec, parts: Sequence[Part], ups: Sequence[Compressor]) -> None:
        super().__init__(spec, [p.name for p in parts], [p.at for p in parts], ups)
        self.parts = tuple(parts)
        named = zip(self.names, ups, strict=True)
        self.counters = tuple(f"{name}.{counter}" for name, up in named for counter in up.counters)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(
            Segment(size, "total" if p.each else kind)
            for p, up in zip(self.parts, self.ups, strict=True)
            for size, kind in up.segments
        )

    def within(self, ctx: Context, index: int) -> Context:
        return self.parts[index].ctx(ctx)

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        states = []
        for i, (at, up) in enumerate(zip(self.summed(), self.ups, strict=True)):
            own = unnest(peer, f"{self.names[i]}.")
            counts = [1.0] * len(weights) if up.integer or self.parts[i].each else weights
            states.append(up.add(total_CS[:, at], self.own(message, i), own, self.within(ctx, i), counts))
        return self._nested(states)

    def summed(self) -> Iterator[slice]:
        """Where each part lies in what is summed."""
        start = 0
        for up in self.ups:
            yield slice(start, start + up.size)
            start += up.size

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self._whole([up.lift for up in self.ups], v_CS, ctx)

    def transpose(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self._whole([up.transpose for up in self.ups], v_CS, ctx)

    def _whole(
        self, calls: Sequence[Callable[[Tensor, Context], Tensor]], v_CS: Tensor, ctx: Context
    ) -> Tensor:
        """What each part's call makes of its numbers, at its place in the whole vector."""
        whole = v_CS.new_zeros(len(v_CS), self.spec.size)
        for i, (at, call) in enumerate(zip(self.summed(), calls, strict=True)):
            whole[:, self.slices[i]] = call(v_CS[:, at], self.within(ctx, i))
        return whole

    def decoded(self, name: str, message: Message, peer: State, ctx: Context) -> Tensor:
        """What the part ``name`` of the messages stands for, ``(C, D)`` of the part."""
        i = self.names.index(name)
        own = unnest(peer, f"{name}."), self.within(ctx, i)
        v_CS, _ = self.ups[i].decompress(self.own(message, i), *own)
        return self.ups[i].lift(v_CS.float(), own[1])

    def count(self, message: Message) -> dict[str, int]:
        return {
            f"{name}.{counter}": n
            for i, (name, up) in enumerate(zip(self.names, self.ups, strict=True))
            for counter, n in up.count(self.own(message, i)).items()
        }


class JointServer(Server):
    """The servers of the parts.

    Parts' versions may differ: a subspace that turns in a round without messages changes nothing else. State entries:
    the parts', by ``part.entry`` but for their parameters, which are slices of ``theta``; and, of a server,
    ``behind``, int64 ``(E, 1 + P)``: from which version on (column 0) each part's own is so far behind.

    Args:
      parts: all of them, which cover the vector in its order.
      passes: those of each pass.
    """

    def __init__(self, parts: Sequence[Part], passes: Sequence[Joint]) -> None:
        self.parts, self.passes = tuple(parts), tuple(passes)
        self.weighted = any(p.method.server.weighted for p in parts)
        self.samples = max(p.method.server.samples for p in parts)

    def part(self, state: State, p: Part) -> State:
        """One part's state or view."""
        return unnest(state, f"{p.name}.") | {"theta": state["theta"][p.at]}

    def _joined(self, states: Sequence[State], old: State, version: int) -> State:
        theta_X = torch.cat([state["theta"] for state in states])
        new = {"theta": theta_X, "version": torch.tensor(version)}
        for p, state in zip(self.parts, states, strict=True):
            new |= nest({name: value for name, value in state.items() if name != "theta"}, f"{p.name}.")
        if "behind" in old:
            row = torch.tensor([version, *(version - int(state["version"]) for state in states)])
            same = torch.equal(row[1:], old["behind"][-1, 1:])
            new["behind"] = old["behind"] if same else torch.cat([old["behind"], row[None]])
        return new

    def init(self, theta_D: Tensor) -> State:
        start = {"behind": torch.zeros(1, 1 + len(self.parts), dtype=torch.int64)}
        return self._joined([p.method.server.init(theta_D[p.at].clone()) for p in self.parts], start, 0)

    def view(self, theta_D: Tensor) -> State:
        return self._joined([p.method.server.view(theta_D[p.at].clone()) for p in self.parts], {}, 0)

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"theta": tuple(theta_D.shape), "version": ()}
        for p in self.parts:
            own = p.method.server.shapes(theta_D[p.at], self.part(state, p))
            shapes |= {f"{p.name}.{name}": shape for name, shape in own.items() if name != "theta"}
        rows = len(state["behind"]) if state["behind"].ndim else 1
        return shapes | {"behind": (rows, 1 + len(self.parts))}

    def between(self, state: State, index: int, mean_S: Tensor, round: Round) -> State:
        new, joint = dict(state), self.passes[index]
        for p, at, up in zip(joint.parts, joint.summed(), joint.ups, strict=True):
            mean = _of_kind(mean_S[at], up)
            own = p.method.server.between(
                self.part(state, p), p.method.passes.index(up), mean, p.round(round)
            )
            new |= nest({name: value for name, value in own.items() if name != "theta"}, f"{p.name}.")
        return new

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        states, last = [], self.passes[-1]
        for p, at, up in zip(last.parts, last.summed(), last.ups, strict=True):
            mean = _of_kind(mean_S[at], up)
            states.append(p.method.server.finish(self.part(state, p), mean, p.round(round)))
        return self._joined(states, state, int(state["version"]) + 1)

    def skip(self, state: State, round: Round) -> State:
        states = [p.method.server.skip(self.part(state, p), p.round(round)) for p in self.parts]
        return self._joined(states, state, int(state["version"]) + self._moved(state, states))

    def prepare(self, state: State, g_D: Tensor) -> State:
        states = [
            p.method.server.prepare(self.part(state, p), g_D[p.at])
            if p.method.server.samples
            else self.part(state, p)
            for p in self.parts
        ]
        return self._joined(states, state, int(state["version"]) + self._moved(state, states))

    def _moved(self, state: State, states: Sequence[State]) -> bool:
        """A part has another version than in ``state``."""
        now = [int(own["version"]) for own in states]
        return now != [int(state[f"{p.name}.version"]) for p in self.parts]

    def _seen(self, state: State, seen: int) -> list[int]:
        """Each part's version, when the whole's was ``seen``."""
        first_E = state["behind"][:, 0].contiguous()
        row = int(torch.searchsorted(first_E, seen, right=True)) - 1
        own = [seen - int(n) for n in state["behind"][max(row, 0), 1:]]
        now = [int(state["version"]) - int(state[f"{p.name}.version"]) for p in self.parts]
        if row < 0 or min(own) < 0 or now != state["behind"][-1, 1:].tolist():
            raise MessageError(f"behind: expected a row for version {seen}, and at its end {now}, got others")
        return own

    def download(self, state: State, seen: int) -> Message:
        arrays: dict[str, Tensor] = {}
        passed = int(state["version"]) - seen
        for p, at in zip(self.parts, self._seen(state, seen), strict=True):
            own = self.part(state, p)
            to = int(own["version"])
            if to - at != passed:  # in some of these rounds only other parts changed
                arrays[f"{p.name}.to"] = torch.tensor([to], dtype=torch.int32)
            if to != at:
                arrays |= nest(p.method.server.download(own, at).arrays, f"{p.name}.")
        return Message(arrays)

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for p in self.parts:
            own = p.method.server.downloads()
            if own is None:
                return None
            declared |= {f"{p.name}.{name}": row for name, row in own.items()}
            declared[f"{p.name}.to"] = (torch.int32, ())
        return declared

    def reconcile(self, view: State, message: Message, version: int) -> State:
        states = []
        for p in self.parts:
            own, arrays = self.part(view, p), unnest(message.arrays, f"{p.name}.")
            at = int(own["version"])
            to = at + version - int(view["version"])
            if "to" in arrays:
                told = int(arrays.pop("to")[0])
                if not at <= told <= to:
                    raise MessageError(
                        f"download: {p.name}.to: expected a version from {at} to {to}, got {told}"
                    )
                to = told
            states.append(own if to == at else p.method.server.reconcile(own, Message(arrays), to))
        return self._joined(states, {}, version)

    def facts(self, state: State) -> dict[str, float]:
        return {
            f"{p.name}.{name}": value
            for p in self.parts
            for name, value in p.method.server.facts(self.part(state, p)).items()
        }

    def frozen(self, state: State) -> Tensor | None:
        found = [p.method.server.frozen(self.part(state, p)) for p in self.parts]
        if all(frozen is None for frozen in found):
            return None
        theta_X = state["theta"]
        return torch.cat(
            [
                torch.zeros_like(theta_X[p.at], dtype=torch.bool) if frozen is None else frozen
                for p, frozen in zip(self.parts, found, strict=True)
            ]
        )

    def shared(self, state: State) -> State:
        return {
            f"{p.name}.{name}": value
            for p in self.parts
            for name, value in p.method.server.shared(self.part(state, p)).items()
        }


def _of_kind(mean_S: Tensor, up: Compressor) -> Tensor:
    """A part's mean as its server takes it alone: a sum of votes in integers."""
    return mean_S.to(torch.int32) if up.integer else mean_S


def join(spec: Spec, parts: Sequence[Part]) -> Method:
    """The method of all ``parts``, which cover the vector of ``spec`` in its order; of one part, its own method.

    A pass has the parts with that many passes, counted from the last, since clients keep what the last one leaves.
    """
    if len(parts) == 1:
        return parts[0].method
    most = max(len(p.method.passes) for p in parts)
    passes = []
    for left in range(most, 0, -1):
        taking = [p for p in parts if len(p.method.passes) >= left]
        passes.append(Joint(spec, taking, [p.method.passes[-left] for p in taking]))
    return Method(tuple(passes), JointServer(parts, passes))
