"""Messages of k values and their indices: what the sparsifiers that choose by magnitude send.

Indices are packed to ceil(log2 D) bits each, or coded: as they increase, l low bits of each follow as they are, and the
high parts h_i as the positions h_i + i of the ones in a bit map (Elias, "Efficient Storage and Retrieval by Content and
Address of Static Files", J. ACM 1974; Fano 1971), k (l + 1) + D/2^l bits with the best l. At 1 % that is 8.6 bits an
index instead of 23, half a bit above the entropy. Golomb-Rice codes of the gaps take a little less on average, but
another number of bits in every message: here it follows from k and D, so that ranks exchange rows and send no lengths.

Shape suffixes: C clients, D parameters, K values sent, U bits of the map.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, State
from fedmpi.methods.base import FeedbackOptions
from fedmpi.methods.values import Kind, Values
from fedmpi.ops import bits, fast, pages
from fedmpi.ops.flags import refuse
from fedmpi.ops.select import places
from fedmpi.spec import Spec

Indices = Literal["packed", "coded"]


class SparseOptions(FeedbackOptions):
    """Options of a method that sends k values."""

    ratio: float = Option(0.01, gt=0, le=1, description="k as a share of the parameters")
    k: int | None = Option(None, description="number of values sent; overrides ratio")
    values: Kind = Option(
        "float32", description="how values travel; int8, int4, int2: with scales of 4 bytes for each 64"
    )

    @property
    def rate_note(self) -> str:
        late = "the usual one; what is sent comes late and at once, so that it has to be warmed up over 1/ratio steps"
        return late if self.feedback else "the usual one, for the few coordinates that are sent"

    @property
    def separable(self) -> bool:
        return self.k is None


class Coder:
    """K increasing indices below D, as arrays of a message."""

    def __init__(self, how: Indices, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.width, self.map = bits.index_width(size), 0
        if how == "coded":
            # Of l low bits the high parts are below D / 2^l, and the last one is followed by nothing.
            lengths = {low: count * low + count + ((size - 1) >> low) for low in range(self.width + 1)}
            self.width = min(lengths, key=lambda low: lengths[low])
            self.map = count + ((size - 1) >> self.width)

    def layout(self) -> Layout:
        low = {"index": Field(torch.uint8, (bits.nbytes(self.count, self.width),))}
        return low | ({"map": Field(torch.uint8, (bits.nbytes(self.map),))} if self.map else {})

    def encode(self, index_CK: Tensor) -> dict[str, Tensor]:
        if not self.map:
            return {"index": bits.pack_integers(index_CK, self.width)}
        place_CK = (index_CK >> self.width) + torch.arange(self.count, device=index_CK.device)
        map_CU = torch.zeros(len(index_CK), self.map, dtype=torch.bool, device=index_CK.device)
        low_CK = index_CK & ((1 << self.width) - 1)
        return {
            "index": bits.pack_integers(low_CK, self.width),
            "map": bits.pack(map_CU.scatter_(1, place_CK, True)),
        }

    def decode(self, message: Message) -> Tensor:
        """int64 ``(C, K)``.

        Raises:
          MessageError: an index beyond the vector, or a map of another number of them.
        """
        index_CK = bits.unpack_integers(message.arrays["index"], self.count, self.width)
        if self.map:
            map_CU = bits.unpack(message.arrays["map"], self.map)
            counts_C = map_CU.sum(1)
            if not fast.waits(map_CU):
                refuse((counts_C != self.count).any(), lambda: self._error(index_CK[:0], counts_C))
            place_CK = places(map_CU, self.count)
            high_CK = place_CK - torch.arange(self.count, device=place_CK.device)
            index_CK = index_CK | (high_CK << self.width)
        told_CK, wrong = index_CK, (index_CK >= self.size).any()
        if self.map:  # both questions as one
            wrong = wrong | (counts_C != self.count).any()
        refuse(wrong, lambda: self._error(told_CK, counts_C if self.map else None))
        return index_CK.clamp(0, self.size - 1) if fast.waits(index_CK) else index_CK

    def _error(self, index_CK: Tensor, counts_C: Tensor | None) -> MessageError:
        if counts_C is not None and bool((counts_C != self.count).any()):
            wrong = int(counts_C[counts_C != self.count][0])
            return MessageError(f"message: a map of {wrong} indices, expected {self.count}")
        return MessageError(f"message: index {int(index_CK.max())}, expected less than {self.size}")


class Sparse(Compressor):
    """Messages of k values and their indices; a subclass chooses the indices."""

    def __init__(self, spec: Spec, k: int, values: Kind = "float32", indices: Indices = "packed") -> None:
        super().__init__(spec)
        self.k, self.values, self.coder = k, Values(values, k), Coder(indices, k, spec.size)

    @abstractmethod
    def choose(self, g_CD: Tensor, ctx: Context) -> Tensor:
        """Indices to send, int64 ``(C, k)``."""

    def layout(self) -> Layout:
        return self.values.layout() | self.coder.layout()

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        index_CK = self.choose(g_CD, ctx)
        if self.coder.map:
            index_CK = index_CK.sort(1).values
        values = self.values.encode(g_CD.gather(1, index_CK))
        return Message({"values": values, **self.coder.encode(index_CK)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        values_CK, index_CK = self._decoded(message)
        v_CD = pages.zeros(len(values_CK), self.size, device=values_CK.device)
        return v_CD.scatter_(1, index_CK, values_CK), peer

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        values_CK, index_CK = self._decoded(message)
        for total_S, index_K, values_K, weight in zip(total_CS, index_CK, values_CK, weights, strict=True):
            total_S.scatter_add_(0, index_K, values_K * weight)
        return peer

    def _decoded(self, message: Message) -> tuple[Tensor, Tensor]:
        return self.values.decode(message.arrays["values"]), self.coder.decode(message)
