"""A synchronisation that may come to nothing where a rank ends: what it changes, and how that is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from fedmpi.comm.base import Comm
from fedmpi.integrations.fragments import Buffers, Fragment, Outcome, State
from fedmpi.integrations.local_state import Span
from fedmpi.validation import Strict


class Job(Protocol):
    """What changes: a :class:`fedmpi.integrations.local_sgd.LocalSGD`."""

    comm: Comm
    fragments: list[Fragment]
    buffers: Buffers
    span: Span
    step: int
    rounds: int
    dropped: int
    cycles: int
    at: int
    length: int

    @property
    def options(self) -> Strict: ...

    def take_in_all(self, alpha: float = 0.0, averaging: bool = False) -> None: ...


class Kept(NamedTuple):
    """Of a fragment: state and memory of each group, and counts."""

    groups: list[tuple[State, State]]
    counted: tuple[int, int, int]


def keep(fragment: Fragment) -> Kept:
    """For :func:`put_back`."""
    # Residuals' memory is used again by the next step, and so copied.
    groups = [
        ({name: x.clone() for name, x in group.state.items()}, group.memory) for group in fragment.groups
    ]
    return Kept(groups, (fragment.taken, fragment.reducer.step, fragment.reducer.skipped))


def put_back(fragment: Fragment, kept: Kept) -> None:
    """It has not averaged since :func:`keep`, and must :meth:`Fragment.move` before it does again."""
    for group, (state, memory) in zip(fragment.groups, kept.groups, strict=True):
        group.state, group.memory = state, memory
        group.rollback()
    fragment.taken, fragment.reducer.step, fragment.reducer.skipped = kept.counted


def average(fragment: Fragment, step: int) -> Outcome:
    """What all ranks have after so many steps; parameters stay."""
    fragment.take(step, odd=fragment.buffers is not None and fragment.buffers.odd())
    return fragment.exchange()


def take_in(job: Job, fragments: Sequence[Fragment], outcomes: Sequence[Outcome], averaging: bool) -> None:
    """It counts: parameters follow."""
    for fragment, outcome in zip(fragments, outcomes, strict=True):
        fragment.under_way = Future()
        fragment.under_way.set_result(outcome)
    job.take_in_all(averaging=averaging)
