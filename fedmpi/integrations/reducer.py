"""Averages the named gradients of all ranks, compressed by any method whose server only averages.

What every drop-in shares: which parameters go exactly, which together, where a method's state is kept (by
parameter name), when a step counts. Who fills the gradients in, and when, is the drop-in's affair.

Shape suffixes: D parameters of a group, S summed numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedmpi import methods, random
from fedmpi.comm.agree import agree, versions
from fedmpi.comm.base import Comm
from fedmpi.engine import exchange as exchanges
from fedmpi.errors import ConfigError
from fedmpi.message import Message, concat, from_bytes, to_bytes
from fedmpi.method import Compressor, Context, Round, State, believed
from fedmpi.methods.base import Options, Setup
from fedmpi.ops import fast
from fedmpi.spec import Spec
from fedmpi.validation import describe

Shapes = Mapping[str, tuple[int, ...]]


class Settings(BaseModel):
    """How a method is applied to a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int = Field(0, ge=0, lt=2**63, description="the same on every rank")
    exact_below: int = Field(
        1024,
        ge=0,
        description="tensors of fewer numbers and those of one dimension (norms, biases) are averaged exactly; "
        "0: none are",
    )
    start_after: int = Field(0, ge=0, description="steps that are averaged exactly before compression starts")
    steps_per_epoch: int = Field(1, ge=1, description="steps for which time-varying subspaces stay")
    group_mb: float = Field(
        25.0,
        gt=0,
        description="parameters that are compressed and sent together, in MB of float32; methods whose numbers "
        "count over the whole model (k, dim, a sketch) take all in one",
    )
    exchange: exchanges.Way = Field(
        "auto", description="how messages meet: sum, gather, merge, owner (fedmpi/engine/exchange.py)"
    )

    @classmethod
    def of(cls, **settings: Any) -> Settings:
        """Raises:
        ConfigError: an unknown setting, or a value of the wrong type or range.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(describe(error, cls)) from None

    def exact(self, shape: tuple[int, ...]) -> bool:
        """A tensor of this shape is averaged exactly."""
        return self.exact_below > 0 and (len(shape) < 2 or math.prod(shape) < self.exact_below)


class Group:
    """Parameters that are compressed as one vector.

    Attributes:
      names: of the parameters, in the vector's order.
      flat_D: their gradients before :meth:`reduce`, and their mean after it.
      views: the same by name, in their own shapes.
    """

    def __init__(
        self,
        shapes: Shapes,
        options: Options,
        comm: Comm,
        settings: Settings,
        owner: int | None = None,
        room: float = exchanges.GATHER_BYTES,
    ) -> None:
        self.comm, self.settings = comm, settings
        self.spec = Spec(tuple(shapes), tuple(shapes.values()))
        self.names = self.spec.names
        self.flat_D = torch.zeros(self.spec.size)
        self.views = self.spec.views(self.flat_D)
        # A key of its own: equal groups must not draw equal numbers.
        self.seed = random.key(settings.seed, stream=f"group {self.names[0]}")
        setup = Setup(self.seed, comm.size)
        self.method = methods.build(options, self.spec, setup)
        self.plain = methods.build("dense", self.spec, setup)
        up, first = self.method.up, self.method.first
        self.ways = {up: exchanges.build(comm, up, settings.exchange, owner=owner, room=room, packed=True)}
        if first is not None:
            self.ways[first] = exchanges.build(comm, first)
        self.ways[self.plain.up] = exchanges.build(comm, self.plain.up, "sum")
        for way in self.ways.values():
            way.reuse = True  # a mean is copied, or decoded, before the next step
        self.reset()
        self.seconds = dict.fromkeys(("encode", "wire", "decode"), 0.0)
        self.payload = 0

    def reset(self) -> None:
        """Forget all that was kept between steps."""
        self.state: State = {name: value[None].clone() for name, value in self.method.up.init().items()}
        self.memory = self.method.server.memory()
        self.peers = self.ways[self.method.up].init()
        self._after = self.state, self.memory, self.peers

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps between steps."""
        return sum(v.nbytes for part in (self.state, self.memory, self.peers) for v in part.values())

    def reduce(self, step: int, exact: bool) -> bool:
        """Replace this rank's gradients by all ranks' mean; what is kept changes only with :meth:`commit`.

        Returns:
          False when a rank's gradient is not finite: the mean is NaN then, on every rank.
        """
        settings = self.settings
        now = Round(self.seed, step, 1.0, settings.steps_per_epoch)
        usable = _finite(self.flat_D)
        g_1D = (self.flat_D if usable else torch.zeros_like(self.flat_D))[None]
        if exact:
            mean_S, _, _ = self._pass(self.plain.up, g_1D, {}, {}, self._context(now, {}), usable)
            after = self.state, self.memory, self.peers
        else:
            mean_S, after = self._compressed(g_1D, now, usable)
        if mean_S is None:
            self.flat_D.fill_(math.nan)
            return False
        self._after = after
        if mean_S.data_ptr() != self.flat_D.data_ptr():
            self.flat_D.copy_(mean_S)
        return True

    def _compressed(
        self, g_1D: Tensor, now: Round, usable: bool
    ) -> tuple[Tensor | None, tuple[State, State, State]]:
        up, first, server = self.method.up, self.method.first, self.method.server
        state, memory, before = self.state, self.memory, (self.state, self.memory, self.peers)
        if first is not None:
            ctx = self._context(now, server.shared(memory))
            mean_S, state, _ = self._pass(first, g_1D, state, {}, ctx, usable)
            if mean_S is None:
                return None, before
            memory = server.first(memory, mean_S, now)
        ctx = self._context(now, server.shared(memory))
        mean_S, state, peers = self._pass(up, g_1D, state, self.peers, ctx, usable)
        if mean_S is None:
            return None, before
        started = perf_counter()
        g_D, memory = server.gradient(memory, mean_S, now, self.flat_D)
        self.seconds["decode"] += perf_counter() - started
        return g_D, (state, memory, peers)

    def _context(self, now: Round, shared: State) -> Context:
        return Context(now, torch.tensor([self.comm.rank]), torch.ones(1, dtype=torch.int64), shared)

    def _pass(
        self, codec: Compressor, g_1D: Tensor, state: State, peers: State, ctx: Context, usable: bool
    ) -> tuple[Tensor | None, State, State]:
        way = self.ways[codec]
        started, wired = perf_counter(), way.wire
        message, after = codec.compress(g_1D, state, ctx)
        encoded = perf_counter()
        mean_S, peers = way.mean(message, state, peers, ctx, usable)
        wire = way.wire - wired
        self.seconds["encode"] += encoded - started
        self.seconds["wire"] += wire
        self.seconds["decode"] += perf_counter() - encoded - wire
        self.payload += int(message.nbytes()[0])
        return mean_S, after, peers

    def commit(self) -> None:
        """The step counts."""
        old = self.state.get("residual")
        self.state, self.memory, self.peers = self._after
        if old is not None and old is not self.state["residual"]:
            fast.give_back(old)  # for the next step's: fresh memory costs more than all that is done with it

    def rollback(self) -> None:
        """The step does not count."""
        self._after = self.state, self.memory, self.peers

    def believe(self) -> None:
        """Make the peers' state from what the ranks' own states say of it. Called by all ranks."""
        way, up = self.ways[self.method.up], self.method.up
        if not up.init_peer() or not isinstance(way, exchanges.GatherExchange):
            return
        frames = self.comm.allgather(to_bytes(Message(believed(up, self.state))))
        if way.init():
            self.peers = concat([from_bytes(frame) for frame in frames]).arrays
        self.rollback()


