"""Intrinsic gradient compression: gradients as coordinates in random subspaces known to all.

Source: Melas-Kyriazi and Wang, "Intrinsic Gradient Compression for Scalable and Efficient Federated
Learning": Algorithm 1 (static), 2 (time-varying), 3 (K-varying). Readings, where the paper is terse:

- θ = (θ at the epoch's start) + Σ_k A^(k) Σ^(k) is evaluated afresh from the coordinates, by server and
  client alike: the paper's incremental updates would drift apart in float32.
- A client that last came in epoch q gets Σ_q^final (where Algorithm 2 subtracts Σ^last, which is as long), the
  final Σ of each epoch that it missed, and the current Σ_e. The algorithms, taken literally, leave
  missed epochs out, which goes wrong under random sampling.
- Coordinates are averaged over the round's W clients, not over those that drew the same k.
- Every parameter moves with every coordinate: in a row without any gradient (padding, unseen tokens) the lift AAᵀg is
  not zero, and the row walks. Keep such rows out of the model's trainable parameters where they must stay.

Shape suffixes: C clients, D parameters, d subspace dimension, K subspaces, S = K·d, E epochs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Decoder, Method, Round, Server, State, nest, unnest
from fedmpi.methods.base import Entry, Options, Setup
from fedmpi.ops import fast
from fedmpi.ops.flags import refuse
from fedmpi.ops.subspace import MATRICES, Embedding
from fedmpi.ops.sums import are_finite
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec


class IntrinsicOptions(Options):
    dim: int = Option(ge=1, description="d, a subspace's dimension")
    schedule: Literal["static", "time_varying", "k_varying"] = Option(
        "static",
        description="static: one subspace; time_varying: a new one each epoch; k_varying: K new ones each "
        "epoch, of which each client draws one a round",
    )
    subspaces: int | None = Option(None, ge=1, le=65536, description="K, with k_varying (default 8)")
    redraw: bool = Option(True, description="k_varying: new subspaces each epoch; false keeps the first K")
    matrix: Literal["fastfood", "dense", "hashed"] = Option(
        "fastfood",
        description="A: fastfood, dense (D·d memory, for small models), hashed (one non-zero a row: fastest)",
    )
    orthonormal: bool = Option(
        False, description="matrix: dense with orthonormal columns (lossless at d = D)"
    )
    scale: Literal["unbiased", "isometry"] = Option(
        "unbiased",
        description="unbiased: E[A Aᵀ] = I, as in the paper; isometry: A·√(d/D), whose learning rate is "
        "about D/d larger",
    )

    @property
    def rate_note(self) -> str:
        return "about half of the usual one with SGD (0.6 times was best on the CNN, hashed, 1 %)"


class Subspaces:
    """The matrices A_e^(k): functions of the seed, the epoch (where they are redrawn) and k."""

    def __init__(self, spec: Spec, options: IntrinsicOptions, seed: int) -> None:
        self.size, self.dim = spec.size, options.dim
        self.count = (options.subspaces or 8) if options.schedule == "k_varying" else 1
        self.redrawn = options.schedule == "time_varying" or (
            options.schedule == "k_varying" and options.redraw
        )
        self._factor = math.sqrt(options.dim / spec.size) if options.scale == "isometry" else 1.0
        self._matrix, self._seed = MATRICES["orthonormal" if options.orthonormal else options.matrix], seed

    def at(self, epoch: int, k: int) -> Embedding:
        key = random.key(self._seed, epoch if self.redrawn else 0, k, "subspace")
        return self._matrix(self.size, self.dim, key, self._factor)

    def lift(self, v_CS: Tensor, epoch: int, out: Tensor | None = None) -> Tensor:
        """Σ_k A^(k) v^(k) for each row, ``(C, D)``; in ``out`` where that is given."""
        if self.count == 1 and v_CS.numel():
            return self.at(epoch, 0).lift(v_CS, out)
        total_CD = v_CS.new_zeros(len(v_CS), self.size)
        lifted_CD = fast.scratch("lifted", len(v_CS), self.size, v_CS.device)
        for k, v_Cd in enumerate(v_CS.split(self.dim, 1)):
            if fast.waits(v_Cd) or bool(v_Cd.any()):
                total_CD += self.at(epoch, k).lift(v_Cd, lifted_CD)
        return total_CD


class Coordinates(Compressor):
    """Sends A^(k)ᵀ g: d numbers, and with several subspaces the number k, drawn by the client's key."""

    tells = True

    def __init__(self, spec: Spec, subspaces: Subspaces) -> None:
        super().__init__(spec, subspaces.count * subspaces.dim)
        self.additive = subspaces.count == 1
        self.subspaces = subspaces
        self._tag = torch.uint8 if subspaces.count <= 256 else torch.int32

    def layout(self) -> Layout:
        layout = {"coordinates": Field(torch.float32, (self.subspaces.dim,))}
        return layout if self.subspaces.count == 1 else layout | {"subspace": Field(self._tag)}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        subspaces, epoch = self.subspaces, ctx.round.epoch
        if subspaces.count == 1:
            coordinates_Cd = subspaces.at(epoch, 0).project(g_CD)
            return Message({"coordinates": coordinates_Cd}, finite=are_finite(coordinates_Cd)), state
        k_C = random.integers(ctx.keys("subspace"), 1, subspaces.count)[:, 0]
        coordinates_Cd = g_CD.new_empty(len(g_CD), subspaces.dim)
        for k in k_C.unique().tolist():
            rows_K = (k_C == k).nonzero()[:, 0].to(g_CD.device)
            coordinates_Cd[rows_K] = subspaces.at(epoch, k).project(g_CD[rows_K])
        arrays = {"coordinates": coordinates_Cd, "subspace": k_C.to(self._tag).to(g_CD.device)}
        return Message(arrays, finite=are_finite(coordinates_Cd)), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        coordinates_Cd = message.arrays["coordinates"]
        if self.subspaces.count == 1:
            return coordinates_Cd, peer
        k_C = message.arrays["subspace"].long()
        told_C, last = k_C, self.subspaces.count - 1
        refuse(
            ((told_C < 0) | (told_C > last)).any(),
            lambda: MessageError(f"message: subspace {int(told_C.max())}, expected 0 to {last}"),
        )
        k_C = k_C.clamp(0, last) if fast.waits(k_C) else k_C
        v_CKd = coordinates_Cd.new_zeros(len(k_C), self.subspaces.count, self.subspaces.dim)
        v_CKd[torch.arange(len(k_C), device=k_C.device), k_C] = coordinates_Cd
        return v_CKd.flatten(1), peer

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.subspaces.lift(v_CS, ctx.round.epoch)


