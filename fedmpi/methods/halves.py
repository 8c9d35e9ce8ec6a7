"""Half-precision gradients, 2 bytes a parameter: IEEE binary16 (fp16) and bfloat16 (bf16).

Values are rounded to the nearest (ties to even) and summed as float32. What lies beyond the type's
largest number (fp16: 65504; bf16: 3.39·10^38) is sent as that number, never as infinity; what fp16
cannot hold below (2^-25 ≈ 3·10^-8 and less) is sent as 0. Both are made up for by error feedback, which
is sound here: the residual is never larger than what was to be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Merge, Method, Round, State
from fedmpi.methods.base import Entry, FeedbackOptions, Mean, MeanServer, Setup
from fedmpi.methods.feedback import Feedback
from fedmpi.ops import fast, halves
from fedmpi.ops.flags import Flag, negated, refuse
from fedmpi.ops.sums import finite
from fedmpi.spec import Spec

_ODD = "message: expected finite values (senders saturate), got infinity or NaN"


class HalfOptions(FeedbackOptions):
    @property
    def separable(self) -> bool:
        return True


class Rounded(Merge):
    """The mean, rounded as messages are."""

    def __call__(
        self, rows_WN: Tensor, start: int, round: Round, optional_WB: Tensor | None = None
    ) -> Tensor:
        mean_N = rows_WN.float().mean(0)
        if fast.waits(mean_N) or not finite(mean_N):
            # bf16 reaches as far as float32, whose sums may overflow. Of such numbers a 65536th is exact.
            less_N = rows_WN.float().mul_(2.0**-16).mean(0).mul_(2.0**16)
            mean_N = torch.where(mean_N.isfinite(), mean_N, less_N)
        return mean_N.to(rows_WN.dtype)


class Half(Compressor):
    """Sends the D values in ``dtype``. Not additive: a rounded sum is not the sum of rounded terms."""

    tells = True

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec)
        self.dtype = dtype
        self.merge = Rounded("gradient")

    def layout(self) -> Layout:
        return {"gradient": Field(self.dtype, (self.size,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        odd_1 = torch.zeros(1, dtype=torch.uint8, device=g_CD.device)
        half_CD = halves.narrow(g_CD, self.dtype, odd_1)
        return Message({"gradient": half_CD}, finite=fast.none(odd_1)), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        v_CD, good = halves.widen(message.arrays["gradient"])
        refuse(negated(good), lambda: MessageError(_ODD))
        return v_CD, peer

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        good: Flag = True
        for total_S, half_S, weight in zip(total_CS, message.arrays["gradient"], weights, strict=True):
            good = good & halves.add(total_S, half_S, weight)
        refuse(negated(good), lambda: MessageError(_ODD))
        return peer


def _builder(dtype: torch.dtype) -> Callable[[HalfOptions, Spec, Setup], Method]:
    def build(options: HalfOptions, spec: Spec, setup: Setup) -> Method:
        up = Half(spec, dtype)
        return Method((Feedback(up) if options.feedback else up,), MeanServer(spec, setup.optimizer), Mean())

    return build


FP16 = Entry(
    HalfOptions,
    _builder(torch.float16),
    summary="2 bytes a parameter: 11 significant bits, saturates at 65504",
    keeps="nothing (D residual with feedback)",
    sums="D",
    source="IEEE 754 binary16",
)

BF16 = Entry(
    HalfOptions,
    _builder(torch.bfloat16),
    summary="2 bytes a parameter: 8 significant bits, float32's range",
    keeps="nothing (D residual with feedback)",
    sums="D",
    source="bfloat16 (Kalamkar et al. 2019)",
)