class Reducer:
    """All groups of a job.

    Attributes:
      groups: in the order in which a backward pass is expected to fill them.
      step: steps that counted.
      skipped: steps that did not, for a gradient that was not finite.
    """

    def __init__(
        self, shapes: Shapes, method: Options | dict[str, Any] | str, comm: Comm, **settings: Any
    ) -> None:
        """Args:
          shapes: of all parameters that get gradients, in the model's order; the same on every rank.
          method: its options, as in a configuration.
          comm: this rank's end. All calls come from one thread.
          settings: fields of :class:`Settings`.

        Raises:
          ConfigError: settings or options that are wrong, or a method that cannot be a drop-in.
          CommError: the ranks disagree on any of this.
        """
        self.settings = Settings.of(**settings)
        self.options, self.comm = methods.parse(method), comm
        self._agree(shapes)
        exact, compressed = self._split(shapes)
        dense = methods.parse("dense")
        self.groups: list[Group] = []
        self._exact: list[Group] = []
        if compressed:
            separable = self.options.separable
            if self.settings.exchange == "owner" and not separable:
                raise ConfigError(
                    f"exchange: owner averages parts of the model apart, and {self.options.name} with these options "
                    "is one for the whole model (lookback: scope: tensor is not); expected gather or sum"
                )
            parts = self._parts(compressed) if separable else [compressed]
            for i, part in enumerate(parts):
                owner, room = i % comm.size if separable else None, exchanges.GATHER_BYTES / len(parts)
                self.groups.append(Group(part, self.options, comm, self.settings, owner, room))
        if exact:
            plain = self.settings.model_copy(update={"exchange": "auto"})
            self._exact.append(Group(exact, dense, comm, plain))
            self.groups += self._exact
        self.group_of = {name: i for i, group in enumerate(self.groups) for name in group.names}
        self.size = sum(group.spec.size for group in self.groups)
        self.step = self.skipped = 0
        self._results: dict[int, bool] = {}
        self._reduced = self._past = 0
        self._sent0, self._received0 = comm.sent, comm.received

    def _agree(self, shapes: Shapes) -> None:
        mine = {"method": self.options.model_dump(mode="json"), **self.settings.model_dump(mode="json")}
        agree(
            self.comm,
            {**versions(), **mine, "parameters": {n: list(shape) for n, shape in shapes.items()}},
        )

    def _split(self, shapes: Shapes) -> tuple[Shapes, Shapes]:
        """The parameters that go exactly, and the others."""
        exact = {n: s for n, s in shapes.items() if self.settings.exact(s)}
        return exact, {n: s for n, s in shapes.items() if n not in exact}

    def _parts(self, shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
        """Groups of at most ``group_mb``, from the last parameter to the first, as gradients become ready."""
        total = sum(map(math.prod, shapes.values()))
        limit = self.settings.group_mb * 2**20 / 4
        if self.settings.exchange == "owner":
            limit = min(limit, total / self.comm.size)
        parts: list[dict[str, tuple[int, ...]]] = []
        room = 0.0
        for name in reversed(list(shapes)):
            if not parts or math.prod(shapes[name]) > room:
                parts.append({})
                room = limit
            parts[-1][name] = shapes[name]
            room -= math.prod(shapes[name])
        return parts

    def reduce(self, index: int) -> None:
        """Average group ``index``; with the last one of a step the step is over. All ranks in the same order."""
        group = self.groups[index]
        exact = group in self._exact or self.step < self.settings.start_after
        self._results[index] = group.reduce(self.step, exact)
        if len(self._results) == len(self.groups):
            self._finish()

    def _finish(self) -> None:
        usable = all(self._results.values())
        self._reduced += 1
        for group in self.groups:
            if usable:
                group.commit()
            else:
                group.rollback()
        self.step += usable
        self.skipped += not usable
        self._results.clear()

    @torch.no_grad()
    def average(self, parameters: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """One step: replace each parameter's gradient by the mean over all ranks; a missing one counts as zero.

        Args:
          parameters: by name, those of ``shapes``.
          scale: what the gradients are multiplied by (a GradScaler's): what is kept must not change with it.
        """
        for index, group in enumerate(self.groups):
            for name, view in group.views.items():
                p = parameters[name]
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                view.copy_(p.grad).div_(scale)
            self.reduce(index)
            for name, view in group.views.items():
                gradient = parameters[name].grad
                assert gradient is not None
                gradient.copy_(view * scale)

    def passed(self, payload: int, last: bool) -> None:
        """A part of a step's gradients that the drop-in averaged by itself, sending so many bytes, or the ``last``."""
        self._past += payload
        self.comm.sent += payload
        self.comm.received += payload
        self._reduced += last
        self.step += last

    def stats(self) -> dict[str, Any]:
        """What all steps so far came to on this rank: bytes and seconds."""
        payload = self._past + sum(group.payload for group in self.groups)
        full = 4 * self.size * self._reduced
        return {
            "method": self.options.name,
            "steps": self.step,
            "skipped": self.skipped,
            "payload_bytes": payload,
            "uncompressed_bytes": full,
            "ratio": full / payload if payload else math.nan,
            "wire_sent_bytes": self.comm.sent - self._sent0,
            "wire_received_bytes": self.comm.received - self._received0,
            "kept_bytes": sum(group.kept_bytes for group in self.groups),
            **{
                f"{what}_seconds": sum(g.seconds[what] for g in self.groups)
                for what in ("encode", "wire", "decode")
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between steps; every rank saves its own."""
        return {
            "ranks": self.comm.size,
            "rank": self.comm.rank,
            "method": self.options.model_dump(mode="json"),
            "step": self.step,
            "skipped": self.skipped,
            "groups": [
                {"names": list(g.names), "state": _copy(g.state), "memory": _copy(g.memory)}
                for g in self.groups
            ],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood. Called by all ranks, each with its own.

        Saved by another number of ranks, the steps and the server's memory are taken over, and what each rank
        kept (residuals, look-back gradients) starts afresh, with a warning.

        Raises:
          ConfigError: it belongs to another method or other parameters.
        """
        mine = {
            "method": self.options.model_dump(mode="json"),
            "groups": [list(g.names) for g in self.groups],
        }
        theirs = {"method": saved.get("method"), "groups": [g["names"] for g in saved.get("groups", ())]}
        for what, expected in mine.items():
            if theirs[what] != expected:
                raise ConfigError(f"state_dict: {what}: expected {expected}, got {theirs[what]}")
        same = (saved["ranks"], saved["rank"]) == (self.comm.size, self.comm.rank)
        everywhere = all(part == b"1" for part in self.comm.allgather(b"1" if same else b"0"))
        if not everywhere:
            warnings.warn(
                f"fedmpi: the state of rank {saved['rank']} of {saved['ranks']} is loaded by rank {self.comm.rank} of "
                f"{self.comm.size}: residuals and look-back gradients start afresh on all ranks",
                stacklevel=2,
            )
        for group, values in zip(self.groups, saved["groups"], strict=True):
            group.reset()
            group.memory = _copy(values["memory"])
            if everywhere:
                group.state = _copy(values["state"])
            group.rollback()
            group.believe()
        self.step, self.skipped = int(saved["step"]), int(saved["skipped"])


def _finite(x_D: Tensor) -> bool:
    """No infinity or NaN: such a sum has neither. One that overflows is looked at in float64, where none can."""
    return math.isfinite(float(x_D.sum())) or math.isfinite(float(x_D.sum(dtype=torch.float64)))


def _copy(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}
