"""FetchSGD: clients send Count-Sketches, momentum and error feedback happen in the sketch at the server.

Source: Rothchild et al., "FetchSGD: Communication-Efficient Federated Learning with Sketching", ICML 2020,
Algorithm 1. With S the mean of the clients' sketches, ρ the momentum, S_u and S_e the momentum and error
sketches and U the estimate of all coordinates (the median over rows):

    S_u ← ρ S_u + S,  S_e ← S_e + η S_u,  Δ = top-k(U(S_e)),  S_e ← S_e − S(Δ),  w ← w − Δ

Readings. ``removal: subtract`` is the algorithm; with few buckets for k it feeds estimation errors back until
it diverges. ``clear``, which the authors' code has instead, sets the buckets where S(Δ) ≠ 0 to zero in both
sketches. A client downloads the coordinates that changed since it last came (line 6: "possibly sparse"). A
row needs at least k buckets: in fewer, some of Δ's k coordinates always share one.

Shape suffixes: C clients, D parameters, K coordinates of an update, S = rows · columns.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Decoder, Method, Round, State, placed
from fedmpi.methods.base import Entry, MeanServer, Options, Setup, count_of
from fedmpi.ops.select import top_k
from fedmpi.ops.sketch import CountSketch
from fedmpi.ops.steps import add_at
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec


class FetchSgdOptions(Options):
    rows: int = Option(5, ge=1, le=99, description="the sketch's rows; an odd number has a true median")
    columns: int = Option(ge=1, le=1 << 31, description="buckets in a row, at least k")
    k: int = Option(ge=1, description="parameters that change in a round")
    momentum: float = Option(0.9, ge=0, lt=1, description="ρ, the server's, in the sketch")
    removal: Literal["subtract", "clear"] = Option(
        "subtract",
        description="how Δ leaves the sketches. subtract: S(Δ) from the error, as in Algorithm 1; clear: its "
        "buckets become zero in both, as in the authors' code (stable from fewer columns on)",
    )


class Sketch(Compressor):
    """Sends the Count-Sketch of the gradient."""

    additive = True

    def __init__(self, spec: Spec, sketch: CountSketch) -> None:
        super().__init__(spec, sketch.length)
        self.sketch = sketch

    def layout(self) -> Layout:
        return {"sketch": Field(torch.float32, (self.size,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        return Message({"sketch": self.sketch.encode(g_CD)}), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        return message.arrays["sketch"], peer

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.sketch.estimate(v_CS)

    def transpose(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.sketch.transpose(v_CS)  # the lift takes medians


class FetchDecoder(Decoder):
    """Algorithm 1, lines 10 to 14: momentum and error, sketched, and their top k."""

    def __init__(self, sketch: CountSketch, options: FetchSgdOptions) -> None:
        self.sketch, self.k, self.momentum = sketch, options.k, options.momentum
        self.clear = options.removal == "clear"

    def memory(self) -> State:
        return {name: torch.zeros(self.sketch.length) for name in ("momentum", "error")}

    def direction(
        self, memory: State, mean_S: Tensor, round: Round, out: Tensor | None = None
    ) -> tuple[Tensor, State]:
        index_K, delta_K, memory = self.step(memory, mean_S, lr=1.0)
        return mean_S.new_zeros(self.sketch.size).index_add(0, index_K, delta_K), memory

    def step(self, memory: State, mean_S: Tensor, lr: float) -> tuple[Tensor, Tensor, State]:
        """Where and what Δ is, and the sketches without it."""
        momentum_S = self.momentum * memory["momentum"] + mean_S
        error_S = memory["error"].add(momentum_S, alpha=lr)
        # A run that has left the numbers goes on to the parameters, where the engine finds and names it.
        u_D = self.sketch.estimate(error_S[None])[0].nan_to_num_(math.inf, math.inf, -math.inf)
        index_K = top_k(u_D[None], self.k)[0]
        delta_K = u_D[index_K]
        sketch_S = self.sketch.encode(delta_K[None], index_K)[0]
        if self.clear:
            momentum_S, error_S = (s_S.masked_fill(sketch_S != 0, 0) for s_S in (momentum_S, error_S))
        else:
            error_S = error_S - sketch_S
        return index_K, delta_K, {"momentum": momentum_S, "error": error_S}


class FetchServer(MeanServer):
    """Algorithm 1, line 15, with the sparse download."""

    def __init__(self, spec: Spec, decoder: FetchDecoder) -> None:
        super().__init__(spec, Optimizer(), sparse=True)
        self.decoder = decoder

    def init(self, theta_D: Tensor) -> State:
        return super().init(theta_D) | placed(self.decoder.memory(), theta_D.device)

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        index_K, delta_K, memory = self.decoder.step(state, mean_S, round.lr)
        theta_D = add_at(state["theta"], index_K, delta_K, -1)
        return self.moved(state, theta_D, index_K) | memory


def build(options: FetchSgdOptions, spec: Spec, setup: Setup) -> Method:
    """FetchSGD for a layout.

    Raises:
      ConfigError: k exceeds the model or a row's buckets, or the server has an optimizer of its own.
    """
    k = count_of("method.k", None, options.k, spec.size)
    if options.columns < k:
        raise ConfigError(
            f"method.columns: expected at least k = {k}, for a row to keep k coordinates apart, "
            f"got {options.columns}"
        )
    if setup.optimizer.name != "sgd":
        raise ConfigError(
            f"server.optimizer: expected sgd with fetchsgd, whose momentum is method.momentum, "
            f"got {setup.optimizer.name}"
        )
    key = random.key(setup.seed, stream="sketch")
    sketch = CountSketch(spec.size, options.rows, options.columns, key)
    decoder = FetchDecoder(sketch, options)
    return Method((Sketch(spec, sketch),), FetchServer(spec, decoder), decoder)


ENTRY = Entry(
    FetchSgdOptions,
    build,
    summary="Count-Sketches; the server keeps momentum and error sketched, and un-sketches the top k",
    keeps="nothing",
    sums="rows · columns",
    source="Rothchild et al. 2020, Algorithm 1",
    example={"rows": 3, "columns": 40, "k": 20},
    variants={"clear": {"rows": 4, "removal": "clear"}},
)
