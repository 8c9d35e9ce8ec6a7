"""The parts of a model that local updates synchronise, each at steps of its own.

A fragment holds the *anchor*, what all ranks agreed on when it was synchronised last. A round takes how far this rank
went from there, anchor − parameters, averages that over the ranks by a method, and steps from the anchor by the outer
optimizer. The sum is of differences, so that a method's losses are losses of progress, never of the model.

Shape suffixes: D parameters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError
from fedmpi.integrations.modules import device_of, shapes_of
from fedmpi.integrations.reducer import Reducer
from fedmpi.methods.base import Options
from fedmpi.ops.sums import finite
from fedmpi.optimizers import Optimizer

State = dict[str, Tensor]


class Outcome(NamedTuple):
    """What a round came to.

    Attributes:
      counts: every rank's update is finite, and so is what became of them.
      odd: the ranks whose update is not.
    """

    counts: bool
    odd: tuple[int, ...] = ()


class Step(NamedTuple):
    """Where a fragment goes from a round, group by group.

    Attributes:
      outcome: what the round came to, with this.
    """

    outcome: Outcome
    anchors: list[Tensor]
    outer: list[State]


class Buffers:
    """What a model has besides parameters: floating numbers are averaged exactly, of whole numbers (and truth values)
    the largest is taken.

    Attributes:
      last: as all ranks had them after the last round, by name.
    """

    def __init__(self, module: nn.Module, comm: Comm) -> None:
        """Raises:
        ConfigError: one of complex numbers.
        """
        self.comm, self.all = comm, dict(module.named_buffers())
        for name, b in self.all.items():
            if b.is_complex() or b.layout != torch.strided:
                raise ConfigError(
                    f"model: buffer {name} is {b.layout}, {b.dtype}, expected a dense one of real numbers, for buffers "
                    "are averaged"
                )
        self._floats = [name for name, b in self.all.items() if b.is_floating_point()]
        self._whole = [name for name, b in self.all.items() if not b.is_floating_point()]
        self.keep()

    def keep(self) -> None:
        """They are as on every other rank now."""
        self.last = {name: _own(b) for name, b in self.all.items()}

    def odd(self) -> bool:
        """One became infinite or NaN here (a mask may always have been)."""
        floats = ((self.all[name], self.last[name]) for name in self._floats)
        return not all(torch.equal(b.isfinite().cpu(), last.isfinite()) for b, last in floats)

    def take(self) -> None:
        """As they are now they go into the next :meth:`exchange`."""
        # In float64 the mean of equal float32 numbers is just that number, at any number of ranks.
        self._sum = _flat([self.all[name] for name in self._floats], torch.float64)
        self._most = _flat([self.all[name] for name in self._whole], torch.int64)

    def exchange(self) -> None:
        self.comm.sum([self._sum])
        self._sum /= self.comm.size
        self._most = self.comm.allgather_tensor(self._most).amax(0)

    def arrived(self, values: Mapping[str, Tensor]) -> None:
        """An exchange gave these."""
        self._sum = _flat([values[name] for name in self._floats], torch.float64)
        self._most = _flat([values[name] for name in self._whole], torch.int64)

    def result(self) -> State:
        """The mean and the largest, by name."""
        found: State = {}
        for names, flat in ((self._floats, self._sum), (self._whole, self._most)):
            parts = flat.split([self.all[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                b = self.all[name]
                found[name] = part.view(b.shape).to(b.dtype)
        return found

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Every buffer is this from now on, here as on all ranks."""
        for name, b in self.all.items():
            b.copy_(values[name])
        self.keep()