class Lift(Decoder):
    """Σ_k A^(k) v_k of the mean coordinates v."""

    def __init__(self, subspaces: Subspaces) -> None:
        self.subspaces = subspaces

    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self.subspaces.lift(mean_S[None], round.epoch, None if out is None else out[None])[0], memory


class SubspaceServer(Server):
    """Keeps Σ of the current epoch and the final Σ of each epoch before; its optimizer works on coordinates
    and starts afresh with each new subspace, so that the parameters never leave it.

    A client downloads the current Σ (S numbers), after Σ_q^final … Σ_{e−1}^final if it last came in epoch
    q < e: (e − q + 1)·S, or, where that is smaller, θ at the epoch's start instead of the finals: D + S.
    """

    def __init__(self, subspaces: Subspaces, optimizer: Optimizer) -> None:
        self.subspaces, self.optimizer = subspaces, optimizer
        self.width = subspaces.count * subspaces.dim

    def view(self, theta_D: Tensor) -> State:
        return {
            "base": theta_D,  # θ at the epoch's start
            "theta": theta_D,
            "sigma": theta_D.new_zeros(self.width),
            "epoch": torch.tensor(0),  # of sigma
            "version": torch.tensor(0),
        }

    def init(self, theta_D: Tensor) -> State:
        history = {
            "finals": theta_D.new_zeros(0, self.width),  # (E, S)
            "starts": torch.zeros(1, dtype=torch.int64),  # (E + 1,) the version at each epoch's start
        }
        return (
            self.view(theta_D) | history | nest(self.optimizer.init(self.width, theta_D.device), "optimizer.")
        )

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        return super().shapes(theta_D, state) | {"starts": (len(state["finals"]) + 1,)}

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        u_S, memory = self.optimizer.direction(unnest(state, "optimizer."), mean_S)
        version = state["version"] + 1
        sigma_S = state["sigma"].add(u_S, alpha=-round.lr)
        theta_D = self._theta(state["base"], sigma_S, int(state["epoch"]))
        new = state | {"theta": theta_D, "sigma": sigma_S, "version": version}
        new |= nest(memory, "optimizer.")
        return self._turned(new) if round.ends_epoch else new

    def _turned(self, state: State) -> State:
        """``state`` at the start of the next epoch, where that has a subspace of its own."""
        if not self.subspaces.redrawn:
            return state
        return {
            **state,
            "base": state["theta"],
            "sigma": torch.zeros_like(state["sigma"]),
            "epoch": state["epoch"] + 1,
            "finals": torch.cat([state["finals"], state["sigma"][None]]),
            "starts": torch.cat([state["starts"], state["version"][None]]),
            **nest(self.optimizer.init(self.width, state["theta"].device), "optimizer."),
        }

    def skip(self, state: State, round: Round) -> State:
        if not (self.subspaces.redrawn and round.ends_epoch):
            return state
        return self._turned(state | {"version": state["version"] + 1})

    def _theta(self, base_D: Tensor, sigma_S: Tensor, epoch: int) -> Tensor:
        return self.subspaces.lift(sigma_S[None], epoch)[0].add_(base_D)

    def download(self, state: State, seen: int) -> Message:
        last = int(torch.searchsorted(state["starts"], seen, right=True)) - 1
        finals_ES = state["finals"][last:]
        arrays = {"sigma": state["sigma"][None]}
        if finals_ES.numel() > self.subspaces.size:
            arrays |= {"base": state["base"][None], "epoch": state["epoch"].int()[None]}
        elif len(finals_ES):
            arrays["finals"] = finals_ES[None]
        return Message(arrays)

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        size = (torch.float32, (self.subspaces.size,))
        return {
            "sigma": (torch.float32, (self.width,)),
            "finals": (torch.float32, (-1, self.width)),
            "base": size,
            "epoch": (torch.int32, ()),
        }

    def reconcile(self, view: State, message: Message, version: int) -> State:
        arrays = message.arrays
        base_D, epoch = view["base"], int(view["epoch"])
        if "finals" in arrays:
            for final_S in arrays["finals"][0]:
                base_D, epoch = self._theta(base_D, final_S, epoch), epoch + 1
        if "base" in arrays:
            base_D, epoch = arrays["base"][0], int(arrays["epoch"][0])
        sigma_S = arrays["sigma"][0]
        return {
            "base": base_D,
            "theta": self._theta(base_D, sigma_S, epoch),
            "sigma": sigma_S,
            "epoch": torch.tensor(epoch),
            "version": torch.tensor(version),
        }


def build(options: IntrinsicOptions, spec: Spec, setup: Setup) -> Method:
    if options.dim > spec.size:
        raise ConfigError(
            f"method.dim: expected at most D = {spec.size} (the model's parameters), got {options.dim}"
        )
    if options.orthonormal and options.matrix != "dense":
        raise ConfigError(f"method.orthonormal: expected matrix: dense, got {options.matrix}")
    if options.subspaces is not None and options.schedule != "k_varying":
        raise ConfigError(f"method.subspaces: expected schedule: k_varying, got {options.schedule}")
    subspaces = Subspaces(spec, options, setup.seed)
    server = SubspaceServer(subspaces, setup.optimizer)
    return Method((Coordinates(spec, subspaces),), server, Lift(subspaces))


ENTRY = Entry(
    IntrinsicOptions,
    build,
    summary="d coordinates in shared random subspaces: static, time-varying, K-varying",
    keeps="nothing",
    sums="K·d (static, time-varying: d)",
    source="Melas-Kyriazi and Wang, Algorithms 1, 2, 3",
    example={"dim": 64},
    variants={
        "time-varying": {"schedule": "time_varying", "matrix": "hashed"},
        "k-varying": {"schedule": "k_varying", "subspaces": 3, "dim": 20},
    },
)
