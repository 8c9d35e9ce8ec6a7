"""Averages the named gradients of all ranks, compressed by any method whose server only averages.

What every drop-in shares: which parameters go exactly, which together, where a method's state is kept (by
parameter name), when a step counts. Who fills the gradients in, and when, is the drop-in's affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.comm.agree import agree, versions
from fedmpi.comm.base import Comm, Gathers
from fedmpi.errors import ConfigError, NumericalError
from fedmpi.integrations.groups import Group
from fedmpi.integrations.modules import sparse_gradient
from fedmpi.integrations.settings import Settings, Shapes
from fedmpi.integrations.shards import Shards, gradient_of, split
from fedmpi.integrations.state import load, saved
from fedmpi.meet import ways
from fedmpi.message import CPU
from fedmpi.methods.base import Options
from fedmpi.ops import bits, flags
from fedmpi.ops.flags import Flag

_PHASES = ("encode", "wire", "decode")
_WARM = 2  # steps


class Reducer:
    """All groups of a job.

    Attributes:
      groups: in the order in which a backward pass is expected to fill them.
      step: steps that counted.
      skipped: steps that did not, for a gradient that was not finite.
      warmup: steps to come whose seconds are told apart.
    """

    def __init__(
        self,
        shapes: Shapes,
        method: Options | dict[str, Any] | str,
        comm: Comm,
        device: torch.device = CPU,
        shards: Shards | None = None,
        **settings: Any,
    ) -> None:
        """Args:
          shapes: of all parameters that get gradients, in the model's order; the same on every rank.
          method: its options, as in a configuration.
          comm: this rank's end. All calls come from one thread.
          device: where it computes; gradients may lie elsewhere, and are copied then.
          shards: where parameters are sharded: ``comm`` is of those with the same shards, whose shapes are given.
          settings: fields of :class:`Settings`.

        Raises:
          ConfigError: settings or options that are wrong, or a method that cannot be a drop-in.
          CommError: the ranks disagree on any of this.
        """
        self.settings = Settings.of(**settings)
        self.options, self.comm = methods.parse(method), comm
        self.device, self.shards = device, shards
        self.everyone: Gathers = shards or comm
        self._agree(shapes)
        exact, compressed = split(self.settings, shapes, shards)
        draws = self.settings
        if shards is not None:
            draws = draws.model_copy(update={"seed": shards.seed(draws.seed)})
        self.groups: list[Group] = []
        for options, own in self._by_method(shapes, compressed):
            separable = options.separable
            if self.settings.exchange == "owner" and not separable:
                raise ConfigError(
                    f"exchange: owner averages parts of the model apart, and {options.name} with these options "
                    "is one for the whole model (lookback: scope: tensor is not); expected gather or sum"
                )
            parts = self.settings.grouped(own, comm.size) if separable else [own]
            for i, part in enumerate(parts):
                owner, room = i % comm.size if separable else None, ways.GATHER_BYTES / len(parts)
                self.groups.append(Group(part, options, comm, draws, owner, room, device))
        place = {name: i for i, name in enumerate(shapes)}
        self.groups.sort(key=lambda group: -min(place[name] for name in group.names))
        if exact:
            alike = draws.model_copy(update={"exchange": "sum"})
            self.groups.append(Group(exact, methods.parse("dense"), comm, alike, device=device))
        self.group_of = {name: i for i, group in enumerate(self.groups) for name in group.names}
        self.size = sum(group.spec.size for group in self.groups)
        self.step = self.skipped = 0
        self._results: dict[int, Flag] = {}
        self.warmup = _WARM
        self.begin_span()

    def _by_method(self, shapes: Shapes, compressed: Shapes) -> list[tuple[Options, Shapes]]:
        """What goes by each method: the job's, and those of rules."""
        chosen = self.settings.ways(self.shards.full if self.shards else shapes)
        of_job = {name: shape for name, shape in compressed.items() if chosen[name] is None}
        found: list[tuple[Options, Shapes]] = [(self.options, of_job)] if of_job else []
        for options in dict.fromkeys(
            r.travels for r in self.settings.parts if isinstance(r.travels, Options)
        ):
            if own := {name: shape for name, shape in compressed.items() if chosen[name] == options}:
                found.append((options, own))
        return found

    def _agree(self, shapes: Shapes) -> None:
        mine = {"method": self.options.model_dump(mode="json"), **self.settings.model_dump(mode="json")}
        full = shapes if self.shards is None else self.shards.full
        agree(
            self.everyone,
            {**versions(), **mine, "parameters": {n: list(shape) for n, shape in full.items()}},
        )

    def group(self, name: str) -> Group:
        """The one that this parameter belongs to."""
        return self.groups[self.group_of[name]]

    def reduce(self, *indices: int) -> None:
        """Average these groups; with the last one of a step the step is over. All ranks in the same order."""
        self.start(*indices)
        self.finish(*indices)

    def start(self, *indices: int) -> None:
        """Send these groups' gradients. All ranks in the same order, also of what they start and finish."""
        with self._room():
            for index in indices:
                self.groups[index].start(self.step, self.step < self.settings.start_after)

    def finish(self, *indices: int) -> None:
        """Wait for what was sent, and decode it; with the last group :meth:`settle`."""
        self.decode(*indices)
        self.settle()

    def decode(self, *indices: int) -> None:
        """:meth:`finish`, whose step is not over: no device is asked for anything."""
        with self._room():
            for index in indices:
                self._results[index] = self.groups[index].finish()

    @contextmanager
    def _room(self) -> Iterator[None]:
        """
        Raises:
          NumericalError: the device's memory has run out.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            kept = sum(group.kept_bytes for group in self.groups)
            raise NumericalError(
                f"device: {self.device} ran out of memory while averaging {self.size:,} gradients by "
                f"{self.options.name}, which keeps {kept / 1e9:.3g} GB there between steps: "
                f"{str(error).partition(chr(10))[0]}; ways out: a smaller batch, group_mb or "
                "exact_below, feedback: false, a method that keeps less, exact parts"
            ) from None

    def settle(self, *asked: Tensor) -> list[bool]:
        """The step is over, if all groups are decoded: it counts, or not. A device is asked once.

        Args:
          asked: flags that the caller wants to know.

        Returns:
          Those.

        Raises:
          MessageError: a message that was to be refused.
        """
        if len(self._results) < len(self.groups):
            return flags.answers(asked)
        doubts = [doubt for group in self.groups for doubt in group.doubts]
        questions = [*self._results.values(), *(doubt.bad for doubt in doubts), *asked]
        told = iter(flags.answers(questions))
        counted = [next(told) for _ in self._results]
        usable = all(counted)
        self._results.clear()
        for doubt in doubts:
            if next(told) and usable:
                raise doubt.error()
        self._finish(usable)
        return list(told)

    def begin_span(self) -> None:
        """What :meth:`stats` tells begins here."""
        self._begun = self.step, self.skipped
        self._reduced = self._past = self._timed = 0
        self._sent0, self._received0 = self.comm.sent, self.comm.received
        self._warmup, self._timed_before = 0.0, dict.fromkeys(_PHASES, 0.0)
        for group in self.groups:
            group.begin_span()

    def follow(self, before: Reducer) -> None:
        """Go on with the step and the span of a reducer that this one stands in for."""
        self.step, self.skipped, self._begun = before.step, before.skipped, before._begun
        self._reduced, self._past, self._timed = before._reduced, before._payload(), before._timed
        self._sent0 = self.comm.sent - (before.comm.sent - before._sent0)
        self._received0 = self.comm.received - (before.comm.received - before._received0)
        self._warmup, self._timed_before = before._warmup, before._after_warmup()

    def _payload(self) -> int:
        return self._past + sum(group.payload for group in self.groups)

    def _after_warmup(self) -> dict[str, float]:
        return {
            what: self._timed_before[what] + sum(g.seconds[what] for g in self.groups) for what in _PHASES
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Of all steps of the span, but for those that were warm-up, by phase; and of those."""
        return {**self._after_warmup(), "warmup": self._warmup}

    def _count(self) -> None:
        """A step was averaged. In the first ones kernels are loaded or compiled, and memory is touched."""
        self._reduced += 1
        if not self.warmup:
            self._timed += 1
            return
        self.warmup -= 1
        for group in self.groups:
            self._warmup += sum(group.seconds.values())
            group.seconds = dict.fromkeys(_PHASES, 0.0)

    def _finish(self, usable: bool) -> None:
        if self.shards is not None and not self.shards.all(usable):
            for group in self.groups if usable else ():
                group.flat_D.fill_(
                    math.nan
                )  # whoever looks at gradients before a step sees the same everywhere
            usable = False
        self._count()
        for group in self.groups:
            if usable:
                group.commit()
            else:
                group.rollback()
        self.step += usable
        self.skipped += not usable

    @torch.no_grad()
    def average(self, parameters: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """One step: replace each parameter's gradient by the mean over all ranks. One that some ranks lack counts as
        zero there, one that all lack stays missing: an optimizer skips it. After an error gradients may be scaled or
        not.

        Args:
          parameters: by name, those of ``shapes``.
          scale: what the gradients are multiplied by (a GradScaler's): what is kept must not change with it.
        """
        gradients: dict[str, Tensor] = {}
        for name in self.group_of:
            gradient = parameters[name].grad
            if gradient is not None and gradient.layout != torch.strided:
                raise ConfigError(sparse_gradient(name))
        here = torch.tensor([parameters[name].grad is not None for name in self.group_of])
        place = self.device if self.comm.device == self.device else CPU  # no detour
        told = self.comm.start_allgather_tensor(bits.pack(here[None].to(place)))
        for name in self.group_of:
            p = parameters[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients[name] = gradient_of(name, p)
        for name, gradient in gradients.items():
            self.group(name).fill(name, gradient, scale)
        every = range(len(self.groups))
        self.start(*every)
        self.decode(*every)
        anywhere = self.settle(*bits.unpack(told()[:, 0], len(here)).any(0))
        for (name, gradient), found in zip(gradients.items(), anywhere, strict=True):
            if found:
                self.group(name).answer(name, gradient, scale)
            else:
                parameters[name].grad = None

    def passed(self, payload: int, last: bool) -> None:
        """A part of a step's gradients that the drop-in averaged by itself, sending so many bytes, or the ``last``."""
        self._past += payload
        self.comm.sent += payload
        self.comm.received += payload
        self.step += last
        if last:
            self._count()

    def reset(self) -> None:
        """Forget all steps and what was kept from them."""
        for group in self.groups:
            group.reset()
        self.step = self.skipped = 0
        self.begin_span()

    def stats(self) -> dict[str, Any]:
        """Bytes and seconds on this rank, all of the same span: since this was made, or a state was loaded.

        ``steps`` and ``skipped`` are the span's, ``step`` is the job's. The seconds are those of ``timed_steps``,
        without the first two steps', ``warmup_seconds``.
        """
        payload, full = self._payload(), 4 * self.size * self._reduced
        return {
            "method": self.options.name,
            "step": self.step,
            "steps": self.step - self._begun[0],
            "skipped": self.skipped - self._begun[1],
            "payload_bytes": payload,
            "uncompressed_bytes": full,
            "ratio": full / payload if payload else math.nan,
            "wire_sent_bytes": self.comm.sent - self._sent0,
            "wire_received_bytes": self.comm.received - self._received0,
            "kept_bytes": sum(group.kept_bytes for group in self.groups),
            "timed_steps": self._timed,
            **{f"{what}_seconds": value for what, value in self.seconds.items()},
        }

    def layers(self) -> list[dict[str, Any]]:
        """Of each message: its tensors, and what of :meth:`stats` is its own, since this was made."""
        rows = []
        for group in self.groups:
            full = 4 * group.spec.size * group.sent
            rows.append(
                {
                    "tensors": group.names,
                    "numbers": group.spec.size,
                    "method": group.options.name,
                    "payload_bytes": group.payload,
                    "uncompressed_bytes": full,
                    "ratio": full / group.payload if group.payload else math.nan,
                    "kept_bytes": group.kept_bytes,
                    **{f"{what}_seconds": group.seconds[what] for what in _PHASES},
                }
            )
        return rows

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between steps; every rank saves its own."""
        return saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood (:func:`fedmpi.integrations.state.load`). Called by all ranks, each
        with its own.

        Raises:
          ConfigError: on all ranks, and nothing has changed.
        """
        load(self, state)
