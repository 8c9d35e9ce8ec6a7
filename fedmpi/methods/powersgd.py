"""PowerSGD: the best of a power iteration that all clients do together; two averages a round.

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, Algorithm 1 (compression) and 2 (error feedback). For each layer's matrix M:

    P = mean of M_c Q;  P̂ = orthonormal columns of P;  Q ← mean of M_cᵀ P̂;  mean of M_c ≈ P̂ Qᵀ

and Q starts the next round (warm start). Readings, where the paper is terse:

- A client's error is against what it sent itself, e_c = p_c − P̂ (p_cᵀ P̂)ᵀ (Algorithm 2, line 9, and the belief
  of both ends); the authors' code subtracts the decoded mean. When all clients take part in all rounds,
  the mean of the errors is the same, and nothing else enters the parameters.
- A column that depends on others is zero in P̂ (the layer's mean has a smaller rank). It would stay zero in Q,
  so the next round starts with the initial random column in its place.
- Algorithm 2's momentum steps by Δ' + m; that of the server's optimizers by m.

Shape suffixes: C clients, D parameters, N rows and M columns of a layer's matrix, R the rank, P = Σ N·R numbers
of all layers' P, Q = Σ M·R, S = Q and the dense parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Decoder, Method, Round, Server, State, nest, unnest
from fedmpi.methods.base import Entry, FeedbackOptions, Setup, missed_rounds, remember
from fedmpi.methods.lowrank import Layer, Layers, orthonormal, set_product, subtract_product
from fedmpi.ops import fast, pages
from fedmpi.ops.sums import are_finite
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec


class PowerOptions(FeedbackOptions):
    rank: int = Option(2, ge=1, description="r, the columns of P and Q of a layer")

    @property
    def separable(self) -> bool:
        return True


class Factors:
    """How the factors of all layers lie in flat vectors, row by row, and what they start from."""

    def __init__(self, spec: Spec, rank: int, seed: int) -> None:
        self.layers, self.rank = Layers(spec, rank), rank
        self.p_size = rank * sum(layer.rows for layer in self.layers.factored)
        self.q_size = rank * sum(layer.columns for layer in self.layers.factored)
        self.size = self.q_size + self.layers.dense_size
        self.q0_Q = random.normal(random.key(seed, stream="powersgd Q"), self.q_size)
        # What stands in for P̂ while no first pass has made one: it is never used in a round.
        self.p0_P = self.orthonormal(random.normal(random.key(seed, stream="powersgd P"), self.p_size))
        self._first = {self.q0_Q.device: (self.p0_P, self.q0_Q)}

    def first(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """P̂ and Q before the first round, there."""
        if device not in self._first:
            self._first[device] = self.p0_P.to(device), self.q0_Q.to(device)
        return self._first[device]

    def left(self, p: Tensor) -> Iterator[tuple[Layer, Tensor]]:
        """Each layer's part ``(..., N, R)`` of P ``(..., P)``, a view."""
        return self._matrices(p, [layer.rows for layer in self.layers.factored])

    def right(self, q: Tensor) -> Iterator[tuple[Layer, Tensor]]:
        """Each layer's part ``(..., M, R)`` of Q ``(..., Q)``, or of a vector that starts with it, a view."""
        return self._matrices(q[..., : self.q_size], [layer.columns for layer in self.layers.factored])

    def _matrices(self, flat: Tensor, lengths: list[int]) -> Iterator[tuple[Layer, Tensor]]:
        parts = flat.split([n * self.rank for n in lengths], dim=-1)
        for layer, n, part in zip(self.layers.factored, lengths, parts, strict=True):
            yield layer, part.unflatten(-1, (n, self.rank))

    def orthonormal(self, p_P: Tensor) -> Tensor:
        """P̂ of P."""
        size = self.layers.spec_size
        columns = (orthonormal(p_NR, count=size).flatten() for _, p_NR in self.left(p_P))
        return torch.cat([p_P[:0], *columns])

    def warm(self, mean_S: Tensor) -> Tensor:
        """The Q ``(Q,)`` that the next round starts from. Its length is of no account: one far from 1, whose product
        with gradients as large would overflow (or with as small ones vanish), is brought there by a power of two."""
        pairs = zip(self.right(mean_S), self.right(self.first(mean_S.device)[1]), strict=True)
        columns = (torch.where((q_MR == 0).all(0), q0_MR, q_MR).flatten() for (_, q_MR), (_, q0_MR) in pairs)
        return torch.cat([mean_S[:0], *map(_moderate, columns)])

    def product(self, p_P: Tensor, v_CS: Tensor, out: Tensor | None = None) -> Tensor:
        """P̂ Qᵀ and the dense parameters: ``(C, D)``; in ``out`` where that is given."""
        g_CD = v_CS.new_empty(len(v_CS), self.layers.spec_size) if out is None else out
        self.layers.set_dense(g_CD, v_CS[:, self.q_size :])
        for (layer, p_NR), (_, q_CMR) in zip(self.left(p_P), self.right(v_CS), strict=True):
            set_product(layer.of(g_CD), p_NR, q_CMR)
        return g_CD

    def rest(self, g_CD: Tensor, p_P: Tensor, v_CS: Tensor) -> Tensor:
        """g − P̂ Qᵀ, and 0 for the dense parameters: ``g_CD``, changed."""
        self.layers.set_dense(g_CD, torch.zeros_like(v_CS[:, self.q_size :]))
        for (layer, p_NR), (_, q_CMR) in zip(self.left(p_P), self.right(v_CS), strict=True):
            subtract_product(layer.of(g_CD), p_NR, q_CMR)
        return g_CD


