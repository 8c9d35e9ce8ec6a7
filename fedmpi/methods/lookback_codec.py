"""LBGM, the look-back gradient multiplier, over any other method.

Source: Azam et al., "Recycling Model Updates in Federated Learning: Are Gradient Subspaces Low-Rank?",
ICLR 2022, Algorithm 1 (all clients) and Algorithm 3 (device sampling). "Over": the inner method's
decoded vector takes the place of the accumulated gradient (section 4, plug-and-play), in the space in
which the inner method sums, so that over subspace coordinates a look-back gradient is d numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, SerializeAsAny, field_validator
from pydantic import Field as Option
from torch import Tensor

from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Round, State, believed, nest, unnest
from fedmpi.methods import table
from fedmpi.methods.base import FeedbackOptions, Options
from fedmpi.methods.dense import DenseOptions
from fedmpi.ops import pages
from fedmpi.ops.flags import refuse
from fedmpi.ops.sums import dots
from fedmpi.validation import Strict


class DeltaSquared(Strict):
    """Theorem 1's condition instead of a fixed δ: sin²α ≤ Δ² / ‖d‖², with d = v/τ the normalised gradient."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    delta_sq: float = Option(gt=0, description="Δ²; Corollary 1 asks for at most η = 1/√(τT)")


class LookBackOptions(FeedbackOptions):
    threshold: float | tuple[float, ...] | DeltaSquared = Option(
        0.2,
        description="δ: a scalar is sent when sin²α ≤ δ; a list gives each client its own; "
        "{delta_sq: …} is Theorem 1's condition",
    )
    scope: Literal["model", "tensor"] = Option(
        "model", description="decide for the whole model (the paper's text), or for each tensor (its code)"
    )
    keep: Literal["exact", "half", "message", "clustered"] = Option(
        "exact",
        description="how both ends keep a look-back gradient: float32; bfloat16; as the inner message, "
        "which is as small as what was sent; or as the number of a centroid that the server shares out",
    )
    clusters: int = Option(8, ge=1, le=256, description="c, centroids, with keep: clustered")
    inner: Annotated[SerializeAsAny[Options], table.inner_of("lookback")] = Option(
        DenseOptions(name="dense"), description="the method whose messages it recycles"
    )

    @property
    def separable(self) -> bool:
        return self.scope == "tensor" and self.inner.separable

    @field_validator("threshold")
    @classmethod
    def _range(
        cls, value: float | tuple[float, ...] | DeltaSquared
    ) -> float | tuple[float, ...] | DeltaSquared:
        for delta in (
            () if isinstance(value, DeltaSquared) else value if isinstance(value, tuple) else (value,)
        ):
            if not 0 <= delta <= 1:
                raise ValueError("expected δ from 0 to 1")
        return value


