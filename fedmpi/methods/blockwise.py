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

Shape suffixes: C clients or ranks, D parameters, N blocks, R bytes of a block's record.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field as Option
from pydantic import model_validator
from torch import Tensor

from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Merge, Method, Round, State
from fedmpi.methods.base import Entry, FeedbackOptions, Mean, MeanServer, Setup
from fedmpi.methods.blocks import Blocks
from fedmpi.methods.feedback import Feedback
from fedmpi.spec import Spec


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


class Again(Merge):
    """The mean, quantised once more, stochastically, by a key that all ranks have."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__("blocks", blocks.record)
        self.blocks = blocks

    def __call__(
        self, rows_WN: Tensor, start: int, round: Round, optional_WB: Tensor | None = None
    ) -> Tensor:
        blocks = self.blocks
        records_WNR = rows_WN.view(len(rows_WN), -1, blocks.record)
        x_WD = blocks.decode(records_WNR, records_WNR.shape[1] * blocks.block)
        mean_1D = x_WD.mean(0, keepdim=True, dtype=torch.float64).float()  # no sum overflows
        first = start // blocks.record * blocks.block
        key_1 = torch.tensor([round.key("second rounding")])
        return blocks.encode(mean_1D, key_1, first).flatten()


class Blockwise(Compressor):
    """All blocks' records, one after the other; the last block is filled with zeros."""

    def __init__(self, spec: Spec, blocks: Blocks, stochastic: bool) -> None:
        super().__init__(spec)
        self.blocks, self.stochastic = blocks, stochastic
        self.number = blocks.number(spec.size)
        self.merge = Again(blocks)

    def layout(self) -> Layout:
        return {"blocks": Field(torch.uint8, (self.number * self.blocks.record,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        keys_C = ctx.keys("rounding") if self.stochastic else None
        return Message({"blocks": self.blocks.encode(g_CD, keys_C).flatten(1)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        records_CR = message.arrays["blocks"]
        records_CNR = records_CR.view(len(records_CR), self.number, self.blocks.record)
        return self.blocks.decode(records_CNR, self.size), peer


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
