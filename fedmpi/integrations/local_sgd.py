"""``fedmpi.local_sgd``: ranks that train by themselves and average, compressed, once in many steps.

    outer = fedmpi.local_sgd(model, optimizer, {"name": "qsgd", "bits": 4}, every=100)
    loss.backward(); optimizer.step()      # every 100th step averages

H steps of the job's own optimizer on each rank are one step of an outer optimizer on the mean of anchor − parameters:
with AdamW inside and Nesterov outside this is DiLoCo (Douillard et al., "DiLoCo: Distributed Low-Communication Training
of Language Models", 2023), with sgd at rate 1 outside local SGD (Stich, "Local SGD Converges Fast and Communicates
Little", ICLR 2019), with ``fragments`` and ``overlap`` Streaming DiLoCo (Douillard et al., "Streaming DiLoCo with
overlapping communication", 2025), whose α is ``alpha``.

Steps are counted where the optimizer makes them, so that nothing else of a job changes. A GradScaler leaves some out,
on one rank and not on another: with ``scaler`` its ``step()`` is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fedmpi import methods
from fedmpi.comm import solo
from fedmpi.comm.base import Comm, LostError, RankError, together
from fedmpi.errors import ConfigError
from fedmpi.integrations import local_state
from fedmpi.integrations.elastic import Elastic
from fedmpi.integrations.elastic_options import check_elastic, parsed
from fedmpi.integrations.fragments import Buffers, Fragment, Outcome, split
from fedmpi.integrations.inner import Inner
from fedmpi.integrations.local_options import (
    check_rate,
    check_trained,
    connected,
    opened,
    options_of,
)
from fedmpi.integrations.modules import (
    Same,
    shapes_of,
    trained,
    warn_of_nothing,
    watch,
)
from fedmpi.integrations.reducer import Reducer
from fedmpi.integrations.say import say_at_end
from fedmpi.integrations.scaling import around_steps, scaler_behind
from fedmpi.integrations.survivors import Survivors
from fedmpi.methods.base import Options
from fedmpi.optimizers import Optimizer

T = TypeVar("T")
Every = int | Callable[[int], int]
_TOLD = 16  # dropped rounds that stats() names


class LocalSGD:
    """Averages a model once in many steps of its optimizer; what :func:`fedmpi.local_sgd` is.

    Attributes:
      step: the optimizer's steps so far.
      rounds: synchronisations that counted, of whatever part of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Options | dict[str, Any] | str = "dense",
        *,
        every: Every = 100,
        group: dist.ProcessGroup | None = None,
        comm: Comm | str = "auto",
        scaler: torch.amp.GradScaler | None = None,
        elastic: str | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Called by all ranks that average. Parameters and buffers are rank 0's from then on.

        Args:
          model: the job's, plain or compiled; or in DistributedDataParallel over a part of the ranks that has a fast
            link, with ``group`` of the ranks in the same place of each part.
          optimizer: any of torch's, over the model's parameters.
          method: as in a configuration; its numbers (``k``, ``dim``) count a fragment.
          every: H; or a function of how many such rounds there were, the same on all ranks, which gives the next one's.
          group: the ranks to average over (default: all).
          comm: "auto": as the job's process group if there is one, else as the launcher says; "group", "mpi", or a
            :class:`fedmpi.comm.Comm`.
          scaler: the job's GradScaler, if it has one. Its scale does not matter here, but steps that it leaves out.
          elastic: ranks come and go, and meet at the coordinator's "host:port"; or :class:`ElasticOptions` as a
            mapping. It returns when this rank has joined (see :mod:`fedmpi.integrations.elastic`, and who may connect).
          settings: fields of :class:`fedmpi.integrations.local_options.LocalOptions` (``outer``, ``lr``, ``fragments``,
            ``overlap``, ``alpha``, ``warmup``, ``inner``, …) and of :class:`fedmpi.integrations.settings.Settings`, but
            for ``start_after``.

        Raises:
          ConfigError: arguments that are wrong, or do not fit the model.
          CommError: the ranks disagree on any of this, or no coordinator answers.
        """
        meeting = None if elastic is None else parsed(elastic, every, group, comm, model)
        inside, ddp = opened(model, optimizer)
        self.comm = connected(group, comm) if meeting is None else solo()
        with together(self.comm, "looking at its arguments"):
            self._every = every if callable(every) else None
            self.options, kept = options_of(None if callable(every) else every, settings)
            if meeting is not None:
                check_elastic(self.options, kept)
            options = methods.parse(method)
            parameters = trained(inside)
            check_trained(optimizer, inside, ddp, group)
            parts = split(parameters, self.options.fragments)
            buffers = Buffers(inside, self.comm)
            self.length = self._next(0)
        local_state.agree(self.comm, self.options, self.length, inside)
        local_state.alike(self.comm, inside)
        warn_of_nothing(shapes_of(parameters), options, kept)
        buffers.keep()
        opt = self.options
        rule = Optimizer(opt.outer, opt.beta1, opt.beta2, opt.epsilon)
        self.fragments = [
            Fragment(part, options, self.comm, rule, opt.rate, kept.model_dump(), buffers if i == 0 else None)
            for i, part in enumerate(parts)
        ]
        with together(self.comm, "looking at its method"):
            check_rate(self.fragments, opt)
        self.buffers, self.optimizer, self._module = buffers, optimizer, inside
        self._inner = Inner(optimizer)
        self._worker = ThreadPoolExecutor(1, "fedmpi") if opt.overlap else None
        self.step = self.rounds = self.dropped = self.cycles = self.at = 0
        self.told = list[dict[str, Any]]()
        self.span = local_state.Span(self)
        self._names, self._scaler = set(parameters), scaler
        self._inside = self._removed = False
        self._hook = optimizer.register_step_post_hook(lambda *_: self._made())
        if scaler is not None:
            around_steps(scaler, optimizer, self._scaled)
        if self.comm.size > 1:
            say_at_end(self.comm.rank, self, local_state.stats)
        self._same = Same(inside, self._names, "fedmpi.local_sgd", self._tell)
        self._watch = watch(inside, self._same)
        self._roster: Elastic | Survivors | None = None
        if meeting is not None:
            self._roster = Elastic(meeting, inside, options, kept, self)
            self._meet([], begins=False)
        elif self.comm.survives and self.comm.size > 1 and not opt.overlap and kept.exchange != "owner":
            self._roster = Survivors(self)

    # Where steps are counted.

    def _made(self) -> None:
        """The optimizer made a step."""
        if self._inside:
            return
        if self._scaler is None and scaler_behind() is not None:
            self._fail(
                ConfigError(
                    "scaler: expected the job's GradScaler, which leaves out steps on one rank and not on another, got "
                    "none; fedmpi.local_sgd(model, optimizer, method, scaler=scaler)"
                )
            )
        self._stepped()

    def _scaled(self, step: Callable[[], T]) -> T:
        """A step of the scaler's is one, whether the optimizer makes it or not."""
        if self._removed:
            return step()
        self._inside = True
        try:
            result = step()
        finally:
            self._inside = False
        self._stepped()
        return result

    # What a step comes to.

    def _stepped(self) -> None:
        try:
            self._after_step()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        """Raises it; the other ranks, which may wait, are told."""
        self._tell(error)
        raise error

    def _tell(self, error: BaseException) -> None:
        if not isinstance(error, (LostError, RankError)):
            self.comm.fail(f"{type(error).__name__}: {error}")

    def _after_step(self) -> None:
        opt, count = self.options, len(self.fragments)
        self.step += 1
        if self.step <= opt.warmup:
            self._now(averaging=True)
            return
        self.at += 1
        for fragment in self.fragments:
            if fragment.due == self.step:
                self._take_in(fragment, opt.alpha)
        for i, fragment in enumerate(self.fragments):
            if self.at == self.length - i * self.length // count:
                if self._roster is not None:
                    self._meet([fragment], begins=self.at == self.length)
                    return
                self._take_in(fragment, opt.alpha)  # a round that is a step shorter than the last one
                self._send(fragment)
                if not opt.overlap:
                    self._take_in(fragment)
        if self.at == self.length:
            self._begin()

    def _now(self, averaging: bool = False) -> None:
        """All of the model, in the same step."""
        todo = [fragment for fragment in self.fragments if fragment.taken < self.step]
        if self._roster is not None:
            self._meet(todo, averaging, begins=not averaging)
            return
        for fragment in todo:
            self._send(fragment)
        for fragment in todo:
            self._take_in(fragment, averaging=averaging)

    def _meet(self, fragments: list[Fragment], averaging: bool = False, *, begins: bool) -> None:
        """With those of the ranks that are there."""
        assert self._roster is not None
        self._unchanged()
        if self._roster.synchronize(fragments, averaging, begins):
            self._begin()

    def _begin(self) -> None:
        """The next H steps begin."""
        self.cycles, self.at = self.cycles + 1, 0
        if self._every is None:
            return
        self.length = self._next(self.cycles)
        if self._roster is not None:
            return  # compared at the next synchronisation
        mine = torch.tensor([self.length])
        told = self._do(lambda: self.comm.allgather_tensor(mine)[:, 0].tolist())
        if len(set(told)) > 1:
            raise ConfigError(
                f"every: expected a function that gives the same number on all ranks, got {told} of them after "
                f"{self.cycles} rounds"
            )

    def _next(self, cycle: int) -> int:
        opt = self.options
        return opt.length(opt.every if self._every is None else self._every(cycle))

    def _send(self, fragment: Fragment) -> None:
        self._unchanged()
        fragment.take(self.step, odd=fragment.buffers is not None and fragment.buffers.odd())
        fragment.due = self.step + self.options.overlap
        if self._worker is None:
            fragment.under_way = Future()
            fragment.under_way.set_result(fragment.exchange())
        else:
            fragment.under_way = self._worker.submit(fragment.exchange)

    def _take_in(self, fragment: Fragment, alpha: float = 0.0, averaging: bool = False) -> None:
        """What is under way, if anything, becomes parameters."""
        if fragment.under_way is None:
            return
        started, sent = perf_counter(), fragment.under_way
        outcome = sent.result()
        self.span.waited += perf_counter() - started
        fragment.under_way = fragment.due = None
        outcome = fragment.merge(outcome, alpha, averaging)
        if outcome.counts:
            self.rounds += 1
        else:
            self._drop(fragment, outcome)
        if self.options.inner == "reset":
            self._inner.forget(fragment.parameters.values())

    def take_in_all(self, alpha: float = 0.0, averaging: bool = False) -> None:
        """Nothing is under way afterwards."""
        for fragment in self.fragments:
            self._take_in(fragment, alpha, averaging)

    def _drop(self, fragment: Fragment, outcome: Outcome) -> None:
        """A round came to nothing, on all ranks. What is not finite here would spoil all that come after it."""
        self.dropped += 1
        told = {
            "step": fragment.taken,
            "fragment": self.fragments.index(fragment),
            "ranks": list(outcome.odd),
        }
        self.told = [*self.told, told][-_TOLD:]
        for other in self.fragments:
            other.recover()
        if self.buffers.odd():
            self.buffers.put(self.buffers.last)
        self._inner.forget_odd()

    def _unchanged(self) -> None:
        """
        Raises:
          ConfigError: a parameter that was frozen is trained by now, or replaced, and nobody would average it.
        """
        self._same.check()
        for name, p in self._module.named_parameters():
            if p.requires_grad and name not in self._names:
                raise ConfigError(
                    f"model: parameter {name} was frozen, or not there, when fedmpi.local_sgd was called, and is "
                    "trained now; call it after all parameters are as they will be trained"
                )

    def _do(self, task: Callable[[], T]) -> T:
        """``task`` in the thread that communicates, after what is under way."""
        return task() if self._worker is None else self._worker.submit(task).result()

    # What the job calls.

    def synchronize(self) -> None:
        """Average all of the model now, and begin to count ``every`` anew: before an evaluation or the last checkpoint.
        Called by all ranks, whose parameters are equal to the bit afterwards. Twice in the same step is as once."""
        try:
            self.take_in_all()
            self._now()
            if self._roster is not None:
                return
            if self.comm.size > 1:
                for fragment in self.fragments:
                    fragment.go_back()  # also where a part that arrived before kept some of a rank's own
            self._begin()
        except BaseException as error:
            self._fail(error)

    def remove(self) -> None:
        """Take in what is under way, and count steps no more: ranks go on by themselves. Called by all ranks."""
        self.take_in_all(self.options.alpha)
        self._hook.remove()
        self._watch.remove()
        self._removed = True
        if self._roster is not None:
            self._roster.close()

    def stats(self) -> dict[str, Any]:
        """Steps, bytes and seconds on this rank, all since this was made, or a state was loaded; ``step`` is the job's.
        ``uncompressed_bytes`` are those of gradients averaged in every step; ``largest_bytes`` the most that one step
        sent."""
        found = self._do(lambda: local_state.stats(self))
        return found if self._roster is None else {**found, **self._roster.stats()}

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between two steps: tensors and plain values. Called by all ranks, each of which saves its
        own, with its own model and optimizer: they differ until the next synchronisation."""
        return local_state.saved(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood. Called by all ranks, each with its own, after model and optimizer are
        loaded.

        Saved by another number of ranks, all go on from what they last agreed on: steps since then are lost, what each
        rank kept (residuals) starts afresh, and a warning says so.

        Raises:
          ConfigError: on all ranks, and nothing has changed: it is no such state, or that of another method, model or
            argument, or the ranks' do not belong together.
        """
        if self._roster is not None:
            self._roster.refuse_state()
        local_state.load(self, saved)
        self.span = local_state.Span(self)

    @property
    def reducer(self) -> Reducer:
        """The first fragment's."""
        return self.fragments[0].reducer

    @property
    def place(self) -> list[list[int]]:
        """Among shards: each rank holds whole parameters."""
        return []

    def run(self, task: Callable[[Any], T]) -> T:
        """``task`` of this, between two steps (:mod:`fedmpi.integrations.folder`)."""
        return task(self)

    def reset(self) -> None:
        """Begin anew, at rank 0's parameters. Called by all ranks."""
        local_state.alike(self.comm, self._module)
        self.buffers.keep()
        for fragment in self.fragments:
            fragment.reset()
        self.step = self.rounds = self.dropped = self.cycles = self.at = 0
        self.length, self.told = self._next(0), []
        self.span = local_state.Span(self)
