"""SparseLoCo: the largest entries of each chunk, 2 bits a value, and a residual that decays in place of outer momentum.

Source: Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", arXiv:2508.15706, 2025; read were its
abstract and public summaries of its algorithm, not the paper itself or its code. With Δ how far a rank went in H local
steps,

    e ← β e + Δ,   Δ̂ = Q(top-k of each chunk of e),   e ← e − Δ̂,   θ ← θ − α · mean of the ranks' Δ̂,

so that what was not sent is forgotten at the rate β: the residual is each rank's own momentum, and the outer rule has
none. Any rule but sgd is refused. How Q rounds to 2 bits is not said there: here as in :mod:`fedmpi.methods.two_bits`.
The defaults of β, the chunk's length and k are not the authors' word either.

Chunks are of consecutive entries, the last one is shorter. Indices are coded over the whole vector.

Shape suffixes: C clients, D parameters, N chunks, n entries of a chunk, K values sent.
"""

from __future__ import annotations

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.method import Context, Method
from fedmpi.methods.base import Entry, Mean, MeanServer, Options, Setup
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.sparse import Indices, Sparse
from fedmpi.methods.values import Kind
from fedmpi.ops.select import top_k
from fedmpi.spec import Spec


class SparseLoCoOptions(Options):
    ratio: float = Option(0.03, gt=0, le=1, description="k as a share of a chunk")
    chunk: int = Option(4096, ge=1, le=1 << 24, description="entries among which k are chosen")
    beta: float = Option(
        0.95, ge=0, le=1, description="β, what is left of the residual after a synchronisation"
    )
    values: Kind = Option("int2", description="how values travel; int8, int4, int2: with 4 bytes for each 64")
    indices: Indices = Option(
        "coded", description="packed: ceil(log2 D) bits; coded: little more than their entropy"
    )

    @property
    def separable(self) -> bool:
        return True

    @property
    def own_momentum(self) -> bool:
        return True


class Chunked(Sparse):
    """The k entries of largest magnitude of each chunk."""

    def __init__(self, spec: Spec, options: SparseLoCoOptions) -> None:
        self._length = min(options.chunk, max(1, spec.size))
        self._whole, self._rest = divmod(spec.size, self._length)
        self._each, self._last = (max(1, round(options.ratio * n)) for n in (self._length, self._rest))
        count = self._whole * self._each + (self._last if self._rest else 0)
        super().__init__(spec, count, options.values, options.indices)

    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        clients, end = len(g_CD), self._whole * self._length
        chunks = g_CD[:, :end].reshape(clients * self._whole, self._length)
        index_NK = top_k(chunks, self._each).view(clients, self._whole, self._each)
        starts_N1 = torch.arange(self._whole, device=g_CD.device)[:, None] * self._length
        index_CK = (index_NK + starts_N1).flatten(1)
        if not self._rest:
            return index_CK
        return torch.cat([index_CK, top_k(g_CD[:, end:], self._last) + end], 1)


def build(options: SparseLoCoOptions, spec: Spec, setup: Setup) -> Method:
    """SparseLoCo for a layout.

    Raises:
      ConfigError: the server has a momentum of its own.
    """
    if setup.optimizer.name != "sgd":
        raise ConfigError(
            "server.optimizer: expected sgd with sparseloco, whose decaying residual stands for outer momentum, got "
            f"{setup.optimizer.name}"
        )
    up = Feedback(Chunked(spec, options), options.beta)
    return Method((up,), MeanServer(spec, setup.optimizer, sparse=True), Mean())


ENTRY = Entry(
    SparseLoCoOptions,
    build,
    summary="the k largest values of each chunk in 2 bits, a decaying residual",
    keeps="D residual",
    sums="D",
    source="Sarfi et al. 2025 (public descriptions)",
    example={"ratio": 0.1, "chunk": 64},
    variants={"packed": {"indices": "packed", "values": "bf16"}},
)
