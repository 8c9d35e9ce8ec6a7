"""Numbers in blocks that share a scale, 8 or 4 bits each: what blockwise sends, and the sparsifiers where asked to.

Shape suffixes: C clients, N blocks, n entries of a block, R bytes of its record.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.ops.flags import negated, refuse
from fedmpi.ops.quantize import SCALE, from_records, to_records

_NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023),
    1.0,
)


class Blocks:
    """Blocks of numbers as records of R bytes: the scale, float32, and codes of 8 or 4 bits."""

    def __init__(self, bits: int, block: int, normal: bool) -> None:
        self.bits, self.block, self.record = bits, block, SCALE + block * bits // 8
        self.half = 2 ** (bits - 1) - 1  # the code of 0
        self._normal = normal

    def number(self, size: int) -> int:
        """N, of so many numbers."""
        return -(-size // self.block)

    def encode(self, x_CD: Tensor, keys_C: Tensor | None = None, start: int = 0) -> Tensor:
        """Numbers as records, uint8 ``(C, N, R)``, the last of which is filled with zeros; the keys' words from
        ``start`` on round stochastically, None to the nearest level. What is not finite saturates, and shows in what
        the sender keeps of it."""
        levels_L = self._levels(x_CD.device)
        return to_records(x_CD, self.block, self.bits, levels_L, not self._normal, keys_C, start)

    def decode(self, records_CNR: Tensor, size: int) -> Tensor:
        """The first ``size`` numbers ``(C, size)``.

        Raises:
          MessageError: a scale that is no magnitude, or a code without a level.
        """
        levels_L = self._levels(records_CNR.device)
        v_CD, good = from_records(records_CNR, self.block, levels_L, size)
        refuse(negated(good), lambda: self._error(records_CNR))
        return v_CD

    def _error(self, records_CNR: Tensor) -> MessageError:
        scale_CN1 = records_CNR[..., :SCALE].clone(memory_format=torch.contiguous_format).view(torch.float32)
        if not bool(((scale_CN1 >= 0) & scale_CN1.isfinite()).all()):
            return MessageError("message: expected finite scales ≥ 0, got a negative or infinite one or NaN")
        code_CNn, count = records_CNR[..., SCALE:], len(self._levels(records_CNR.device))
        highest = int(code_CNn.max() if self.bits == 8 else torch.maximum(code_CNn & 15, code_CNn >> 4).max())
        return MessageError(f"message: code {highest}, expected less than {count}, the number of levels")

    def _levels(self, device: torch.device) -> Tensor:
        return _levels(self.half, self._normal, device)


@lru_cache
def _levels(half: int, normal: bool, device: torch.device) -> Tensor:
    """What the codes mean of a scale of 1: copied to a device once."""
    return torch.tensor(_NORMAL if normal else [i / half for i in range(-half, half + 1)], device=device)