def _moderate(q_N: Tensor) -> Tensor:
    """q where its largest entry lies within 2^±32; else times the power of two that takes that below 1."""
    largest = q_N.abs().amax()
    stays = ((largest >= 2.0**-32) & (largest <= 2.0**32)) | ~largest.isfinite()
    # The power of two from its bits: no device's own rounds it. Nobody is asked, and so nobody waits.
    exponent = torch.where(stays, 0, torch.frexp(largest.double()).exponent.long())
    power = ((1023 - exponent) << 52).view(torch.float64)
    return (q_N.double() * power).float()


class _Pass(Compressor):
    """One array of numbers, linear in the gradient plus the error that ``up`` keeps.

    Additive also with feedback: for given P̂ the errors are linear in the gradients, too.
    """

    additive = True
    array = ""

    def __init__(self, spec: Spec, factors: Factors, size: int, feedback: bool) -> None:
        super().__init__(spec, size)
        self.factors, self.feedback = factors, feedback

    def layout(self) -> Layout:
        return {self.array: Field(torch.float32, (self.size,))}

    def corrected(self, g_CD: Tensor, state: State) -> Tensor:
        """p = g + e: both passes compress it. The second finds it in the state that the first gave, if it gets that."""
        if not self.feedback:
            return g_CD
        if "corrected" in state:
            return state["corrected"]
        return torch.add(g_CD, state["residual"], out=fast.fresh(state["residual"]))

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        return message.arrays[self.array], peer


class Left(_Pass):
    """The first pass sends M Q. The state is that of :class:`Right`, which is only read here; what comes out has p
    beside it."""

    array = "p"
    tells = True

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        p_CD = self.corrected(g_CD, state)
        parts = [(layer.of(p_CD) @ q_MR).flatten(1) for layer, q_MR in self.factors.right(ctx.shared["q"])]
        message = torch.cat(parts, dim=1)
        sound = are_finite(message, self.factors.layers.dense(p_CD))
        return Message({"p": message}, finite=sound), state | ({"corrected": p_CD} if self.feedback else {})


class Right(_Pass):
    """The second pass sends Mᵀ P̂, and the dense parameters as they are."""

    array = "q"

    def init(self) -> State:
        return {"residual": torch.zeros(self.spec.size)} if self.feedback else {}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        p_CD = self.corrected(g_CD, state)
        parts = [(layer.of(p_CD).mT @ p_NR).flatten(1) for layer, p_NR in self.factors.left(ctx.shared["p"])]
        v_CS = torch.cat([*parts, self.factors.layers.dense(p_CD)], dim=1)
        after = {"residual": self.factors.rest(p_CD, ctx.shared["p"], v_CS)} if self.feedback else {}
        return Message({"q": v_CS}), after

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.factors.product(ctx.shared["p"], v_CS)


