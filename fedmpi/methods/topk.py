"""Top-k sparsification: the k entries of largest magnitude, with bit-packed or coded indices."""

from __future__ import annotations

from pydantic import Field as Option
from torch import Tensor

from fedmpi.method import Context, Method
from fedmpi.methods.base import Entry, Mean, MeanServer, Setup, count_of
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.sparse import Indices, Sparse, SparseOptions
from fedmpi.ops.select import top_k
from fedmpi.spec import Spec


class TopKOptions(SparseOptions):
    indices: Indices = Option(
        "packed", description="packed: ceil(log2 D) bits an index; coded: little more than their entropy"
    )


class TopK(Sparse):
    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        return top_k(g_CD, self.k)


def build(options: TopKOptions, spec: Spec, setup: Setup) -> Method:
    k = count_of("method.k", options.ratio, options.k, spec.size)
    up = TopK(spec, k, options.values, options.indices)
    return Method(
        (Feedback(up) if options.feedback else up,), MeanServer(spec, setup.optimizer, sparse=True), Mean()
    )


ENTRY = Entry(
    TopKOptions,
    build,
    summary="the k values of largest magnitude",
    keeps="D residual with feedback, else nothing",
    sums="D",
    source="Stich et al. 2018; Lin et al. 2018",
    example={"ratio": 0.05, "feedback": True},
    variants={
        "coded": {"values": "bf16", "indices": "coded"},
        "coded, 4 bits": {"values": "int4", "indices": "coded", "ratio": 0.3, "feedback": False},
    },
)
