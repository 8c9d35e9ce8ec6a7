"""Prune-m: after the first epoch only m parameters are left, and a sparsifier works among them.

Source: "Stationarity of Crucial Gradients in Deep Neural Networks", Algorithm 1 and sections 3.2
and 4: the positions of the largest gradients hardly move, so those of the first epoch serve as a mask.

Readings, where the paper is terse or contradicts itself:

- Algorithm 1 has one round an epoch and finds the mask in an average of compressed gradients, which has
  at most W·k non-zeros, in the paper's own setting fewer than m. ``mask_from: compressed`` is that;
  ``dense`` is section 3.2: clients send whole gradients in the first epoch. Either way the means of all
  rounds of the first epoch are added up, and the model learns from them in the meantime. ``auxiliary`` is
  section 4: the server trains on data of its own as a client does in a round, and prunes θ₀. ``client`` is for
  clients with different data, where one mask does not fit all: see :mod:`fedmpi.methods.prune_clients`.
- The m entries of that sum with the largest magnitudes are kept. Equal ones (zeros above all) are taken
  in an order that the run's seed draws.
- At the end of the epoch's last round: average, select, prune, then update the survivors with that average.
  The server optimizer's memory and error feedback of what was pruned are dropped.
- Pruned parameters are gone for clients, too: they stay zero during local steps.
- k is a share of all parameters (equation 6), before and after; k ≤ r ≤ m ≤ D.

A client that does not know the mask downloads it, as m indices or as a bit map of D bits, whichever is smaller;
from then on indices, either way, count among the m survivors.

Shape suffixes: C clients, D parameters, M survivors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field as Option
from pydantic import SerializeAsAny
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Layout, Message
from fedmpi.method import Compressor, Context, Method, Round, State, nest, unnest
from fedmpi.methods import table
from fedmpi.methods.base import (
    Entry,
    MeanServer,
    Options,
    Setup,
    apply_changes,
    count_of,
    pack_changes,
    shape_of_changes,
)
from fedmpi.methods.dense import Dense
from fedmpi.methods.prune_clients import ClientMasks, as_indices
from fedmpi.methods.rtopk import RTopKOptions
from fedmpi.methods.topk import TopKOptions
from fedmpi.ops import bits
from fedmpi.ops.select import top_by_key
from fedmpi.ops.steps import add_at, changed_since, step
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec

_NEAR_ZERO = 0.1


class PruneOptions(Options):
    keep: float = Option(0.1, gt=0, le=1, description="m as a share of the parameters")
    m: int | None = Option(None, description="number of parameters kept; overrides keep")
    mask_from: Literal["dense", "compressed", "auxiliary", "client"] = Option(
        "dense",
        description="what chooses the mask. dense: the mean of whole gradients, which clients send in the first "
        "epoch; compressed: that of the inner method's messages, as in Algorithm 1; auxiliary: the gradient "
        "of the server's own samples, before round 0; client: each client's own first gradient chooses a mask for "
        "itself, which it uploads, and the model keeps the union of those of the first epoch",
    )
    samples: int = Option(
        256, ge=1, description="auxiliary: the server's samples, a random part of the training set"
    )
    init: Literal["default", "near_zero"] = Option(
        "default",
        description="near_zero: a tenth of the model's own initial values, so that pruning moves it less",
    )
    inner: Annotated[SerializeAsAny[TopKOptions], table.inner_of("prune")] = Option(
        TopKOptions.model_validate({"name": "topk"}),
        description="topk or rtopk; its k is a share of all parameters",
    )


class Prune(Compressor):
    """``before`` codes gradients of D numbers until there is a mask, ``after`` those of the m survivors.

    A message has the arrays of both, one of them without rows; which one, both ends know from the mask.
    Error feedback takes its residual over: the first time that a client codes under the mask, what
    it has not yet sent of the survivors moves on, and the rest is dropped.
    """

    replayable = False  # a message is decoded with the mask of its round

    def __init__(self, spec: Spec, before: Compressor, after: Compressor) -> None:
        super().__init__(spec)
        self.parts = {"before.": before, "after.": after}

    def init(self) -> State:
        return {name: value for p, up in self.parts.items() for name, value in nest(up.init(), p).items()}

    def layout(self) -> Layout:
        return {
            prefix + name: field._replace(ragged=True)
            for prefix, up in self.parts.items()
            for name, field in up.layout().items()
        }

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        kept_M, new = ctx.shared["kept"], dict(state)
        prefix = self._phase(kept_M)
        if len(kept_M):
            g_CD = g_CD[:, kept_M]
            if "before.residual" in state:
                new["after.residual"] = state["after.residual"] + state["before.residual"][:, kept_M]
                new["before.residual"] = torch.zeros_like(state["before.residual"])
        message, after = self.parts[prefix].compress(g_CD, unnest(new, prefix), ctx)
        return self._framed(message, prefix), new | nest(after, prefix)

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        kept_M = ctx.shared["kept"]
        prefix = self._phase(kept_M)
        for name, rows_C in message.lengths.items():
            if bool((rows_C != int(name.startswith(prefix))).any()):
                raise MessageError(
                    f"message: {rows_C.tolist()} rows of {name!r}, expected {int(name.startswith(prefix))} of "
                    f"each client {prefix.rstrip('.')} the pruning"
                )
        v_CM, _ = self.parts[prefix].decompress(Message(unnest(message.arrays, prefix)), {}, ctx)
        if not len(kept_M):
            return v_CM, peer
        return v_CM.new_zeros(len(v_CM), self.size).index_copy_(1, kept_M, v_CM), peer

    def _phase(self, kept_M: Tensor) -> str:
        return "after." if len(kept_M) else "before."

    def _framed(self, message: Message, prefix: str) -> Message:
        layout, arrays = self.layout(), nest(message.arrays, prefix)
        device = next(iter(arrays.values())).device
        empty = {
            name: torch.empty(0, *field.row, dtype=field.dtype, device=device)
            for name, field in layout.items()
        }
        rows = {name: torch.full((message.clients,), int(name in arrays)) for name in layout}
        return Message(empty | arrays, rows)


class PruneServer(MeanServer):
    """Federated averaging, over all parameters until the first epoch is over, then over the survivors.

    ``kept`` are the survivors' indices, int64, increasing, and none before there is a mask; ``pruned`` is the
    version with which it came. What scores them is the last D of the numbers that sum: the gradient itself,
    of which the largest ``m`` survive, or votes beside it, of which any one suffices (``m`` None).
    """

    def __init__(
        self, spec: Spec, optimizer: Optimizer, m: int | None, scale: float, key: int, samples: int
    ) -> None:
        super().__init__(spec, optimizer, sparse=True)
        self.m, self.scale, self.key, self.samples = m, scale, key, samples

    def view(self, theta_D: Tensor) -> State:
        return super().view(theta_D * self.scale) | {"kept": theta_D.new_empty(0, dtype=torch.int64)}

    def init(self, theta_D: Tensor) -> State:
        return super().init(theta_D) | {"sum": torch.zeros_like(theta_D), "pruned": torch.tensor(0)}

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        shapes, kept = super().shapes(theta_D, state), len(state["kept"])
        if kept:  # the mask is chosen, and the optimizer's memory is the survivors'
            shapes["sum"] = (0,)
            shapes |= {name: (kept,) for name in shapes if name.startswith("optimizer.")}
        return shapes

    def shared(self, state: State) -> State:
        return {"kept": state["kept"]}

    def prepare(self, state: State, g_D: Tensor) -> State:
        return self._prune(state, g_D) | {"version": state["version"] + 1}

    def facts(self, state: State) -> dict[str, float]:
        return {"stored_params": len(state["kept"]) or self.size}

    def frozen(self, state: State) -> Tensor | None:
        if not len(state["kept"]):
            return None
        return torch.ones_like(state["theta"], dtype=torch.bool).index_fill_(0, state["kept"], False)

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        if not len(state["kept"]):
            sum_D = step(state["sum"], mean_S[-self.size :], 1.0)
            if not round.ends_epoch:
                return {**state, "sum": sum_D} | super().finish(state, mean_S[: self.size], round)
            state = self._prune(state, sum_D)
        kept_M = state["kept"]
        u_M, memory = self.optimizer.direction(unnest(state, "optimizer."), mean_S[kept_M])
        theta_D = add_at(state["theta"], kept_M, u_M, -round.lr)
        return state | self.moved(state, theta_D, kept_M) | nest(memory, "optimizer.")

    def _select(self, sum_D: Tensor) -> Tensor:
        """The survivors, by their gradients' sums or by their votes."""
        if self.m is None:
            return sum_D.nonzero()[:, 0]
        # What has left the numbers is kept, so that the engine finds it in the parameters.
        return top_by_key(sum_D.nan_to_num(math.inf), self.m, self.key)

    def _prune(self, state: State, sum_D: Tensor) -> State:
        """``state`` without all that do not survive; version unchanged."""
        kept_M = self._select(sum_D)
        theta_D = torch.zeros_like(state["theta"]).index_copy_(0, kept_M, state["theta"][kept_M])
        memory = {name: value[kept_M] for name, value in unnest(state, "optimizer.").items()}
        pruned = {"theta": theta_D, "kept": kept_M, "pruned": state["version"] + 1, "sum": sum_D[:0]}
        return state | pruned | nest(memory, "optimizer.")

    def download(self, state: State, seen: int) -> Message:
        kept_M = state["kept"]
        if not len(kept_M):
            return super().download(state, seen)
        arrays = pack_changes(state["theta"][kept_M], state["changed"][kept_M] > seen)
        return Message(arrays | (self._mask(kept_M) if seen < int(state["pruned"]) else {}))

    def sizes(self, state: State, seen: Sequence[int]) -> list[Message]:
        kept_M = state["kept"]
        if not (len(kept_M) and seen):  # who keeps only a view is asked for none
            return super().sizes(state, seen)
        counts, masks = changed_since(state["changed"][kept_M], list(seen)), self._mask(kept_M)
        return [
            Message(shape_of_changes(count, len(kept_M)) | (masks if version < int(state["pruned"]) else {}))
            for version, count in zip(seen, counts, strict=True)
        ]

    def _mask(self, kept_M: Tensor) -> dict[str, Tensor]:
        """The mask's array of a download."""
        if as_indices(len(kept_M), self.size):
            return {"mask.index": bits.pack_integers(kept_M[None], bits.index_width(self.size))}
        mask_D = torch.zeros(self.size, dtype=torch.bool, device=kept_M.device).index_fill_(0, kept_M, True)
        return {"mask.map": bits.pack(mask_D[None])}

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        masks = dict.fromkeys(("mask.index", "mask.map"), (torch.uint8, (-1,)))
        return {**(super().downloads() or {}), **masks}

    def reconcile(self, view: State, message: Message, version: int) -> State:
        arrays, kept_M = message.arrays, view["kept"]
        if "mask.index" in arrays:
            kept_M = self._indices(arrays["mask.index"][0])
        elif "mask.map" in arrays:
            kept_M = bits.unpack(arrays["mask.map"], self.size)[0].nonzero()[:, 0]
        if not len(kept_M):
            return super().reconcile(view, message, version) | {"kept": kept_M}
        theta_M = apply_changes(view["theta"][kept_M], arrays)
        theta_D = torch.zeros_like(view["theta"]).index_copy_(0, kept_M, theta_M)
        return {"theta": theta_D, "version": torch.tensor(version), "kept": kept_M}

    def _indices(self, packed: Tensor) -> Tensor:
        """A mask's indices: as many as were packed, which the bytes tell but for zeros that fill them up."""
        width = bits.index_width(self.size)
        if not width:  # a model of one parameter
            return packed.new_zeros(1, dtype=torch.int64)
        index_N = bits.unpack_integers(packed, 8 * len(packed) // width, width)
        return index_N[: int(index_N.argmax()) + 1]  # they increase


def build(options: PruneOptions, spec: Spec, setup: Setup) -> Method:
    """Prune-m over top-k or rTop-k for a layout.

    Raises:
      ConfigError: not k ≤ r ≤ m ≤ D.
    """
    m = count_of("method.m", options.keep, options.m, spec.size)
    k = count_of("method.inner.k", options.inner.ratio, options.inner.k, spec.size)
    if k > m:
        raise ConfigError(f"method.inner.k: expected at most m = {m} (the parameters kept), got {k}")
    inner = options.inner.model_copy(update={"k": k})
    if isinstance(inner, RTopKOptions) and inner.r is not None and not k <= inner.r <= m:
        raise ConfigError(f"method.inner.r: expected k = {k} to m = {m} (the parameters kept), got {inner.r}")
    after = table.build(inner, Spec(("survivors",), ((m,),)), setup).up
    scale = _NEAR_ZERO if options.init == "near_zero" else 1.0
    key = random.key(setup.seed, stream="ties of the mask")
    samples = options.samples if options.mask_from == "auxiliary" else 0
    if options.mask_from == "client":
        return Method(
            (ClientMasks(spec, after, key),), PruneServer(spec, setup.optimizer, None, scale, key, 0)
        )
    before = table.build(inner, spec, setup).up if options.mask_from == "compressed" else Dense(spec)
    return Method((Prune(spec, before, after),), PruneServer(spec, setup.optimizer, m, scale, key, samples))


ENTRY = Entry(
    PruneOptions,
    build,
    summary="m parameters survive the first epoch, top-k or rTop-k among them",
    keeps="nothing (with feedback m residual, and D more with mask_from: compressed); "
    "with mask_from: client its mask, D bits, at both ends",
    sums="D; 2 D with mask_from: client",
    source="Stationarity of Crucial Gradients in Deep Neural Networks, Algorithm 1",
    wraps=("topk", "rtopk"),
    example={"keep": 0.3, "mask_from": "compressed", "inner": {"name": "topk", "ratio": 0.05}},
    variants={"of clients": {"mask_from": "client", "inner": {"name": "rtopk", "k": 12, "feedback": True}}},
)
