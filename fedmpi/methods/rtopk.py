"""rTop-k sparsification: k random ones of the r entries of largest magnitude, with bit-packed or coded indices.

Source: Barnes et al., "rTop-k: A Statistical Estimation Approach to Distributed SGD", 2020; "Stationarity of
crucial gradients", sections 2.2 and 3.3: r = k is top-k, r = D is random-k with indices. Values are
sent as they are, so the decoded vector is biased; error feedback makes up for it.

Shape suffixes: C clients, D parameters, R candidates, K values sent.
"""

from __future__ import annotations

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.method import Context, Method
from fedmpi.methods.base import Entry, Mean, MeanServer, Setup, count_of
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.sparse import Indices, Sparse
from fedmpi.methods.topk import TopKOptions
from fedmpi.methods.values import Kind
from fedmpi.ops.select import top_k
from fedmpi.spec import Spec

# The stationarity paper's figure 8 has its best accuracy at r ≈ 500 for k = 40, on a flat summit.
_CANDIDATES = 10


class RTopKOptions(TopKOptions):
    r: int | None = Option(
        None, description="number of candidates, from k to D (default: 10 k, at most D parameters)"
    )

    @property
    def separable(self) -> bool:
        return self.k is None and self.r is None


class RTopK(Sparse):
    """A fresh draw of k out of the r candidates, by the client's key."""

    def __init__(
        self, spec: Spec, k: int, r: int, values: Kind = "float32", indices: Indices = "packed"
    ) -> None:
        super().__init__(spec, k, values, indices)
        self.r = r

    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        keys = ctx.keys("candidates").tolist()
        drawn = [random.sample(key, self.r, self.k, g_CD.device) for key in keys]
        return top_k(g_CD, self.r).gather(1, torch.stack(drawn))


def build(options: RTopKOptions, spec: Spec, setup: Setup) -> Method:
    """rTop-k for a layout.

    Raises:
      ConfigError: k does not lie in 1 … D, or r not in k … D.
    """
    k = count_of("method.k", options.ratio, options.k, spec.size)
    r = min(_CANDIDATES * k, spec.size) if options.r is None else options.r
    if not k <= r <= spec.size:
        raise ConfigError(f"method.r: expected k = {k} to D = {spec.size} (the model's parameters), got {r}")
    up = RTopK(spec, k, r, options.values, options.indices)
    return Method(
        (Feedback(up) if options.feedback else up,), MeanServer(spec, setup.optimizer, sparse=True), Mean()
    )


ENTRY = Entry(
    RTopKOptions,
    build,
    summary="k random ones of the r values of largest magnitude",
    keeps="D residual with feedback, else nothing",
    sums="D",
    source="Barnes et al. 2020",
    example={"ratio": 0.05, "feedback": True},
    variants={"coded": {"values": "int8", "indices": "coded"}},
)
