"""LBGM, the look-back gradient multiplier, over any other method.

Source: Azam et al., "Recycling Model Updates in Federated Learning: Are Gradient Subspaces Low-Rank?",
ICLR 2022, Algorithm 1 (all clients) and Algorithm 3 (device sampling). "Over": the inner method's
decoded vector takes the place of the accumulated gradient (section 4, plug-and-play), in the space in
which the inner method sums, so that over subspace coordinates a look-back gradient is d numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field as Option
from pydantic import SerializeAsAny, field_validator
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, State, believed, nest, unnest
from fedmpi.methods.base import Entry, FeedbackOptions, Options, Setup
from fedmpi.methods.feedback import Feedback
from fedmpi.spec import Spec


class LookBackOptions(FeedbackOptions):
    threshold: float = Option(0.2, ge=0, le=1, description="δ: a scalar is sent when sin²α ≤ δ")
    inner: SerializeAsAny[Options] = Option(
        Options(name="dense"), description="the method whose messages it recycles"
    )

    @field_validator("inner", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Options:
        from fedmpi import methods  # the table holds this module: it cannot be imported before it

        return methods.parse_inner(value, "lookback")


class LookBack(Compressor):
    """Sends the look-back coefficient ρ while the gradient's direction hardly changes, else the inner message.

    ρ = ⟨v, l⟩ / ‖l‖² and sin²α = 1 − ⟨v, l⟩² / (‖v‖² ‖l‖²), where v is the decoded inner message and l the
    last one sent in full (the look-back gradient), which both ends keep. A client's first message is sent in
    full, and so is one where v or l has norm zero (ρ and α are undefined).
    """

    def __init__(self, inner: Compressor, threshold: float) -> None:
        super().__init__(inner.spec, inner.size)
        self.inner, self.threshold = inner, threshold
        self.counters = ("scalars", *inner.counters)

    def init(self) -> State:
        return {**self._own(), **nest(self.inner.init())}

    def init_peer(self) -> State:
        return {**self._own(), **nest(self.inner.init_peer())}

    def _own(self) -> State:
        # An empty look-back gradient is all zeros: its norm says that there is none.
        return {"lookback": torch.zeros(self.size)}

    def layout(self) -> Layout:
        inner = {f"inner.{name}": field._replace(ragged=True) for name, field in self.inner.layout().items()}
        return {"scalar": Field(torch.uint8), "rho": Field(torch.float32, (), ragged=True), **inner}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        before, lookback_CS = unnest(state), state["lookback"]
        message, after = self.inner.compress(g_CD, before, ctx)
        v_CS, _ = self.inner.decompress(message, believed(self.inner, before), ctx)
        v_CS = v_CS.float()
        # float64: in float32 the cancellation in 1 − cos² would hide every α below about 0.02.
        v, lb = v_CS.double(), lookback_CS.double()
        dot_C, vv_C, ll_C = (v * lb).sum(1), (v * v).sum(1), (lb * lb).sum(1)
        defined_C = (vv_C > 0) & (ll_C > 0)
        sin2_C = (1 - dot_C * dot_C / (vv_C * ll_C)).clamp(0, 1)
        scalar_C = defined_C & (sin2_C <= self.threshold)
        full = (~scalar_C).nonzero()[:, 0]
        sent = message.select(full)
        ones_C = scalar_C.long()
        arrays = {"scalar": scalar_C.to(torch.uint8), "rho": (dot_C / ll_C)[scalar_C].float()}
        lengths = {"rho": ones_C}
        for name, array in sent.arrays.items():
            arrays[f"inner.{name}"] = array
            rows_C = 1 - ones_C
            if name in sent.lengths:
                rows_C = rows_C.clone()
                rows_C[full] = sent.lengths[name]
            lengths[f"inner.{name}"] = rows_C
        new = {"lookback": torch.where(scalar_C[:, None], lookback_CS, v_CS), **nest(after)}
        return Message(arrays, lengths), new

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        scalar_C = message.arrays["scalar"].bool()
        full = (~scalar_C).nonzero()[:, 0]
        v_CS = peer["lookback"].clone()
        v_CS[scalar_C] *= message.arrays["rho"][:, None]
        new = {
            "lookback": peer["lookback"].clone(),
            **{n: p.clone() for n, p in peer.items() if n != "lookback"},
        }
        if len(full):
            inner = Message(
                unnest(message.arrays),
                {
                    name.removeprefix("inner."): rows_C[full]
                    for name, rows_C in message.lengths.items()
                    if name.startswith("inner.") and self.inner.layout()[name.removeprefix("inner.")].ragged
                },
            )
            inner_peer = {name: value[full] for name, value in unnest(peer).items()}
            decoded, inner_peer = self.inner.decompress(inner, inner_peer, ctx.select(full))
            v_CS[full] = new["lookback"][full] = decoded.float()
            for name, value in nest(inner_peer).items():
                new[name][full] = value
        return v_CS, new

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.inner.lift(v_CS, ctx)

    def count(self, message: Message) -> dict[str, int]:
        return {"scalars": int(message.arrays["scalar"].sum()), **dict.fromkeys(self.inner.counters, 0)}


def build(options: LookBackOptions, spec: Spec, setup: Setup) -> Method:
    from fedmpi import methods

    inner = methods.build(options.inner, spec, setup)
    up = LookBack(inner.up, options.threshold)
    if options.feedback and up.size != spec.size:
        raise ConfigError(
            "method.feedback: expected an inner method that sums D numbers, this one sums fewer"
        )
    return Method(Feedback(up) if options.feedback else up, inner.server)


ENTRY = Entry(
    LookBackOptions,
    build,
    summary="LBGM: a scalar while the direction holds, else the inner message",
    keeps="the look-back gradient: what the inner method sums; at both ends",
    sums="what the inner method sums",
    source="Azam et al. 2022, Algorithms 1 and 3",
    wraps="any",
    example={"threshold": 0.5},
)
