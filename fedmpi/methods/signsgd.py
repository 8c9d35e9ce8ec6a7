"""SignSGD (Bernstein et al. 2018): one bit a parameter, both ways under a majority vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, Round, Server, State
from fedmpi.methods.base import Entry, FeedbackOptions, MeanServer, Setup, missed_rounds, remember
from fedmpi.methods.feedback import Feedback
from fedmpi.ops import bits, fast
from fedmpi.ops.sums import absolute
from fedmpi.spec import Spec


class SignOptions(FeedbackOptions):
    vote: Literal["majority", "mean"] | None = Option(
        None,
        description="majority: the server moves by the sign of the votes; mean: clients also send ‖g‖₁/D "
        "and scaled signs are averaged (default: mean with feedback, else majority)",
    )
    momentum: float = Option(
        0.0, ge=0, lt=1, description="β of Signum: signs of the clients' momenta; 0: none"
    )

    @property
    def separable(self) -> bool:
        return True


class Sign(Compressor):
    """Bit 1 for a positive entry. The sign of 0 is a fair coin of the client's key.

    With ``momentum`` β (Signum, Algorithm 2) it is the sign of m ← β m + (1 − β) g, which the client keeps.
    """

    tells = True

    def __init__(self, spec: Spec, scaled: bool, momentum: float = 0.0) -> None:
        super().__init__(spec)
        self.scaled, self.integer, self.momentum = scaled, not scaled, momentum
        self.merged = None if scaled else "signs"

    def init(self) -> State:
        return {"momentum": torch.zeros(self.size)} if self.momentum else {}

    def layout(self) -> Layout:
        layout = {"signs": Field(torch.uint8, (bits.nbytes(self.size),))}
        return layout | ({"scale": Field(torch.float32)} if self.scaled else {})

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        if self.momentum:
            g_CD = self.momentum * state["momentum"] + (1 - self.momentum) * g_CD
            state = {"momentum": g_CD}
        odd_1 = torch.zeros(1, dtype=torch.uint8)
        arrays = {"signs": bits.pack_signs(g_CD, ctx.keys("sign of zero"), odd_1)}
        if self.scaled:
            arrays["scale"] = (absolute(g_CD) / self.size).float()
        return Message(arrays, finite=not odd_1), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        arrays = message.arrays
        return bits.unpack_signs(arrays["signs"], self.size, arrays["scale"] if self.scaled else None), peer

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        if not self.scaled:
            return super().add(total_CS, message, peer, ctx, weights)
        signs_CB, scale_C = message.arrays["signs"], message.arrays["scale"]
        v_1D = fast.scratch("signs", 1, self.size, signs_CB.device)
        for c, (total_S, weight) in enumerate(zip(total_CS, weights, strict=True)):
            bits.unpack_signs(signs_CB[c : c + 1], self.size, scale_C[c : c + 1], v_1D)
            total_S.add_(v_1D[0], alpha=weight)
        return peer

    def merge(self, rows_WN: Tensor, start: int, round: Round) -> Tensor:
        return bits.vote(rows_WN, round.key("tie"), 8 * start)


def majority(votes_D: Tensor, round: Round) -> Tensor:
    """Where the sum of ±1 is positive; a tie is the coin of its index, the same for everybody."""
    positive_D, tie_D = votes_D > 0, votes_D == 0
    if bool(tie_D.any()):
        positive_D |= tie_D & random.coins(round.key("tie"), len(votes_D))
    return positive_D


class VoteServer(Server):
    """θ ← θ − η · sign(votes); a tie is a fair coin of the round's key, the same for everybody.

    A client downloads the signs of the rounds it missed (1 bit a parameter and η for each), or θ
    where that is smaller; the server keeps the signs of as many rounds (about 31).
    """

    weighted = False

    def __init__(self, spec: Spec) -> None:
        self.size = spec.size
        row = bits.nbytes(self.size)
        self.keep = max(1, -(-4 * self.size // (row + 4)) - 1)  # more rounds than these cost more than θ

    def init(self, theta_D: Tensor) -> State:
        row = bits.nbytes(self.size)
        history = {"signs": torch.zeros(0, row, dtype=torch.uint8), "lr": torch.zeros(0)}
        return self.view(theta_D) | history

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        return super().shapes(theta_D, state) | {"lr": (len(state["signs"]),)}

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        positive_D = majority(mean_S, round)
        packed_B, lr = bits.pack(positive_D[None])[0], torch.tensor(round.lr, dtype=torch.float32)
        return {
            "theta": _step(state["theta"], packed_B, lr),
            "version": state["version"] + 1,
            "signs": remember(state["signs"], packed_B, self.keep),
            "lr": remember(state["lr"], lr, self.keep),
        }

    def memory(self) -> State:
        return {}

    def gradient(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if mean_S.dtype == torch.uint8:  # of two voters, packed
            one_1 = torch.ones(1)
            return bits.unpack_signs(mean_S[None], self.size, one_1, None if out is None else out[None])[
                0
            ], memory
        return majority(mean_S, round).float().mul_(2).sub_(1), memory

    def view(self, theta_D: Tensor) -> State:
        return {"theta": theta_D, "version": torch.tensor(0)}

    def download(self, state: State, seen: int) -> Message:
        rounds = missed_rounds(state, seen, ("signs", "lr"))
        return Message({"theta": state["theta"][None]}) if rounds is None else rounds

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        signs = (torch.uint8, (-1, bits.nbytes(self.size)))
        return {"theta": (torch.float32, (self.size,)), "signs": signs, "lr": (torch.float32, (-1,))}

    def reconcile(self, view: State, message: Message, version: int) -> State:
        arrays = message.arrays
        theta_D = arrays["theta"][0] if "theta" in arrays else view["theta"]
        if "signs" in arrays:
            for signs_B, lr in zip(arrays["signs"][0], arrays["lr"][0], strict=True):
                theta_D = _step(theta_D, signs_B, lr)
        return {"theta": theta_D, "version": torch.tensor(version)}


def _step(theta_D: Tensor, signs_B: Tensor, lr: Tensor) -> Tensor:
    step_1D = fast.scratch("signs", 1, len(theta_D), theta_D.device)
    return theta_D - bits.unpack_signs(signs_B[None], len(theta_D), lr[None], step_1D)[0]


def build(options: SignOptions, spec: Spec, setup: Setup) -> Method:
    vote = options.vote or ("mean" if options.feedback else "majority")
    up = Sign(spec, vote == "mean", options.momentum)
    feedback = Feedback(up) if options.feedback else up
    if vote == "mean":
        return Method(feedback, MeanServer(spec, setup.optimizer))
    if setup.optimizer.name != "sgd":
        raise ConfigError(
            f"server.optimizer: expected sgd with a majority vote, got {setup.optimizer.name}, which needs "
            f"method.vote: mean"
        )
    return Method(feedback, VoteServer(spec))


ENTRY = Entry(
    SignOptions,
    build,
    summary="one bit a parameter, majority vote",
    keeps="nothing (D residual with feedback, D momentum with Signum)",
    sums="D votes (int)",
    source="Bernstein et al. 2018; Karimireddy et al. 2019",
    variants={"mean": {"vote": "mean"}, "signum": {"momentum": 0.9}},
)
