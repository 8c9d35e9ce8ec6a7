"""No compression: FedSGD and FedAvg, the baseline (McMahan et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, State
from fedmpi.methods.base import Entry, Mean, MeanServer, Options, Setup
from fedmpi.spec import Spec


class DenseOptions(Options):
    @property
    def separable(self) -> bool:
        return True


class Dense(Compressor):
    """Sends the D values of the accumulated gradient."""

    additive = True

    def layout(self) -> Layout:
        return {"gradient": Field(torch.float32, (self.size,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        return Message({"gradient": g_CD}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        return message.arrays["gradient"], peer


def build(options: DenseOptions, spec: Spec, setup: Setup) -> Method:
    return Method((Dense(spec),), MeanServer(spec, setup.optimizer), Mean())


ENTRY = Entry(
    DenseOptions,
    build,
    summary="no compression: FedSGD, FedAvg",
    keeps="nothing",
    sums="D",
    source="McMahan et al. 2017",
)
