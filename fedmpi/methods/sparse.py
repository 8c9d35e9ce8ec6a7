"""Messages of k values and their bit-packed indices: what the sparsifiers that choose by magnitude send.

Shape suffixes: C clients, D parameters, K values sent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, State
from fedmpi.ops import bits
from fedmpi.spec import Spec


class Sparse(Compressor):
    """Messages of k values and their indices of ceil(log2 D) bits; a subclass chooses the indices."""

    def __init__(self, spec: Spec, k: int) -> None:
        super().__init__(spec)
        self.k, self.width = k, bits.index_width(spec.size)

    @abstractmethod
    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        """Indices to send, int64 ``(C, k)``."""

    def layout(self) -> Layout:
        packed = bits.nbytes(self.k, self.width)
        return {"values": Field(torch.float32, (self.k,)), "index": Field(torch.uint8, (packed,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        index_CK = self.choose(g_CD, ctx)
        arrays = {"values": g_CD.gather(1, index_CK), "index": bits.pack_integers(index_CK, self.width)}
        return Message(arrays), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        values_CK, index_CK = message.arrays["values"], self._index(message)
        return values_CK.new_zeros(len(values_CK), self.size).scatter_(1, index_CK, values_CK), peer

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        rows = zip(total_CS, self._index(message), message.arrays["values"], weights, strict=True)
        for total_S, index_K, values_K, weight in rows:
            total_S.scatter_add_(0, index_K, values_K * weight)
        return peer

    def _index(self, message: Message) -> Tensor:
        index_CK = bits.unpack_integers(message.arrays["index"], self.k, self.width)
        if index_CK.numel() and int(index_CK.max()) >= self.size:
            raise MessageError(f"message: index {int(index_CK.max())}, expected less than {self.size}")
        return index_CK
