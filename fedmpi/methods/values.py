"""How the k values of a sparse message travel: as they are, in bf16, or in blocks of 8, 4 or 2 bits.

Shape suffixes: C clients, K values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout
from fedmpi.methods.blocks import Blocks
from fedmpi.methods.two_bits import TwoBits
from fedmpi.ops.flags import refuse

Kind = Literal["float32", "bf16", "int8", "int4", "int2"]
BLOCKED = ("int8", "int4", "int2")
_BLOCK = 64  # values that share 4 bytes of scales: half a bit each


class Values:
    """K values of each client.

    Attributes:
      count: K.
    """

    def __init__(self, kind: Kind, count: int) -> None:
        self.kind, self.count = kind, count
        block = min(_BLOCK, count + count % 2)
        self._blocks: Blocks | TwoBits | None = None
        if kind in BLOCKED:
            self._blocks = TwoBits(block) if kind == "int2" else Blocks(int(kind[3:]), block, normal=False)
        self._number = 0 if self._blocks is None else self._blocks.number(count)

    def layout(self) -> Layout:
        if self._blocks is not None:
            return {"values": Field(torch.uint8, (self._number * self._blocks.record,))}
        return {"values": Field(torch.bfloat16 if self.kind == "bf16" else torch.float32, (self.count,))}

    def encode(self, values_CK: Tensor, keys_C: Tensor | None = None) -> Tensor:
        """The array of finite values; ``keys_C`` round what is in blocks stochastically."""
        if self._blocks is not None:
            return self._blocks.encode(values_CK, keys_C).flatten(1)
        if self.kind == "bf16":
            largest = torch.finfo(torch.bfloat16).max
            return values_CK.clamp(-largest, largest).to(torch.bfloat16)
        return values_CK

    def decode(self, array: Tensor) -> Tensor:
        """Float32 ``(C, K)``.

        Raises:
          MessageError: what no sender can have sent.
        """
        if self._blocks is not None:
            records_CNR = array.view(len(array), self._number, self._blocks.record)
            return self._blocks.decode(records_CNR, self.count)
        if self.kind == "bf16":
            values_CK = array.float()
            refuse(
                ~values_CK.isfinite().all(),
                lambda: MessageError(
                    "message: expected finite values (senders saturate), got infinity or NaN"
                ),
            )
            return values_CK
        return array