class Fragment:
    """Tensors of a model that are synchronised together.

    Attributes:
      parameters: by name.
      reducer: averages their updates; its steps are the rounds that counted.
      taken: the step whose parameters were sent last.
      largest: the most bytes that a round sent.
      due: the step in which what was sent is taken in; None while nothing is under way.
      under_way: what waits for it.
      buffers: the model's, which travel with the first fragment.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        method: Options | dict[str, Any] | str,
        comm: Comm,
        rule: Optimizer,
        lr: float,
        settings: Mapping[str, Any],
        buffers: Buffers | None = None,
    ) -> None:
        """Args:
          rule, lr: the outer optimizer and its rate.
          settings: the reducer's.

        Raises:
          ConfigError, CommError: as :class:`fedmpi.integrations.reducer.Reducer`.
        """
        self.parameters, self.comm, self.rule, self.lr = dict(parameters), comm, rule, lr
        self.device = device_of(parameters)
        self.reducer = Reducer(shapes_of(parameters), method, comm, self.device, **settings)
        self.buffers = buffers
        self.groups = self.reducer.groups
        self.taken = self.largest = 0
        self.due: int | None = None
        self.under_way: Future[Outcome] | None = None
        self._usable = True
        self._place([torch.empty(group.spec.size, device=self.device) for group in self.groups])
        self.outer = [rule.init(group.spec.size, self.device) for group in self.groups]
        self.anchor_here()

    def _place(self, anchors: Sequence[Tensor]) -> None:
        self.anchors = list(anchors)
        self._anchor_of = {
            name: view
            for group, anchor_D in zip(self.groups, self.anchors, strict=True)
            for name, view in group.spec.views(anchor_D).items()
        }

    @property
    def alone(self) -> bool:
        return self.comm.size == 1

    def _plain(self, averaging: bool) -> bool:
        """The outer step only takes the mean."""
        return averaging or (self.rule.name == "sgd" and self.lr == 1)

    def anchor_here(self) -> None:
        """The parameters are all ranks' anchor."""
        for name, p in self.parameters.items():
            self._anchor_of[name].copy_(p.detach())

    def reset(self) -> None:
        """Forget all rounds, and begin with the parameters as they are."""
        self.reducer.reset()
        self.due = self.under_way = None
        self.taken = self.largest = 0
        self.outer = [self.rule.init(group.spec.size, self.device) for group in self.groups]
        self.anchor_here()

    def anchor(self) -> State:
        """By name, a copy."""
        return {name: _own(self._anchor_of[name]) for name in self.parameters}

    @torch.no_grad()
    def take(self, step: int, odd: bool = False) -> None:
        """This rank's update goes into the next :meth:`exchange`.

        Args:
          step: the job's.
          odd: it must not be used, for the rank's buffers are not finite.
        """
        self.taken = step
        for group in self.groups:
            for name, view in group.views.items():
                p = self.parameters[name]
                view.copy_(p)
                # From where the parameter was put: the anchor, rounded to its type.
                torch.sub(self._anchor_of[name].to(p.dtype).float(), view, out=view)
        self._usable = not odd and all(finite(group.flat_D) for group in self.groups)
        if not self._usable:
            next(group for group in self.groups if group.spec.size).flat_D[0] = math.nan
        if self.buffers is not None:
            self.buffers.take()

    def exchange(self) -> Outcome:
        """Average what all ranks took. Called by all ranks, in the thread that communicates."""
        if self.buffers is not None:
            self.buffers.exchange()
        if self.alone:
            if not self._usable:
                self.reducer.skipped += 1
                return Outcome(False, (0,))
            self.reducer.passed(0, last=True)
            return Outcome(True)
        before, sent = self.reducer.step, self._payload()
        self.reducer.reduce(*range(len(self.groups)))
        self.largest = max(self.largest, self._payload() - sent)
        if self.reducer.step > before:
            return Outcome(True)
        usable_W = self.comm.allgather_tensor(torch.tensor([self._usable], dtype=torch.uint8))[:, 0]
        return Outcome(False, tuple((usable_W == 0).nonzero()[:, 0].tolist()))

    def _payload(self) -> int:
        return sum(group.payload for group in self.groups)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the anchor and the outer optimizer's memory."""
        return sum(x.nbytes for x in (*self.anchors, *(v for kept in self.outer for v in kept.values())))

    @torch.no_grad()
    def merge(self, outcome: Outcome, alpha: float = 0.0, averaging: bool = False) -> Outcome:
        """Step from the anchor by the mean update, and go on from there.

        Args:
          alpha: the weight of what this rank has by now; 0 where nothing was computed since it sent.
          averaging: the step is the mean itself, whatever the outer optimizer.

        Returns:
          ``outcome``, or one that does not count, where the step came to infinities or NaN: on all ranks. The round
          is dropped then, and the parameters are the anchor.
        """
        if outcome.counts and self.alone and self._plain(averaging):  # to the bit what the job does without
            self.anchor_here()
            self._keep_buffers()
            return outcome
        step = self.step(outcome, averaging)
        if step.outcome.counts:
            self.take_over(step.anchors, step.outer)
        outcome = step.outcome
        for name, p in self.parameters.items():
            anchor = self._anchor_of[name]
            if alpha and outcome.counts:
                p.mul_(alpha).add_(anchor.to(p.device), alpha=1 - alpha)
            else:
                p.copy_(anchor)
        if self.buffers is not None:
            self.buffers.put(self.buffers.result() if outcome.counts else self.buffers.last)
        return outcome

    @torch.no_grad()
    def step(self, outcome: Outcome, averaging: bool = False) -> Step:
        """What :meth:`merge` goes to; nothing changes. Where that is infinities or NaN the round does not count."""
        if outcome.counts and self.alone and self._plain(averaging):
            here = [torch.empty_like(anchor_D) for anchor_D in self.anchors]
            for group, anchor_D in zip(self.groups, here, strict=True):
                for name, view in group.spec.views(anchor_D).items():
                    view.copy_(self.parameters[name])
            return Step(outcome, here, self.outer)
        if outcome.counts:
            stepped = [self._step(i, averaging) for i in range(len(self.groups))]
            if all(finite(x) for anchor_D, kept in stepped for x in (anchor_D, *kept.values())):
                return Step(outcome, [anchor_D for anchor_D, _ in stepped], [kept for _, kept in stepped])
            outcome = Outcome(False)
        return Step(outcome, self.anchors, self.outer)

    def _step(self, index: int, averaging: bool) -> tuple[Tensor, State]:
        mean_D, anchor_D, outer = self.groups[index].flat_D, self.anchors[index], self.outer[index]
        if averaging:
            return anchor_D - mean_D, outer
        u_D, outer = self.rule.direction(outer, mean_D)
        return anchor_D.sub(u_D, alpha=self.lr), outer

    def take_over(self, anchors: Sequence[Tensor], outer: Sequence[State]) -> None:
        """These are what all ranks agree on, group by group; parameters stay."""
        self._place(anchors)
        self.outer = list(outer)

    def move(self, comm: Comm) -> None:
        """Average among the ranks of ``comm`` from now on, with what was kept. Called by all of them.

        Raises:
          LostError: one ended meanwhile; to be called again, with others.
        """
        before, settings = self.reducer, self.reducer.settings.model_dump()
        after = Reducer(shapes_of(self.parameters), before.options, comm, self.device, **settings)
        for group, old in zip(after.groups, before.groups, strict=True):
            group.state, group.memory = old.state, old.memory
            group.rollback()
            group.believe()
        after.follow(before)
        self.comm, self.reducer, self.groups = comm, after, after.groups

    def _keep_buffers(self) -> None:
        if self.buffers is not None:
            self.buffers.keep()

    @torch.no_grad()
    def recover(self) -> None:
        """Parameters that are not finite go back to the anchor."""
        for name, p in self.parameters.items():
            if not bool(p.isfinite().all()):
                p.copy_(self._anchor_of[name])

    @torch.no_grad()
    def put(self, anchor: Mapping[str, Tensor], outer: Sequence[State]) -> None:
        """Take over a saved anchor and memory, copies."""
        for name, value in anchor.items():
            self._anchor_of[name].copy_(value)
        self.outer = [{name: _own(value) for name, value in kept.items()} for kept in outer]

    @torch.no_grad()
    def go_back(self) -> None:
        """The parameters are the anchor."""
        for name, p in self.parameters.items():
            p.copy_(self._anchor_of[name])


def split(parameters: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Parameters in so many fragments, about equally large, so that none needs much more of the link than another: the
    largest first, each to the fragment that is smallest by then. Every fragment keeps the model's order.

    Raises:
      ConfigError: there are fewer tensors.
    """
    if count > len(parameters):
        raise ConfigError(
            f"fragments: expected at most {len(parameters)}, the model's trained tensors, got {count}"
        )
    place = {name: i for i, name in enumerate(parameters)}
    sizes, members = [0] * count, [set[str]() for _ in range(count)]
    for name in sorted(parameters, key=lambda n: (-parameters[n].numel(), place[n])):
        least = min(range(count), key=lambda i: (sizes[i], len(members[i]), i))
        members[least].add(name)
        sizes[least] += parameters[name].numel()
    return [{n: p for n, p in parameters.items() if n in chosen} for chosen in members]


def _own(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    parts = [x.detach().reshape(-1).to("cpu", dtype) for x in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
