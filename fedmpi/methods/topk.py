"""Top-k sparsification: the k entries of largest magnitude, with bit-packed indices."""

from __future__ import annotations

from pydantic import Field as Option
from torch import Tensor

from fedmpi.method import Context, Method
from fedmpi.methods.base import Entry, FeedbackOptions, Mean, MeanServer, Setup, count_of
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.sparse import Sparse
from fedmpi.ops.select import top_k
from fedmpi.spec import Spec


class TopKOptions(FeedbackOptions):
    ratio: float = Option(0.01, gt=0, le=1, description="k as a share of the parameters")
    k: int | None = Option(None, description="number of values sent; overrides ratio")

    @property
    def separable(self) -> bool:
        return self.k is None


class TopK(Sparse):
    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        return top_k(g_CD, self.k)


def build(options: TopKOptions, spec: Spec, setup: Setup) -> Method:
    up = TopK(spec, count_of("method.k", options.ratio, options.k, spec.size))
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
)
