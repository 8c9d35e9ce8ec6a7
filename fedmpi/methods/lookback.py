"""LBGM over any method: its row, and the decision tensor by tensor. What it does: :mod:`fedmpi.methods.lookback_codec`.

Shape suffixes: C clients, T tensors, D parameters, S numbers that the inner method sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.message import Layout, Message
from fedmpi.method import Compressor, Context, Method, State, nest, unnest
from fedmpi.methods import table
from fedmpi.methods.base import Entry, Setup
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.lookback_clusters import ClusteredLookBack, ClusterServer
from fedmpi.methods.lookback_codec import LookBack, LookBackOptions
from fedmpi.spec import Spec


class PerTensor(Compressor):
    """One compressor a tensor, each deciding for itself; their messages travel together."""

    def __init__(self, spec: Spec, parts: list[Compressor]) -> None:
        super().__init__(spec, sum(part.size for part in parts))
        self.parts, self.presence = parts, sum(part.presence for part in parts)
        self.counters = ("scalars", "scalar_tensors")

    def init(self) -> State:
        return self._merge([part.init() for part in self.parts])

    def init_peer(self) -> State:
        return self._merge([part.init_peer() for part in self.parts])

    def verify(self, state: State) -> None:
        for i, part in enumerate(self.parts):
            part.verify(unnest(state, f"{i}."))

    @staticmethod
    def _merge(states: list[State]) -> State:
        return {f"{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}

    def layout(self) -> Layout:
        layouts = enumerate(part.layout() for part in self.parts)
        return {f"{i}.{name}": field for i, layout in layouts for name, field in layout.items()}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        arrays: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        states = []
        for i, (part, g) in enumerate(zip(self.parts, g_CD.split(self.spec.sizes, 1), strict=True)):
            message, after = part.compress(g, unnest(state, f"{i}."), ctx.within(i))
            arrays |= nest(message.arrays, f"{i}.")
            lengths |= nest(message.lengths, f"{i}.")
            states.append(after)
        return Message(arrays, lengths), self._merge(states)

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        values, present, states = [], [], []
        for i, part in enumerate(self.parts):
            own = Message(unnest(message.arrays, f"{i}."), unnest(message.lengths, f"{i}."))
            v, after = part.decompress(own, unnest(peer, f"{i}."), ctx.within(i))
            n = v.shape[1] - part.presence
            values.append(v[:, :n])
            present.append(v[:, n:])
            states.append(after)
        return torch.cat(values + present, 1), self._merge(states)

    def count(self, message: Message) -> dict[str, int]:
        scalar_TC = torch.stack([message.arrays[f"{i}.scalar"] for i in range(len(self.parts))])
        return {"scalars": int(scalar_TC.all(0).sum()), "scalar_tensors": int(scalar_TC.sum())}


def build(options: LookBackOptions, spec: Spec, setup: Setup) -> Method:
    if isinstance(options.threshold, tuple) and setup.clients not in (None, len(options.threshold)):
        raise ConfigError(
            f"method.threshold: expected one δ a client, {setup.clients}, got {len(options.threshold)}"
        )
    inner = table.build(options.inner, spec, setup)
    numbers = inner.up.size - inner.up.presence
    if (options.feedback or options.scope == "tensor") and numbers != spec.size:
        which = "feedback" if options.feedback else "scope"
        raise ConfigError(
            f"method.{which}: expected an inner method that sums D numbers, and {options.inner.name} sums fewer; "
            f"take feedback: false and scope: model"
        )
    if options.keep == "clustered":
        if options.feedback or options.scope == "tensor":
            raise ConfigError(
                "method.keep: clustered goes with scope: model and feedback: false, got "
                f"scope: {options.scope} and feedback: {str(options.feedback).lower()}"
            )
        server = ClusterServer(inner.server, inner.up.size, options.clusters)
        return Method((ClusteredLookBack(inner.up, options),), server)
    up: Compressor = LookBack(inner.up, options)
    if options.scope == "tensor":
        named = zip(spec.names, spec.shapes, spec.sizes, strict=True)
        alone = [
            Spec((name,), (shape,)) for name, shape, size in named if size
        ]  # some tensors have no numbers
        whole = Spec(tuple(s.names[0] for s in alone), tuple(s.shapes[0] for s in alone))
        up = PerTensor(whole, [LookBack(table.build(options.inner, s, setup).up, options) for s in alone])
    return Method((Feedback(up) if options.feedback else up,), inner.server, inner.decoder)


ENTRY = Entry(
    LookBackOptions,
    build,
    summary="LBGM: a scalar while the direction holds, else the inner message",
    keeps="the look-back gradient: what the inner method sums; at both ends",
    sums="what the inner method sums",
    source="Azam et al. 2022, Algorithms 1 and 3",
    wraps="any",
    example={"threshold": 0.5},
    variants={
        "per tensor": {"scope": "tensor", "inner": {"name": "topk", "ratio": 0.1, "feedback": True}},
        "kept as sent": {"keep": "message", "inner": {"name": "signsgd"}},
        "clustered": {"keep": "clustered", "clusters": 3},
        "kept in half": {"keep": "half", "threshold": {"delta_sq": 3000.0}},
    },
)
