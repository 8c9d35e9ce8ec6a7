"""Numbers in blocks that share a scale, 8 or 4 bits each: what blockwise sends, and the sparsifiers where asked to.

Shape suffixes: C clients, N blocks, n entries of a block, R bytes of its record.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.ops import fast
from fedmpi.ops.flags import refuse

_NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023),
    1.0,
)
_SCALE = 4  # bytes


class Blocks:
    """Blocks of numbers as records of R bytes: the scale, float32, and codes of 8 or 4 bits."""

    def __init__(self, bits: int, block: int, normal: bool) -> None:
        self.bits, self.block, self.record = bits, block, _SCALE + block * bits // 8
        self.half = 2 ** (bits - 1) - 1  # the code of 0
        self._normal = normal

    def encode(self, x_CNn: Tensor, u_CNn: Tensor | None) -> Tensor:
        """Numbers as records, uint8 ``(C, N, R)``; ``u_CNn`` in [0, 1) rounds stochastically, None to the nearest
        level. What is not finite saturates, and shows in what the sender keeps of it."""
        x_CNn = x_CNn.nan_to_num(0.0)
        scale_CN1 = x_CNn.abs().amax(-1, keepdim=True)
        # No magnitude exceeds its scale; in a block of zeros any divisor does.
        x_CNn = x_CNn / scale_CN1.where(scale_CN1 > 0, 1.0)
        code_CNn = (self._uneven if self._normal else self._even)(x_CNn, u_CNn).to(torch.uint8)
        if self.bits == 4:
            code_CNn = code_CNn[..., ::2] | (code_CNn[..., 1::2] << 4)
        return torch.cat([scale_CN1.contiguous().view(torch.uint8), code_CNn], -1)

    def _even(self, x_CNn: Tensor, u_CNn: Tensor | None) -> Tensor:
        x_CNn = x_CNn * self.half
        if u_CNn is None:
            return x_CNn.round_().add_(self.half)
        low_CNn = x_CNn.floor()
        return low_CNn.add_(u_CNn < x_CNn - low_CNn).add_(self.half)

    def _uneven(self, x_CNn: Tensor, u_CNn: Tensor | None) -> Tensor:
        levels = self._levels(x_CNn.device)
        if u_CNn is None:
            return torch.bucketize(x_CNn, (levels[1:] + levels[:-1]) / 2)
        low_CNn = (torch.bucketize(x_CNn, levels, right=True) - 1).clamp_(0, len(levels) - 2)
        below_CNn = levels[low_CNn]
        return low_CNn + (u_CNn < (x_CNn - below_CNn) / (levels[low_CNn + 1] - below_CNn))

    def decode(self, records_CNR: Tensor) -> Tensor:
        """The numbers ``(C, N, n)``.

        Raises:
          MessageError: a scale that is no magnitude, or a code without a level.
        """
        # A copy: of a single block the slice is contiguous as it is, with strides that no float32 has.
        scale_CN1 = records_CNR[..., :_SCALE].clone(memory_format=torch.contiguous_format).view(torch.float32)
        code_CNn = records_CNR[..., _SCALE:]
        if self.bits == 4:
            code_CNn = torch.stack([code_CNn & 15, code_CNn >> 4], -1).flatten(-2)
        levels = self._levels(scale_CN1.device)
        good = ((scale_CN1 >= 0) & scale_CN1.isfinite()).all()
        refuse(~(good & (code_CNn < len(levels)).all()), lambda: self._error(good, code_CNn))
        code_CNn = code_CNn.clamp(max=len(levels) - 1) if fast.waits(code_CNn) else code_CNn
        return levels[code_CNn.int()] * scale_CN1

    def _error(self, good: Tensor, code_CNn: Tensor) -> MessageError:
        if not bool(good):
            return MessageError("message: expected finite scales ≥ 0, got a negative or infinite one or NaN")
        count = len(self._levels(code_CNn.device))
        return MessageError(
            f"message: code {int(code_CNn.max())}, expected less than {count}, the number of levels"
        )

    def _levels(self, device: torch.device) -> Tensor:
        return _levels(self.half, self._normal, device)


@lru_cache
def _levels(half: int, normal: bool, device: torch.device) -> Tensor:
    """What the codes mean of a scale of 1: copied to a device once."""
    return torch.tensor(_NORMAL if normal else [i / half for i in range(-half, half + 1)], device=device)
