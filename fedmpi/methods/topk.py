"""Top-k sparsification: the k entries of largest magnitude, with bit-packed indices."""

from __future__ import annotations

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, State
from fedmpi.methods.base import Entry, FeedbackOptions, MeanServer, Setup, count_of
from fedmpi.methods.feedback import Feedback
from fedmpi.ops import bits
from fedmpi.ops.select import top_k
from fedmpi.spec import Spec


class TopKOptions(FeedbackOptions):
    ratio: float = Option(0.01, gt=0, le=1, description="k as a share of the parameters")
    k: int | None = Option(None, description="number of values sent; overrides ratio")


class Sparse(Compressor):
    """Messages of k values and their indices of ceil(log2 D) bits; a subclass chooses the indices."""

    def __init__(self, spec: Spec, k: int) -> None:
        super().__init__(spec)
        self.k, self.width = k, bits.index_width(spec.size)

    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        """Indices to send, int64 ``(C, k)``."""
        raise NotImplementedError

    def layout(self) -> Layout:
        packed = bits.nbytes(self.k, self.width)
        return {"values": Field(torch.float32, (self.k,)), "index": Field(torch.uint8, (packed,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        index_CK = self.choose(g_CD, ctx)
        arrays = {"values": g_CD.gather(1, index_CK), "index": bits.pack_integers(index_CK, self.width)}
        return Message(arrays), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        values_CK = message.arrays["values"]
        index_CK = bits.unpack_integers(message.arrays["index"], self.k, self.width)
        if index_CK.numel() and int(index_CK.max()) >= self.size:
            raise MessageError(f"message: index {int(index_CK.max())}, expected less than {self.size}")
        return values_CK.new_zeros(len(values_CK), self.size).scatter_(1, index_CK, values_CK), peer


class TopK(Sparse):
    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        return top_k(g_CD, self.k)


def build(options: TopKOptions, spec: Spec, setup: Setup) -> Method:
    up = TopK(spec, count_of("method.k", options.ratio, options.k, spec.size))
    return Method(Feedback(up) if options.feedback else up, MeanServer(spec, setup.optimizer, sparse=True))


ENTRY = Entry(
    TopKOptions,
    build,
    summary="the k values of largest magnitude",
    keeps="D residual with feedback, else nothing",
    sums="D",
    source="Stich et al. 2018; Lin et al. 2018",
    example={"ratio": 0.05, "feedback": True},
)
