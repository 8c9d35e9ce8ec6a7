"""Error feedback: what was not sent is added to the next (Stich et al. 2018, Karimireddy et al. 2019), or a part β."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.message import Layout, Message
from fedmpi.method import Compressor, Context, State, believed, nest, unnest
from fedmpi.ops import fast


class Feedback(Compressor):
    """p = g + β e is compressed, and e ← p − (what the receiver decodes) is kept: D numbers a client."""

    def __init__(self, inner: Compressor, beta: float = 1.0) -> None:
        if inner.size - inner.presence != inner.spec.size or inner.integer:
            raise ConfigError(
                "method.feedback: expected a method whose message decodes to a gradient "
                "(topk, signsgd with vote: mean, …); this one's does not, set feedback: false"
            )
        super().__init__(inner.spec, inner.size)
        self._beta = beta
        self.inner, self.presence, self.optional = inner, inner.presence, inner.optional
        self.counters, self.replayable, self.merge = inner.counters, inner.replayable, inner.merge
        self.tells = inner.tells  # e is finite: p is if g is, but for an overflow

    def init(self) -> State:
        return {"residual": torch.zeros(self.spec.size), **nest(self.inner.init())}

    def init_peer(self) -> State:
        return nest(self.inner.init_peer())

    def verify(self, state: State) -> None:
        self.inner.verify(unnest(state))

    def layout(self) -> Layout:
        return self.inner.layout()

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        residual_CD, before = state["residual"], unnest(state)
        p_CD = torch.add(g_CD, residual_CD, alpha=self._beta, out=fast.fresh(residual_CD))
        message, after = self.inner.compress(p_CD, before, ctx)
        if before or self.presence:  # what keeps something may keep p itself
            sent_CD, _ = self.inner.decompress(message, believed(self.inner, before), ctx)
            return message, {"residual": p_CD - sent_CD[:, : self.spec.size], **nest(after)}
        self.inner.add(p_CD, message, {}, ctx, [-1.0] * len(p_CD))
        return message, {"residual": p_CD}

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        v_CD, after = self.inner.decompress(message, unnest(peer), ctx)
        return v_CD, nest(after)

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        return nest(self.inner.add(total_CS, message, unnest(peer), ctx, weights))

    def count(self, message: Message) -> dict[str, int]:
        return self.inner.count(message)
