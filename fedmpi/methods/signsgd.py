"""SignSGD (Bernstein et al. 2018): one bit a parameter, both ways under a majority vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Decoder, Merge, Method, Round, Server, State
from fedmpi.methods.base import Entry, FeedbackOptions, Mean, MeanServer, Setup, missed_rounds, remember
from fedmpi.methods.feedback import Feedback
from fedmpi.ops import bits, fast, pages
from fedmpi.ops.flags import refuse
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

    zeros: Literal["skip", "coin"] = Option(
        "skip",
        description="skip: a row (of the first dimension, or 64 entries of a tensor of one) in which nobody has a "
        "gradient stays, at a bit a row of a message that has such rows; coin: all zeros are fair coins",
    )

    @property
    def rate_note(self) -> str:
        if self.vote == "majority" or (self.vote is None and not self.feedback):
            return (
                "a vote moves each parameter by the whole rate, as Adam does: with SGD 1/400 to 1/250 of the usual "
                "one, with Adam the usual one"
            )
        return "about half of the usual one with SGD (0.4 times was best on the CNN)"

    @property
    def separable(self) -> bool:
        return True


class Votes(Merge):
    """The majority of packed signs, packed."""

    def __init__(self, spec: Spec, skip: bool) -> None:
        super().__init__("signs")
        self.spec, self.skip, self.count_rows = spec, skip, len(spec.rows) - 1

    def __call__(
        self, rows_WN: Tensor, start: int, round: Round, optional_WB: Tensor | None = None
    ) -> Tensor:
        if optional_WB is None:
            return bits.vote(rows_WN, round.key("tie"), 8 * start)
        present_WR = ~bits.unpack(optional_WB, self.count_rows)
        starts_R = self.spec.rows_on(rows_WN.device)
        key = round.key("tie")
        return bits.vote_of_present(rows_WN, present_WR, starts_R, self.spec.size, key, 8 * start)

    def message(self, merged_1N: Tensor, optional_WB: Tensor | None = None) -> Message:
        """Abstains where all senders do."""
        if not self.skip:
            return Message({"signs": merged_1N})
        rows_EB = merged_1N.new_empty(0, bits.nbytes(self.count_rows), dtype=torch.uint8)
        if (
            optional_WB is not None
        ):  # where nobody abstains with everybody else, all zeros: no device is asked
            rows_EB = bits.pack(bits.unpack(optional_WB, self.count_rows).all(0, keepdim=True))
        some_1 = torch.tensor([len(rows_EB) > 0])
        tag_1 = torch.full((1,), len(rows_EB) > 0, device=merged_1N.device)
        signs_1B = _tagged(merged_1N[:, : bits.nbytes(self.spec.size)], self.spec.size, tag_1)
        return Message({"signs": signs_1B, "rows": rows_EB}, {"rows": some_1.long()})


class Sign(Compressor):
    """Bit 1 for a positive entry. The sign of 0 is a fair coin of the client's key.

    With ``skip``, a sender abstains in rows (:attr:`fedmpi.spec.Spec.rows`) that hold nothing but zeros, such as those
    of padding and of tokens that it has not seen: a bit a row says which, in a message that has any, and the bit
    after the last sign says that it has. Where everybody abstains nothing moves. A receiver decodes zeros there and,
    of votes, also each row's presence (1 or 0), since a sum of votes cannot tell a tie from nothing.

    With ``momentum`` β (Signum, Algorithm 2) it is the sign of m ← β m + (1 − β) g, which the client keeps, and
    whose rows count.
    """

    tells = True

    def __init__(self, spec: Spec, scaled: bool, momentum: float = 0.0, skip: bool = True) -> None:
        self.count_rows = len(spec.rows) - 1 if skip else 0
        self.presence = 0 if scaled else self.count_rows
        super().__init__(spec, spec.size + self.presence)
        self.scaled, self.integer, self.momentum, self.skip = scaled, not scaled, momentum, skip
        self.merge = None if scaled else Votes(spec, skip)
        self.optional = "rows" if skip else None

    def init(self) -> State:
        return {"momentum": torch.zeros(self.spec.size)} if self.momentum else {}

    def layout(self) -> Layout:
        layout = {"signs": Field(torch.uint8, (bits.nbytes(self.spec.size + self.skip),))}
        layout |= {"scale": Field(torch.float32)} if self.scaled else {}
        rows = Field(torch.uint8, (bits.nbytes(self.count_rows),), ragged=True)
        return layout | ({"rows": rows} if self.skip else {})

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        if self.momentum:
            g_CD = self.momentum * state["momentum"] + (1 - self.momentum) * g_CD
            state = {"momentum": g_CD}
        odd_1 = torch.zeros(1, dtype=torch.uint8, device=g_CD.device)
        arrays = {"signs": bits.pack_signs(g_CD, ctx.keys("sign of zero"), odd_1)}
        if self.scaled:
            arrays["scale"] = (absolute(g_CD) / self.spec.size).float()
        if not self.skip:
            return Message(arrays, finite=fast.none(odd_1)), state
        empty_CR = bits.empty_rows(g_CD, self.spec.rows_on(g_CD.device))
        some_C = empty_CR.any(1)
        arrays["signs"] = _tagged(arrays["signs"], self.spec.size, some_C)
        some_C = some_C.cpu()
        arrays["rows"] = bits.pack(empty_CR[_where(some_C, g_CD.device)])
        return Message(arrays, {"rows": some_C.long()}, finite=fast.none(odd_1)), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        size, signs_CB = self.spec.size, message.arrays["signs"]
        scale_C = message.arrays["scale"] if self.scaled else None
        signs_CB = signs_CB[:, : bits.nbytes(size)]
        if not self.presence:
            v_CD = bits.unpack_signs(signs_CB, size, scale_C)
            return self._abstain(v_CD, self._empty(message)), peer
        v_CS = torch.empty(len(signs_CB), self.size, dtype=torch.int8, device=signs_CB.device)
        empty_CR = self._empty(message)
        for c, v_S in enumerate(v_CS):
            bits.unpack_signs(signs_CB[c : c + 1], size, None, v_S[None, :size])
            self._abstain(v_S[None, :size], None if empty_CR is None else empty_CR[c : c + 1])
        v_CS[:, size:] = 1 if empty_CR is None else ~empty_CR
        return v_CS, peer

    def _empty(self, message: Message) -> Tensor | None:
        """The rows in which each client abstains, bool ``(C, R)``; None where nobody does.

        Raises:
          MessageError: the tags say otherwise.
        """
        if not self.skip:
            return None
        tags_C, rows_EB = _tags(message.arrays["signs"], self.spec.size), message.arrays["rows"]
        lengths_C = message.lengths["rows"]
        refuse((tags_C != lengths_C.to(tags_C.device)).any(), lambda: _mistagged(lengths_C, tags_C))
        if bool((lengths_C > 1).any()):
            raise _mistagged(lengths_C, tags_C)
        some_C = lengths_C.bool()
        if not len(rows_EB):
            return None
        empty_CR = rows_EB.new_zeros(len(some_C), self.count_rows, dtype=torch.bool)
        empty_CR[_where(some_C, rows_EB.device)] = bits.unpack(rows_EB, self.count_rows)
        return empty_CR

    def _abstain(self, v_CD: Tensor, empty_CR: Tensor | None) -> Tensor:
        return v_CD if empty_CR is None else bits.clear_rows(v_CD, empty_CR, self.spec.rows_on(v_CD.device))

    def add(
        self, total_CS: Tensor, message: Message, peer: State, ctx: Context, weights: Sequence[float]
    ) -> State:
        if not self.scaled:
            return super().add(total_CS, message, peer, ctx, weights)
        signs_CB, scale_C = message.arrays["signs"], message.arrays["scale"]
        signs_CB, empty_CR = signs_CB[:, : bits.nbytes(self.size)], self._empty(message)
        v_1D = fast.scratch("signs", 1, self.size, signs_CB.device)
        for c, (total_S, weight) in enumerate(zip(total_CS, weights, strict=True)):
            bits.unpack_signs(signs_CB[c : c + 1], self.size, scale_C[c : c + 1], v_1D)
            self._abstain(v_1D, None if empty_CR is None else empty_CR[c : c + 1])
            total_S.add_(v_1D[0], alpha=weight)
        return peer


def _mistagged(lengths_C: Tensor, tags_C: Tensor) -> MessageError:
    return MessageError(
        f"message: {lengths_C.tolist()} arrays 'rows' of the clients, expected {tags_C.long().tolist()} by their tags"
    )


def _where(some_C: Tensor, device: torch.device) -> Tensor:
    """The clients that have something, who are known on the CPU: int64, there."""
    return some_C.nonzero()[:, 0].to(device)


def _tagged(signs_CB: Tensor, size: int, some_C: Tensor) -> Tensor:
    """Packed signs with one bit more, in place of what followed them; it may take a byte of its own."""
    place, tag_C1 = size % 8, some_C[:, None].to(torch.uint8)
    if not place:
        return torch.cat([signs_CB, tag_C1], 1)
    signs_CB[:, -1:] = (signs_CB[:, -1:] & ((1 << place) - 1)) | (tag_C1 << place)
    return signs_CB


def _tags(signs_CB: Tensor, size: int) -> Tensor:
    """That bit, bool ``(C,)``."""
    return ((signs_CB[:, -1] >> size % 8) & 1).bool()


def majority(votes_D: Tensor, round: Round) -> Tensor:
    """Where the sum of ±1 is positive; a tie is the coin of its index, the same for everybody."""
    positive_D, tie_D = votes_D > 0, votes_D == 0
    if fast.waits(votes_D) or bool(tie_D.any()):
        positive_D |= tie_D & random.coins(round.key("tie"), len(votes_D), votes_D.device)
    return positive_D


class Majority(Decoder):
    """The sign of the votes, ±1; a tie is a fair coin of the round's key, the same for everybody. With ``skip`` 0 in
    rows in which nobody voted."""

    def __init__(self, spec: Spec, skip: bool = True) -> None:
        self.spec, self.size, self.skips = spec, spec.size, skip

    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if mean_S.dtype == torch.uint8:  # of two voters, packed
            signs_1B, out_1D = mean_S[None, : bits.nbytes(self.size)], None if out is None else out[None]
            one_1 = torch.ones(1, device=mean_S.device)
            return bits.unpack_signs(signs_1B, self.size, one_1, out_1D)[0], memory
        g_D = majority(mean_S[: self.size], round).float().mul_(2).sub_(1)
        if self.skips:
            still_1R = _still(mean_S, self.size)
            if fast.waits(g_D) or bool(still_1R.any()):
                bits.clear_rows(g_D[None], still_1R, self.spec.rows_on(g_D.device))
        return g_D, memory


def _still(mean_S: Tensor, size: int) -> Tensor:
    """Rows in which nobody voted, bool ``(1, R)``."""
    return mean_S[None, size:] == 0


class VoteServer(Server):
    """θ ← θ − η · sign(votes); a tie is a fair coin of the round's key, the same for everybody.

    A client downloads the signs of the rounds it missed (1 bit a parameter and η for each), or θ
    where that is smaller; the server keeps the signs of as many rounds (about 31). With ``skip`` rows stay in which
    nobody voted: the bit after a round's signs says whether it had such rows, and a bit a row of these rounds which.
    """

    weighted = False

    def __init__(self, spec: Spec, skip: bool = True) -> None:
        self.spec, self.size, self.skips = spec, spec.size, skip
        self.rows = bits.nbytes(len(spec.rows) - 1)
        row = self.row = bits.nbytes(self.size + skip)
        self.keep = max(1, -(-4 * self.size // (row + 4)) - 1)  # more rounds than these cost more than θ

    def init(self, theta_D: Tensor) -> State:
        history = {"signs": theta_D.new_zeros(0, self.row, dtype=torch.uint8), "lr": theta_D.new_zeros(0)}
        if self.skips:
            history["rows"] = theta_D.new_zeros(0, self.rows, dtype=torch.uint8)
        return self.view(theta_D) | history

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        return super().shapes(theta_D, state) | {"lr": (len(state["signs"]),)}

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        packed_1B = bits.pack_votes(mean_S[: self.size], round.key("tie"))[None]
        lr = torch.tensor(round.lr, dtype=torch.float32, device=mean_S.device)
        history, rows_B = {}, None
        if self.skips:
            still_1R = _still(mean_S, self.size)
            packed_1B = _tagged(packed_1B, self.size, still_1R.any(1))
            rows_B = bits.pack(still_1R)[0]
            history["rows"] = remember(state["rows"], rows_B, self.keep)
        return {
            "theta": self._step(state["theta"], packed_1B[0], lr, rows_B),
            "version": state["version"] + 1,
            "signs": remember(state["signs"], packed_1B[0], self.keep),
            "lr": remember(state["lr"], lr, self.keep),
        } | history

    def _step(self, theta_D: Tensor, signs_B: Tensor, lr: Tensor, rows_B: Tensor | None) -> Tensor:
        step_1D = fast.scratch("signs", 1, self.size, theta_D.device)
        bits.unpack_signs(signs_B[None, : bits.nbytes(self.size)], self.size, lr[None], step_1D)
        if rows_B is not None and (fast.waits(rows_B) or bool(rows_B.any())):
            still_1R = bits.unpack(rows_B[None], len(self.spec.rows) - 1)
            bits.clear_rows(step_1D, still_1R, self.spec.rows_on(theta_D.device))
        return torch.sub(theta_D, step_1D[0], out=pages.empty_like(theta_D))

    def view(self, theta_D: Tensor) -> State:
        return {"theta": theta_D, "version": torch.tensor(0)}

    def download(self, state: State, seen: int) -> Message:
        rounds = missed_rounds(state, seen, ("signs", "lr", "rows") if self.skips else ("signs", "lr"))
        if rounds is not None and self.skips:
            some_M = _tags(rounds.arrays["signs"][0], self.size)
            rounds.arrays["rows"] = rounds.arrays["rows"][:, some_M]
        if rounds is None or rounds.total_nbytes() > state["theta"].nbytes:
            return Message({"theta": state["theta"][None]})
        return rounds

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        signs = (torch.uint8, (-1, bits.nbytes(self.size)))
        layout = {"theta": (torch.float32, (self.size,)), "signs": signs, "lr": (torch.float32, (-1,))}
        return layout | ({"rows": (torch.uint8, (-1, self.rows))} if self.skips else {})

    def reconcile(self, view: State, message: Message, version: int) -> State:
        arrays = message.arrays
        theta_D = arrays["theta"][0] if "theta" in arrays else view["theta"]
        if "signs" in arrays:
            signs_MB, lr_M, rows = arrays["signs"][0], arrays["lr"][0], [None] * len(arrays["lr"][0])
            if self.skips:
                some_M, told = _tags(signs_MB, self.size).cpu(), iter(arrays["rows"][0])
                if int(some_M.sum()) != len(arrays["rows"][0]):
                    raise MessageError(
                        f"message: rows of {len(arrays['rows'][0])} rounds, expected {int(some_M.sum())} by their tags"
                    )
                rows = [next(told) if some else None for some in some_M.tolist()]
            for signs_B, lr, rows_B in zip(signs_MB, lr_M, rows, strict=True):
                theta_D = self._step(theta_D, signs_B, lr, rows_B)
        return {"theta": theta_D, "version": torch.tensor(version)}


def build(options: SignOptions, spec: Spec, setup: Setup) -> Method:
    vote = options.vote or ("mean" if options.feedback else "majority")
    skip = options.zeros == "skip"
    up = Sign(spec, vote == "mean", options.momentum, skip)
    feedback = Feedback(up) if options.feedback else up
    if vote == "mean":
        return Method((feedback,), MeanServer(spec, setup.optimizer), Mean())
    if setup.optimizer.name != "sgd":
        raise ConfigError(
            f"server.optimizer: expected sgd with a majority vote, got {setup.optimizer.name}, which needs "
            f"method.vote: mean"
        )
    return Method((feedback,), VoteServer(spec, skip), Majority(spec, skip))


ENTRY = Entry(
    SignOptions,
    build,
    summary="one bit a parameter, majority vote",
    keeps="nothing (D residual with feedback, D momentum with Signum)",
    sums="D votes (int)",
    source="Bernstein et al. 2018; Karimireddy et al. 2019",
    variants={"mean": {"vote": "mean"}, "signum": {"momentum": 0.9}, "coin": {"zeros": "coin"}},
)
