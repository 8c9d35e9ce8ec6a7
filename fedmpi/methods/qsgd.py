"""QSGD: stochastic rounding to s levels of a bucket's norm, b bits an entry.

Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NIPS
2017: Q_s(v)_i = ‖v‖ · sgn(v_i) · ξ_i with ξ_i = l/s or (l+1)/s around |v_i|/‖v‖, drawn so that E[ξ_i] is just
that; Q_s(0) = 0. For buckets of n entries E‖Q_s(v) − v‖² ≤ min(n/s², √n/s)‖v‖².

Readings. Entries have a fixed width (one sign bit and b − 1 bits of level, s = 2^(b−1) − 1) in place of the
paper's Elias code, which pays where most levels are 0, i.e. at s ≈ 1. Buckets run over the flat vector; the
last may be shorter.

There is no error feedback: it needs a compressor whose error is smaller than its input, and at the
default of 4 bits and 512 entries the expected squared error of a dense vector is about 1.5 times the
input's, so a residual would grow; being unbiased, QSGD does not need one.

Shape suffixes: C clients, D parameters, N buckets, B bytes, b bits an entry.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, State
from fedmpi.methods.base import Entry, Mean, MeanServer, Options, Setup
from fedmpi.ops import bits
from fedmpi.ops.flags import refuse
from fedmpi.ops.quantize import bucket_largest, bucket_squares, from_planes, to_planes
from fedmpi.spec import Spec

_LARGEST = torch.finfo(torch.float32).max


class QsgdOptions(Options):
    bits: int = Option(4, ge=2, le=8, description="b, bits an entry: a sign and a level of b − 1 bits")
    bucket: int | None = Option(
        512,
        ge=1,
        description="entries that share a norm of 4 bytes (null: the whole vector). The squared error "
        "grows with √bucket; at the paper's 512 the norms cost 1/16 bit an entry",
    )
    norm: Literal["l2", "max"] = Option(
        "l2", description="l2: as the paper analyses it; max: as its experiments do, with a smaller error"
    )

    @property
    def rate_note(self) -> str:
        return "about half of the usual one: rounding adds variance, the more the fewer the bits"

    @property
    def separable(self) -> bool:
        return self.bucket is not None


class Qsgd(Compressor):
    """Levels and signs as b planes of one bit a parameter (plane 0: signs), and a float32 norm a bucket."""

    def __init__(self, spec: Spec, width: int, bucket: int | None, norm: Literal["l2", "max"]) -> None:
        super().__init__(spec)
        self.width, self.bucket, self.norm = width, min(bucket or spec.size, spec.size), norm
        self.buckets = -(-spec.size // self.bucket)

    def layout(self) -> Layout:
        return {
            "norms": Field(torch.float32, (self.buckets,)),
            "planes": Field(torch.uint8, (self.width, bits.nbytes(self.size))),
        }

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        norms_CN = self._norms(g_CD)
        planes_CbB = to_planes(g_CD, norms_CN, self.bucket, self.width, ctx.keys("rounding"))
        return Message({"norms": norms_CN, "planes": planes_CbB}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        norms_CN = message.arrays["norms"]
        refuse(
            ~((norms_CN >= 0) & (norms_CN <= _LARGEST)).all(),
            lambda: MessageError("message: expected finite norms ≥ 0, got a negative or infinite one or NaN"),
        )
        return from_planes(message.arrays["planes"], norms_CN, self.bucket, self.size), peer

    def _norms(self, g_CD: Tensor) -> Tensor:
        if self.norm == "max":
            return bucket_largest(g_CD, self.bucket)
        # In float64, lest the order of the sum (which may hang on C) show in the float32. Beyond float32's
        # range its largest number serves as well: any norm that no entry exceeds is unbiased.
        return bucket_squares(g_CD, self.bucket).sqrt_().clamp_(max=_LARGEST).float()


def build(options: QsgdOptions, spec: Spec, setup: Setup) -> Method:
    up = Qsgd(spec, options.bits, options.bucket, options.norm)
    return Method((up,), MeanServer(spec, setup.optimizer), Mean())


ENTRY = Entry(
    QsgdOptions,
    build,
    summary="stochastic rounding to b bits a parameter, unbiased",
    keeps="nothing",
    sums="D",
    source="Alistarh et al. 2017",
    example={"bucket": 64},
    variants={"max": {"bits": 2, "bucket": None, "norm": "max"}},
)
