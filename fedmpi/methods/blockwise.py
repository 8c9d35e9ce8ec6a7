"""Block-wise quantisation: 8 or 4 bits an entry, and a scale for each block of entries.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022: x_i = s · q_i with s the block's
largest magnitude, so that an outlier spoils its own block only. Levels are evenly spaced (``linear``: 255 or 15 of them
from −1 to 1), or the 16 of NF4 (``normal``: Dettmers et al., "QLoRA", NeurIPS 2023, appendix E), which a normal
variable takes about equally often. Both have 0 and ±1. Rounding is to the nearest level, or stochastic: to one of the
two around x_i/s, drawn so that its expectation is x_i/s (Alistarh et al. 2017).

Ranks share out the averaging: each decodes and averages its part of all messages, quantises the mean once more and
sends that to all, 2(W−1)/W · D · (b/8 + 4/block) bytes a rank. The second rounding is stochastic always, drawn from a
key of the round, so that it has no bias that would add up; feedback knows of the first only.

Feedback wants the nearest level: as 0 is one, no error is larger than its entry, while that of stochastic rounding may
be larger than the block.

Shape suffixes: C clients or ranks, D parameters, N blocks, n entries of a block, R bytes of its record.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field as Option
from pydantic import model_validator
from torch import Tensor

from fedmpi import random
from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Merge, Method, Round, State
from fedmpi.methods.base import Entry, FeedbackOptions, Mean, MeanServer, Setup
from fedmpi.methods.feedback import Feedback
from fedmpi.spec import Spec

_NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023),
    1.0,
)
_SCALE = 4  # bytes


class BlockwiseOptions(FeedbackOptions):
    bits: Literal[4, 8] = Option(8, description="b, bits an entry")
    levels: Literal["linear", "normal"] = Option(
        "linear", description="linear: evenly spaced; normal: NF4's 16, as a normal variable lies (4 bits)"
    )
    block: int = Option(256, ge=2, multiple_of=2, description="entries that share a scale of 4 bytes")
    rounding: Literal["stochastic", "nearest"] | None = Option(
        None,
        description="stochastic: unbiased; nearest: half the error (default: nearest with feedback, else stochastic)",
    )

    @model_validator(mode="after")
    def _fits(self) -> BlockwiseOptions:
        if self.levels == "normal" and self.bits != 4:
            raise ValueError(f"levels: expected linear with bits: {self.bits}, got normal, which has 16")
        if self.feedback and self.rounding == "stochastic":
            raise ValueError(
                "rounding: expected nearest with feedback, got stochastic, whose error may be larger than what was to "
                "be sent, so that a residual grows"
            )
        return self

    @property
    def separable(self) -> bool:
        return True

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic" or (self.rounding is None and not self.feedback)


class Blocks:
    """Blocks of numbers as records of R bytes: the scale, float32, and codes of 8 or 4 bits."""

    def __init__(self, bits: int, block: int, normal: bool) -> None:
        self.bits, self.block, self.record = bits, block, _SCALE + block * bits // 8
        self.half = 2 ** (bits - 1) - 1  # the code of 0
        even = [i / self.half for i in range(-self.half, self.half + 1)]
        self._levels = torch.tensor(_NORMAL if normal else even)
        self._normal = normal

    def encode(self, x_CNn: Tensor, u_CNn: Tensor | None) -> Tensor:
        """Finite numbers as records, uint8 ``(C, N, R)``; ``u_CNn`` in [0, 1) rounds stochastically, None to the
        nearest level."""
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
        levels = self._levels.to(x_CNn.device)
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
        scale_CN1 = records_CNR[..., :_SCALE].contiguous().view(torch.float32)
        if not bool(((scale_CN1 >= 0) & scale_CN1.isfinite()).all()):
            raise MessageError("message: expected finite scales ≥ 0, got a negative or infinite one or NaN")
        code_CNn = records_CNR[..., _SCALE:]
        if self.bits == 4:
            code_CNn = torch.stack([code_CNn & 15, code_CNn >> 4], -1).flatten(-2)
        if code_CNn.numel() and int(code_CNn.max()) >= len(self._levels):
            raise MessageError(
                f"message: code {int(code_CNn.max())}, expected less than {len(self._levels)}, the number of levels"
            )
        return self._levels.to(scale_CN1.device)[code_CNn.int()] * scale_CN1


class Again(Merge):
    """The mean, quantised once more, stochastically, by a key that all ranks have."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__("blocks", blocks.record)
        self.blocks = blocks

    def __call__(
        self, rows_WN: Tensor, start: int, round: Round, optional_WB: Tensor | None = None
    ) -> Tensor:
        blocks = self.blocks
        x_WNn = blocks.decode(rows_WN.view(len(rows_WN), -1, blocks.record))
        mean_1Nn = x_WNn.mean(0, keepdim=True, dtype=torch.float64).float()  # no sum overflows
        first = start // blocks.record * blocks.block
        words = random.bits(round.key("second rounding"), mean_1Nn.numel(), first, device=rows_WN.device)
        u_1Nn = ((words >> 40) & ((1 << 24) - 1)).float().mul_(2.0**-24).view_as(mean_1Nn)
        return blocks.encode(mean_1Nn, u_1Nn).flatten()


class Blockwise(Compressor):
    """All blocks' records, one after the other; the last block is filled with zeros."""

    def __init__(self, spec: Spec, blocks: Blocks, stochastic: bool) -> None:
        super().__init__(spec)
        self.blocks, self.stochastic = blocks, stochastic
        self.number = -(-spec.size // blocks.block)
        self.merge = Again(blocks)

    def layout(self) -> Layout:
        return {"blocks": Field(torch.uint8, (self.number * self.blocks.record,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        size = self.number * self.blocks.block
        x_CD = torch.nn.functional.pad(g_CD, (0, size - self.size))
        shape = (len(g_CD), self.number, self.blocks.block)
        u = random.uniform(ctx.keys("rounding"), size).view(shape) if self.stochastic else None
        return Message({"blocks": self.blocks.encode(x_CD.view(shape), u).flatten(1)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        records_CR = message.arrays["blocks"]
        x_CNn = self.blocks.decode(records_CR.view(len(records_CR), self.number, self.blocks.record))
        return x_CNn.flatten(1)[:, : self.size], peer


def build(options: BlockwiseOptions, spec: Spec, setup: Setup) -> Method:
    blocks = Blocks(options.bits, options.block, options.levels == "normal")
    up = Blockwise(spec, blocks, options.stochastic)
    return Method((Feedback(up) if options.feedback else up,), MeanServer(spec, setup.optimizer), Mean())


ENTRY = Entry(
    BlockwiseOptions,
    build,
    summary="8 or 4 bits a parameter and a scale a block",
    keeps="nothing (D residual with feedback)",
    sums="D",
    source="Dettmers et al. 2022 (blocks), 2023 (NF4)",
    example={"block": 64},
    variants={
        "4 bits": {"bits": 4},
        "normal": {"bits": 4, "levels": "normal"},
        "nearest": {"bits": 4, "rounding": "nearest"},
    },
)
