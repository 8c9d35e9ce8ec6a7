"""A data set, a model and a method of your own: what own.yaml names by import path. Copy it and change it.

Python finds the file as ``configs.own``, from the folder that ``fedmpi`` is started in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn

from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, State
from fedmpi.methods.base import Entry, FeedbackOptions, Mean, MeanServer, Setup
from fedmpi.methods.feedback import Feedback
from fedmpi.ops import bits
from fedmpi.spec import Spec
from fedmpi.tasks.data import Data, Split


def load(folder: Path, every: int = 4) -> Data:
    """178 wines, 13 measurements each, from one of three growers. ``every`` fourth is a test sample.

    ``folder`` is ``data.folder``, where your files would lie; further arguments are further keys of ``data``.
    x is float32 (or int64 tokens), y int64 classes, a row a sample; a third field of Split can say whose each is.
    """
    wines = load_wine()
    x, y = torch.tensor(wines.data, dtype=torch.float32), torch.tensor(wines.target)
    x = (x - x.mean(0)) / x.std(0)
    test = torch.arange(len(x)) % every == 0
    return Data("wine", Split(x[~test], y[~test]), Split(x[test], y[test]), classes=3)


def build(shape: tuple[int, ...], classes: int, hidden: int = 16) -> nn.Module:
    """Any module from samples of ``shape`` to ``classes`` numbers; further arguments are further keys of ``model``.
    Every rank builds it from the same seed."""
    return nn.Sequential(nn.Linear(*shape, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def build_norm(shape: tuple[int, ...], classes: int, hidden: int = 64, p: float = 0.2) -> nn.Module:
    """One with batch norm, whose statistics travel beside the parameters, and dropout."""
    inputs = torch.Size(shape).numel()
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(p), last)


class ScaledSign(Compressor):
    """One bit a parameter and one number a client: sign(g) · mean|g|, the message of Karimireddy et al. 2019.

    C clients, D parameters, B bytes.
    """

    def layout(self) -> Layout:
        return {
            "signs": Field(torch.uint8, (bits.nbytes(self.size),)),
            "scale": Field(torch.float32),
        }

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        signs_CB = bits.pack_signs(g_CD, ctx.keys("scaled sign"))  # the keys decide what the sign of 0 is
        size_C = g_CD.abs().mean(1, dtype=torch.float64)  # a float32 sum of large entries overflows
        return Message({"signs": signs_CB, "scale": size_C.float()}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        return bits.unpack_signs(message.arrays["signs"], self.size, message.arrays["scale"]), peer


def make(options: FeedbackOptions, spec: Spec, setup: Setup) -> Method:
    up = ScaledSign(spec)
    return Method((Feedback(up) if options.feedback else up,), MeanServer(spec, setup.optimizer), Mean())


SIGN = Entry(
    FeedbackOptions,
    make,
    summary="1 bit a parameter, and their mean size",
    keeps="nothing (D residual with feedback)",
    sums="D",
    source="Karimireddy et al. 2019",
    example={"feedback": True},
)