class LookBack(Compressor):
    """Sends the look-back coefficient ρ while the gradient's direction hardly changes, else the inner message.

    ρ = ⟨v, l⟩ / ‖l‖² and sin²α = 1 − ⟨v, l⟩² / (‖v‖² ‖l‖²), where v is the decoded inner message and l the
    last one sent in full (the look-back gradient), which both ends keep. A client's first message is sent in
    full, and so is one where v or l has norm zero (ρ and α are undefined) or ρ is no float32.
    """

    def __init__(self, inner: Compressor, options: LookBackOptions) -> None:
        super().__init__(inner.spec, inner.size)
        self.inner, self.threshold, self.keep = inner, options.threshold, options.keep
        self.presence = inner.presence
        self._vector = inner.size - inner.presence  # numbers that have a direction
        self.counters = ("scalars", *inner.counters)
        self._ragged = {name for name, field in inner.layout().items() if field.ragged}
        several = self._ragged - {inner.optional}
        if self.keep == "message" and (several or inner.init_peer() or not inner.replayable):
            raise ConfigError(
                "method.keep: message is for inner methods whose messages have one size and can be decoded "
                "again later; expected exact or half"
            )

    def init(self) -> State:
        return {**self._own(), **nest(self.inner.init())}

    def init_peer(self) -> State:
        return {**self._own(), **nest(self.inner.init_peer())}

    def verify(self, state: State) -> None:
        self.inner.verify(unnest(state))
        if self.keep != "message":
            return
        if bool((state["held"] > 1).any()):
            raise MessageError(f"held: expected 0 or 1, got {int(state['held'].max())}")
        ids_C = torch.arange(len(state["held"]))
        # Replayable: it decodes, or not, in any round.
        self._load(state, Context(Round(0, 0, 1.0), ids_C, torch.ones_like(ids_C)))

    def _own(self) -> State:
        """What stands for the look-back gradient; all zeros, whose norm says that there is none."""
        if self.keep == "message":
            kept = {n: torch.zeros(f.row, dtype=f.dtype) for n, f in self.inner.layout().items()}
            held = torch.zeros((), dtype=torch.uint8)
            return {
                "held": held,
                **nest(kept, "kept."),
                **({"optional": held} if self.inner.optional else {}),
            }
        dtype = torch.bfloat16 if self.keep == "half" else torch.float32
        return {"lookback": torch.zeros(self.size, dtype=dtype)}

    def _load(self, state: State, ctx: Context) -> Tensor:
        """The look-back gradients ``(C, S)`` that a state holds."""
        if self.keep != "message":
            return state["lookback"].float()
        arrays, lengths, optional = unnest(state, "kept."), {}, self.inner.optional
        if optional is not None:
            lengths[optional] = state["optional"].cpu().long()
            arrays[optional] = arrays[optional][_places(lengths[optional] > 0, arrays[optional])]
        v_CS, _ = self.inner.decompress(Message(arrays, lengths), {}, ctx)
        return v_CS.float() * state["held"][:, None]

    def _store(self, state: State, full: Tensor, v_CS: Tensor, inner: Message, *used: Tensor) -> State:
        """This part of a state after the clients ``full`` sent ``inner``, decoded ``v_CS``, in full. Nothing of it lies
        in the memory of tensors that are ``used`` again."""
        if self.keep != "message":
            kept = {"lookback": _apart(v_CS, *inner.arrays.values(), *used).to(state["lookback"].dtype)}
        else:
            held = torch.ones(len(full), dtype=torch.uint8, device=v_CS.device)
            arrays = {name: _apart(array, *used) for name, array in inner.arrays.items()}
            kept = {"held": held}
            if (optional := self.inner.optional) is not None:
                rows_F, array = inner.lengths[optional], arrays[optional]
                arrays[optional] = array.new_zeros(len(full), *array.shape[1:])
                arrays[optional][_places(rows_F > 0, array)] = array
                kept["optional"] = rows_F.to(torch.uint8).to(array.device)
            kept |= nest(arrays, "kept.")
        return put_rows(state, full, kept)

    def _threshold(self, vv_C: Tensor, ctx: Context) -> Tensor | float:
        if isinstance(self.threshold, DeltaSquared):
            return self.threshold.delta_sq * ctx.steps_C.to(vv_C.device).double() ** 2 / vv_C
        if isinstance(self.threshold, tuple):
            return torch.tensor(self.threshold, dtype=torch.float64)[ctx.clients_C].to(vv_C.device)
        return self.threshold

    def layout(self) -> Layout:
        inner = {f"inner.{name}": field._replace(ragged=True) for name, field in self.inner.layout().items()}
        return {"scalar": Field(torch.uint8), "rho": Field(torch.float32, (), ragged=True), **inner}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        before = unnest(state)
        message, after = self.inner.compress(g_CD, before, ctx)
        v_CS, _ = self.inner.decompress(message, believed(self.inner, before), ctx)
        v_CS = v_CS.float()
        # float64: in float32 the cancellation in 1 − cos² would hide every α below about 0.02.
        n = self._vector
        dot_C, vv_C, ll_C = dots(v_CS[:, :n], self._load(state, ctx)[:, :n])
        sin2_C = (1 - dot_C * dot_C / (vv_C * ll_C)).clamp(0, 1)
        rho_C = (dot_C / ll_C).float()  # infinite where l is too short for a float32 to say how often it fits
        scalar_C = (vv_C > 0) & (ll_C > 0) & (sin2_C <= self._threshold(vv_C, ctx)) & rho_C.isfinite()
        tag_C = scalar_C.to(torch.uint8)
        scalar_C = scalar_C.cpu()  # who sends what: the host has to know
        full = (~scalar_C).nonzero()[:, 0]
        sent = message.select(full)
        arrays = {"scalar": tag_C, "rho": rho_C[_places(scalar_C, rho_C)]}
        lengths = {"rho": scalar_C.long()}
        for name, array in sent.arrays.items():
            arrays[f"inner.{name}"] = array
            rows = sent.lengths.get(name, torch.ones_like(full))
            lengths[f"inner.{name}"] = torch.zeros_like(lengths["rho"]).index_copy(0, full, rows)
        kept_FS = v_CS if len(full) == len(v_CS) else v_CS[full.to(v_CS.device)]
        new = {**self._store(state, full, kept_FS, sent, g_CD), **nest(after)}
        return Message(arrays, lengths), new

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        scalar_C = self._scalars(message)
        full = (~scalar_C).nonzero()[:, 0]
        sent = self._sent(message, full)
        there_F = full.to(message.arrays["scalar"].device)
        inner_peer = {name: value[there_F] for name, value in unnest(peer).items()}
        v_FS, inner_peer = self.inner.decompress(sent, inner_peer, ctx.select(full))
        v_FS = v_FS.float()
        rho = message.arrays["rho"]
        rho_C = rho.new_ones(len(scalar_C)).index_copy(0, _places(scalar_C, rho), rho)
        new = {**self._store(peer, full, v_FS, sent), **put_rows(peer, full, nest(inner_peer))}
        if len(full) == len(scalar_C):
            return v_FS, new
        l_CS = self._load(peer, ctx)
        v_CS = pages.empty_like(l_CS)
        for v_S, l_S, rho in zip(v_CS, l_CS, rho_C, strict=True):
            torch.mul(l_S, rho, out=v_S)
        v_CS[:, self._vector :] = l_CS[:, self._vector :]  # who had a gradient, not how often
        return v_CS.index_copy_(0, there_F, v_FS), new

    def _sent(self, message: Message, full: Tensor) -> Message:
        """The inner message of the clients ``full``, who sent one."""
        return Message(
            {name: message.arrays[f"inner.{name}"] for name in self.inner.layout()},
            {name: message.lengths[f"inner.{name}"][full] for name in self._ragged},
        )

    def _scalars(self, message: Message) -> Tensor:
        """Who sent ρ alone: bool, on the CPU, from the row counts, which are there.

        Raises:
          MessageError: row counts that do not fit the tags, or each other.
        """

        def misfit(name: str) -> MessageError:
            return MessageError(f"message: the row counts of {name} do not fit the clients' tags")

        tag_C, of_C = message.arrays["scalar"], message.lengths["rho"]
        refuse((tag_C != of_C.to(tag_C.device)).any(), lambda: misfit("rho"))
        if bool((of_C > 1).any()):
            raise misfit("rho")
        for name, rows_C in message.lengths.items():
            if name.removeprefix("inner.") in self._ragged:
                fits = not bool(rows_C[of_C == 1].any())
            else:
                fits = torch.equal(rows_C, of_C if name == "rho" else 1 - of_C)
            if not fits:
                raise misfit(name)
        return of_C.bool()

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.inner.lift(v_CS, ctx)

    def count(self, message: Message) -> dict[str, int]:
        return {"scalars": int(message.arrays["scalar"].sum()), **dict.fromkeys(self.inner.counters, 0)}


def _places(which_C: Tensor, there: Tensor) -> Tensor:
    """Where those are, who are known on the CPU: int64, on another tensor's device."""
    return which_C.nonzero()[:, 0].to(there.device)


def _apart(x: Tensor, *others: Tensor) -> Tensor:
    """A copy where ``x`` lies in others' memory, which may be used for the next message or gradient."""
    memory = {other.untyped_storage().data_ptr() for other in others}
    return x.clone() if x.untyped_storage().data_ptr() in memory else x


def put_rows(state: State, full: Tensor, rows: State) -> State:
    """These entries of a state, with ``rows`` for the clients ``full`` (increasing): nothing is copied where that is
    everybody, or nobody."""

    def put(old: Tensor, value: Tensor) -> Tensor:
        if len(full) in (0, len(old)):
            return value if len(full) else old
        return old.index_copy(0, full.to(old.device), value)

    return {name: put(state[name], value) for name, value in rows.items()}
