"""Random-k sparsification: k coordinates drawn by the client's key, so that no index travels.

Source: Konečný et al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016
("subsampling", a pattern from a seed, fresh for each client and round, values scaled to an unbiased mean);
with feedback and unscaled rand_k of Stich et al., "Sparsified SGD with Memory", NeurIPS 2018. The draw is
exactly k different coordinates, each as likely as any other.

Shape suffixes: C clients, D parameters, K values sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.message import Layout, Message
from fedmpi.method import Compressor, Context, Method, State
from fedmpi.methods.base import Entry, Mean, MeanServer, Setup, count_of
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.sparse import SparseOptions
from fedmpi.methods.values import BLOCKED, Kind, Values
from fedmpi.ops import pages
from fedmpi.spec import Spec


class RandomKOptions(SparseOptions):
    scale: Literal["unbiased", "none"] | None = Option(
        None,
        description="unbiased: values are multiplied by D/k; none: they are taken as they are "
        "(default: none with feedback, else unbiased)",
    )


class RandomK(Compressor):
    """Sends the k values at coordinates that both ends draw; each stands for ``factor`` times itself.

    With ``factor`` D/k the decoded vector's mean over the draws is the gradient, and its variance
    (D/k − 1)‖g‖². Linear for a given key, but not additive: another client's key draws other coordinates. With
    ``unbiased``, values in blocks are rounded stochastically.
    """

    replayable = False  # the coordinates are those of the round in which it was sent

    def __init__(
        self, spec: Spec, k: int, factor: float, values: Kind = "float32", unbiased: bool = False
    ) -> None:
        super().__init__(spec)
        self.k, self.factor, self.values, self.unbiased = k, factor, Values(values, k), unbiased

    def _coordinates(self, ctx: Context, device: torch.device) -> Tensor:
        """int64 ``(C, k)``, a function of each client's key."""
        drawn = [random.sample(key, self.size, self.k, device) for key in ctx.keys("coordinates").tolist()]
        return torch.stack(drawn) if drawn else torch.empty(0, self.k, dtype=torch.int64, device=device)

    def layout(self) -> Layout:
        return self.values.layout()

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        values_CK = g_CD.gather(1, self._coordinates(ctx, g_CD.device))
        keys_C = ctx.keys("rounding") if self.unbiased else None
        return Message({"values": self.values.encode(values_CK, keys_C)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        values_CK = self.values.decode(message.arrays["values"]) * self.factor
        v_CD = pages.zeros(len(values_CK), self.size, device=values_CK.device)
        return v_CD.scatter_(1, self._coordinates(ctx, v_CD.device), values_CK), peer

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        values_CK = self.values.decode(message.arrays["values"]) * self.factor
        index_CK = self._coordinates(ctx, values_CK.device)
        for total_S, index_K, values_K, weight in zip(total_CS, index_CK, values_CK, weights, strict=True):
            # Different places: as if a vector of zeros elsewhere were added, to the bit.
            total_S.index_copy_(0, index_K, total_S[index_K].add_(values_K, alpha=weight))
        return peer


def build(options: RandomKOptions, spec: Spec, setup: Setup) -> Method:
    """Random-k for a layout.

    Raises:
      ConfigError: k does not lie in 1 … D, or feedback is asked for with ``scale: unbiased``.
    """
    k = count_of("method.k", options.ratio, options.k, spec.size)
    if options.feedback and options.scale == "unbiased":
        raise ConfigError(
            "method.scale: expected none with feedback, got unbiased; a value that is sent D/k times too "
            "large leaves a residual of 1 − D/k times itself, which grows from round to round"
        )
    unbiased = not options.feedback and options.scale != "none"
    rounded = options.values in BLOCKED and not options.feedback
    up = RandomK(spec, k, spec.size / k if unbiased else 1.0, options.values, rounded)
    return Method(
        (Feedback(up) if options.feedback else up,), MeanServer(spec, setup.optimizer, sparse=True), Mean()
    )


ENTRY = Entry(
    RandomKOptions,
    build,
    summary="k values at coordinates drawn by the client's key; no indices travel",
    keeps="nothing (D residual with feedback)",
    sums="D",
    source="Konečný et al. 2016; Stich et al. 2018 (with feedback)",
    example={"ratio": 0.1},
    variants={"4 bits": {"values": "int4"}},
)