class PowerDecoder(Decoder):
    """P̂ Qᵀ; Q is where the next round's iteration starts."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def memory(self) -> State:
        return {"q": self.factors.q0_Q, "p": self.factors.p0_P}

    def shared(self, memory: State) -> State:
        return {"p": memory["p"], "q": memory["q"]}

    def between(self, memory: State, index: int, mean_S: Tensor, round: Round) -> State:
        return memory | {"p": self.factors.orthonormal(mean_S)}

    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        g_D = self.factors.product(memory["p"], mean_S[None], None if out is None else out[None])[0]
        return g_D, {"q": self.factors.warm(mean_S), "p": self.factors.first(mean_S.device)[0]}


class PowerServer(Server):
    """θ ← θ − η u, with u the optimizer's direction for P̂ Qᵀ (and the dense parameters' mean).

    A client downloads P̂, the mean of what was sent, and η of each round that it missed, and steps as the
    server did; or θ and Q where that is smaller (the server keeps as many rounds), and always where the
    optimizer has a memory, since θ does not follow from the factors alone then.
    """

    def __init__(self, factors: Factors, optimizer: Optimizer) -> None:
        self.factors, self.optimizer, self.decoder = factors, optimizer, PowerDecoder(factors)
        row, theta = factors.p_size + factors.size + 1, factors.layers.spec_size + factors.q_size
        self.keep = theta // row if optimizer.name == "sgd" else 0

    def init(self, theta_D: Tensor) -> State:
        history = {
            "lefts": theta_D.new_zeros(0, self.factors.p_size),
            "rights": theta_D.new_zeros(0, self.factors.size),
            "lr": theta_D.new_zeros(0),
        }
        memory = self.optimizer.init(self.factors.layers.spec_size, theta_D.device)
        return self.view(theta_D) | history | nest(memory, "optimizer.")

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        shapes, rounds = super().shapes(theta_D, state), len(state["lr"])
        return shapes | {name: (rounds, *shapes[name][1:]) for name in ("lefts", "rights", "lr")}

    def view(self, theta_D: Tensor) -> State:
        p, q = self.factors.first(theta_D.device)
        return {"theta": theta_D, "q": q, "p": p, "version": torch.tensor(0)}

    def between(self, state: State, index: int, mean_S: Tensor, round: Round) -> State:
        return self.decoder.between(state, index, mean_S, round)

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        p_P, lr = state["p"], torch.tensor(round.lr, dtype=torch.float32, device=mean_S.device)
        g_D = self._product(p_P, mean_S)
        u_D, memory = self.optimizer.direction(unnest(state, "optimizer."), g_D)
        theta_D = self._step(state["theta"], u_D, lr)
        return {
            **self._after(theta_D, self.factors.warm(mean_S), state["version"] + 1),
            "lefts": remember(state["lefts"], p_P, self.keep),
            "rights": remember(state["rights"], mean_S, self.keep),
            "lr": remember(state["lr"], lr, self.keep),
            **nest(memory, "optimizer."),
        }

    def _product(self, p_P: Tensor, mean_S: Tensor) -> Tensor:
        """P̂ Qᵀ, in memory that the next one takes."""
        g_1D = fast.scratch("product", 1, self.factors.layers.spec_size, mean_S.device)
        return self.factors.product(p_P, mean_S[None], g_1D)[0]

    def _step(self, theta_D: Tensor, u_D: Tensor, lr: Tensor) -> Tensor:
        step_1D = fast.scratch("product", 1, len(theta_D), theta_D.device)  # it may be u itself
        return torch.sub(theta_D, torch.mul(u_D, lr, out=step_1D[0]), out=pages.empty_like(theta_D))

    def _after(self, theta_D: Tensor, q_Q: Tensor, version: Tensor) -> State:
        # P̂ was this round's: what stands between rounds must follow from a download.
        return {"theta": theta_D, "q": q_Q, "p": self.factors.first(theta_D.device)[0], "version": version}

    def download(self, state: State, seen: int) -> Message:
        rounds = missed_rounds(state, seen, ("lefts", "rights", "lr"))
        if rounds is None:
            return Message({"theta": state["theta"][None], "q": state["q"][None]})
        return rounds

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        rows = {"lefts": (-1, self.factors.p_size), "rights": (-1, self.factors.size), "lr": (-1,)}
        whole = {"theta": (self.factors.layers.spec_size,), "q": (-1,)}
        return {name: (torch.float32, row) for name, row in {**rows, **whole}.items()}

    def reconcile(self, view: State, message: Message, version: int) -> State:
        arrays = message.arrays
        if "theta" in arrays:
            return self._after(arrays["theta"][0], arrays["q"][0], torch.tensor(version))
        theta_D, q_Q = view["theta"], view["q"]
        rounds = zip(arrays["lefts"][0], arrays["rights"][0], arrays["lr"][0], strict=True)
        for p_P, mean_S, lr in rounds:
            theta_D = self._step(theta_D, self._product(p_P, mean_S), lr)
            q_Q = self.factors.warm(mean_S)
        return self._after(theta_D, q_Q, torch.tensor(version))

    def shared(self, state: State) -> State:
        return self.decoder.shared(state)


def build(options: PowerOptions, spec: Spec, setup: Setup) -> Method:
    factors = Factors(spec, options.rank, setup.seed)
    up = Right(spec, factors, factors.size, options.feedback)
    # A model without a layer worth factoring is all dense: it needs no first pass.
    first = (Left(spec, factors, factors.p_size, options.feedback),) if factors.p_size else ()
    server = PowerServer(factors, setup.optimizer)
    return Method((*first, up), server, server.decoder)


ENTRY = Entry(
    PowerOptions,
    build,
    summary="two low-rank factors a layer, by a power iteration in common",
    keeps="D residual with feedback, else nothing",
    sums="Σ N·r, then Σ M·r and the dense parameters, over layers of N × M",
    source="Vogels et al. 2019, Algorithms 1 and 2",
    two_passes=True,
    example={"rank": 2, "feedback": True},
)
