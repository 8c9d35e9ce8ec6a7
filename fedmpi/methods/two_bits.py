"""Numbers in blocks of 2 bits each: a sign, and one of two magnitudes that the block has. Of sparse messages' values.

Evenly spaced levels would do badly at 2 bits: with 0 among them there are three, without it small numbers become large
ones. Here the magnitudes below the block's mean are sent as their mean, and those above as theirs (one step of Lloyd's
algorithm), so that the error is the deviation from a mean: never larger than what was to be sent, and a residual cannot
grow. Rounded stochastically, the magnitudes are the block's largest and a third of it.

Shape suffixes: C clients, D numbers, N blocks, n entries of a block, R bytes of its record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.errors import MessageError
from fedmpi.ops import bits
from fedmpi.ops.flags import refuse

_SCALES = 4  # bytes: two of bf16
_LARGEST = torch.finfo(torch.bfloat16).max


class TwoBits:
    """Blocks of numbers as records of R bytes: the lower and the upper magnitude, bf16, signs, and which of the two."""

    def __init__(self, block: int) -> None:
        self.block, self._bytes = block, bits.nbytes(block)
        self.record = _SCALES + 2 * self._bytes

    def number(self, size: int) -> int:
        """N, of so many numbers."""
        return -(-size // self.block)

    def encode(self, x_CD: Tensor, keys_C: Tensor | None = None) -> Tensor:
        """Numbers as records, uint8 ``(C, N, R)``, the last of which is filled with zeros; ``keys_C`` round
        stochastically."""
        shape = (len(x_CD), self.number(x_CD.shape[1]), self.block)
        size = shape[1] * self.block
        x_CNn = torch.nn.functional.pad(x_CD, (0, size - x_CD.shape[1])).view(shape)
        u_CNn = None if keys_C is None else random.uniform(keys_C, size, x_CD.device).view(shape)
        return self._encode(x_CNn, u_CNn)

    def _encode(self, x_CNn: Tensor, u_CNn: Tensor | None) -> Tensor:
        x_CNn = x_CNn.nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)
        negative_CNn, size_CNn = x_CNn < 0, x_CNn.abs()
        if u_CNn is None:
            upper_CNn = size_CNn > size_CNn.mean(-1, keepdim=True)
            means = [_mean(size_CNn, where) for where in (~upper_CNn, upper_CNn)]
            scales_CN2 = torch.cat(means, -1).to(torch.bfloat16)
        else:
            # Rounded up, so that no magnitude exceeds it.
            top_CN1 = size_CNn.amax(-1, keepdim=True).mul(1 + 2**-7).clamp(max=_LARGEST).to(torch.bfloat16)
            scales_CN2 = torch.cat([top_CN1 / 3, top_CN1], -1)
            low_CN1, high_CN1 = scales_CN2.float().split(1, -1)
            # Between −lower and lower it is the sign that is drawn, else the magnitude.
            inner_CNn = size_CNn < low_CN1
            below_CNn = torch.where(inner_CNn, -low_CN1, low_CN1)
            width_CNn = torch.where(inner_CNn, 2 * low_CN1, high_CN1 - low_CN1)
            start_CNn = torch.where(inner_CNn, x_CNn, size_CNn) - below_CNn
            up_CNn = u_CNn < start_CNn / width_CNn.where(width_CNn > 0, 1.0)
            negative_CNn = torch.where(inner_CNn, ~up_CNn, negative_CNn)
            upper_CNn = up_CNn & ~inner_CNn
        rows = [
            bits.pack(flags.flatten(0, 1)).unflatten(0, flags.shape[:2])
            for flags in (negative_CNn, upper_CNn)
        ]
        return torch.cat([scales_CN2.contiguous().view(torch.uint8), *rows], -1)

    def decode(self, records_CNR: Tensor, size: int) -> Tensor:
        """The first ``size`` numbers ``(C, size)``.

        Raises:
          MessageError: magnitudes that are none, or in the wrong order.
        """
        scales_CN2 = (
            records_CNR[..., :_SCALES]
            .clone(memory_format=torch.contiguous_format)
            .view(torch.bfloat16)
            .float()
        )
        low_CN1, high_CN1 = scales_CN2.split(1, -1)
        refuse(
            ~((low_CN1 >= 0) & (high_CN1 >= low_CN1) & high_CN1.isfinite()).all(),
            lambda: MessageError("message: expected two finite magnitudes of a block, 0 ≤ lower ≤ upper"),
        )
        packed = records_CNR[..., _SCALES:].split(self._bytes, -1)
        negative_CNn, upper_CNn = (
            bits.unpack(part.flatten(0, 1).contiguous(), self.block).unflatten(0, part.shape[:2]).bool()
            for part in packed
        )
        size_CNn = torch.where(upper_CNn, high_CN1, low_CN1)
        return torch.where(negative_CNn, -size_CNn, size_CNn).flatten(1)[:, :size]


def _mean(x_CNn: Tensor, where_CNn: Tensor) -> Tensor:
    """Of those entries of each block; of none the block's own ``(C, N, 1)``."""
    count_CN1 = where_CNn.sum(-1, keepdim=True)
    sum_CN1 = (x_CNn.double() * where_CNn).sum(-1, keepdim=True)
    mean_CN1 = torch.where(
        count_CN1 > 0, sum_CN1 / count_CN1.clamp(min=1), x_CNn.amax(-1, keepdim=True).double()
    )
    return mean_CN1.float()
