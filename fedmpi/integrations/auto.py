"""``method: auto``: the job's first steps try some methods in turn, and the fastest stays.

Compression often does not pay: on a fast link coding takes longer than it saves. So what counts is the time of
whole steps of this job on this link, its computing and what overlaps with it included, and a method that
compresses more than bf16 must win clearly: by a margin, and by more than steps differ among themselves. What was
measured and chosen is said in a line. Then the link is looked at now and then, for less than 1 % of the time, and all
is measured anew when it has become another one. In a DDP hook bf16 is measured, and stays, as torch's own hook does it:
whole buckets, small tensors too.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from fedmpi import methods
from fedmpi.comm.base import Comm, Gathers
from fedmpi.errors import ConfigError
from fedmpi.integrations import state
from fedmpi.integrations.reducer import Reducer
from fedmpi.integrations.say import bandwidth, say
from fedmpi.integrations.settings import Shapes
from fedmpi.integrations.shards import Shards
from fedmpi.message import CPU
from fedmpi.methods.base import Options
from fedmpi.validation import Strict, describe


class AutoOptions(Strict):
    """``{name: auto, candidates: [...], steps: …, margin: …}``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Literal["auto"] = "auto"
    candidates: tuple[SerializeAsAny[Options], ...] = Field(
        (
            methods.parse({"name": "powersgd", "rank": 4, "feedback": True}),
            methods.parse({"name": "signsgd", "feedback": True}),
        ),
        min_length=1,
        description="methods that are tried against bf16",
    )
    steps: int = Field(10, ge=3, description="steps that each is measured for; the first two are not counted")
    margin: float = Field(0.1, ge=0, lt=1, description="the part of bf16's time that a winner must save")
    recheck: int = Field(
        500,
        ge=0,
        description="steps from one look at the link to the next, at least; 0: none after the choice",
    )

    @field_validator("candidates", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return tuple(methods.parse(v, "method.candidates") for v in value)


class Took(NamedTuple):
    """Seconds of a step on the slowest rank: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Took:
        low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(_QUARTILES).tolist()
        return cls(median, low, high)


class Link(NamedTuple):
    """Seconds of all-reduces of 1 kB and of 256 kB, between so many ranks."""

    small: float
    large: float
    ranks: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a rank sends; infinite where size does not show."""
        if self.large < 1.5 * self.small:
            return math.inf
        return 8 * (_LARGE - _SMALL) * (self.ranks - 1) / self.ranks / (self.large - self.small)

    def like(self, other: Link, step: float) -> bool:
        """Neither twice as fast nor half, or not by what shows in steps of so many seconds."""
        return 0.5 < self.large / other.large < 2 or abs(self.large - other.large) < _SHOWS * step

    def __str__(self) -> str:
        rate = bandwidth(self.bandwidth) if self.bandwidth < math.inf else "faster than 256 kB show"
        return f"{rate}, latency {1e3 * self.small:.2f} ms"


_QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
_SMALL, _LARGE = 1 << 8, 1 << 16  # float32 numbers of a look at the link
_SHARE = 0.01  # of the time, for looks
_SHOWS = 0.05  # of a step's time


def verdict(took: Sequence[Took], margin: float) -> tuple[int, str]:
    """Which of them stays, the first (bf16) unless another one clearly wins; and why, in words.

    A winner's median is below (1 - margin) of bf16's, and three quarters of its steps are faster than three quarters of
    bf16's.
    """
    bf16, *others = took
    best = 1 + min(range(len(others)), key=lambda i: others[i].median)
    saved = 1 - took[best].median / bf16.median
    if saved < margin:
        return 0, f"no candidate saves {margin:.0%} of bf16's step"
    if took[best].high >= bf16.low:
        return (
            0,
            f"inconclusive: {saved:.0%} less than bf16's step, but steps differ by as much among themselves",
        )
    return best, f"{saved:.0%} less than bf16's step, at least {margin:.0%} was asked for"


class Auto:
    """Which reducer a step uses.

    Attributes:
      reducer: the present one.
      took: seconds of a step, by position: bf16's, then each candidate's.
      chosen: what stays, once that is decided.
      why: that is so.
      link: as it was when that was decided, or first looked at afterwards.
    """

    _UNCOUNTED = 2  # memory is touched for the first time, DDP rebuilds its buckets

    def __init__(
        self,
        shapes: Shapes,
        options: AutoOptions,
        comm: Comm,
        settings: dict[str, Any],
        device: torch.device = CPU,
        shards: Shards | None = None,
    ) -> None:
        self.options, self.comm, self._device, self._shards = options, comm, device, shards
        self._shapes, self._settings = shapes, settings
        self.tried: list[Options] = [methods.parse("bf16"), *options.candidates]
        self.reducer = self._make(self.tried[0])
        self.took: list[Took] = []
        self.chosen: Options | None = None
        self.why = ""
        self.link: Link | None = None
        self._changed = 0  # looks at a link that is another one
        self._look_at = 0  # the step before which the next look is
        self._times: list[float] = []
        self._last: float | None = None

    def _make(self, options: Options) -> Reducer:
        return Reducer(self._shapes, options, self.comm, self._device, self._shards, **self._settings)

    @property
    def plain(self) -> bool:
        """The present method is what others are compared with."""
        return self.reducer.options == self.tried[0]

    def between_steps(self) -> Reducer:
        """The reducer of the next step. Called by all ranks before each step."""
        if self.chosen is not None:
            if self.options.recheck and self.reducer.step >= self._look_at:
                self._look_again()
            return self.reducer
        now = perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        if len(self._times) == self.options.steps:
            self._measured()
        self._last = perf_counter()
        return self.reducer

    def _measured(self) -> None:
        mine = Took.of(self._times[self._UNCOUNTED :])
        self.took.append(Took(*self._slowest(mine)))
        self._times = []
        if len(self.took) < len(self.tried):
            self._use(self.tried[len(self.took)])
            return
        stays, self.why = verdict(self.took, self.options.margin)
        self.chosen = self.tried[stays]
        self.link, _ = self._look()
        self._next_look(0.0)
        self._use(self.chosen)
        say(self.comm.rank, self.line())

    def line(self) -> str:
        """What was measured, and what was chosen."""
        steps = ", ".join(
            f"{_label(options)} {1e3 * t.median:.1f} ({1e3 * t.low:.1f} … {1e3 * t.high:.1f})"
            for options, t in zip(self.tried, self.took, strict=False)
        )
        stays = _label(self.chosen) if self.chosen else "nothing yet"
        return f"auto: ms a step: {steps}; link {self.link}; chosen: {stays} ({self.why})"

    def _look(self) -> tuple[Link, float]:
        """The link now, on the slowest rank, and the seconds that looking took. Called by all ranks."""
        started, medians = perf_counter(), []
        for n in (_SMALL, _LARGE):
            x, seconds = torch.zeros(n), []
            for _ in range(4):
                begun = perf_counter()
                self.comm.sum([x])
                seconds.append(perf_counter() - begun)
            medians.append(statistics.median(seconds[1:]))
        small, large, took = self._slowest([*medians, perf_counter() - started])
        return Link(small, large, self.comm.size), took

    def _next_look(self, took: float) -> None:
        """Not before looks have become a small part of the time. The same step on all ranks."""
        least = math.ceil(took / _SHARE / self._step) if self._step else 0
        self._look_at = self.reducer.step + max(self.options.recheck, least)

    @property
    def _step(self) -> float:
        """Seconds of the fastest step that was measured; 0 after a resume."""
        return min((took.median for took in self.took), default=0.0)

    def _look_again(self) -> None:
        now, took = self._look()
        self._next_look(took)
        if self.link is None or now.like(self.link, self._step):
            self.link, self._changed = self.link or now, 0
            return
        self._changed += 1
        if self._changed == 2:  # a link that is busy for a moment is no other one
            before = self.link
            self.restart(self.reducer.step, self.reducer.skipped)
            say(self.comm.rank, f"auto: the link was {before} and is {now}: all is measured anew")

    def _slowest(self, mine: Sequence[float]) -> list[float]:
        """Each number's largest over the ranks."""
        everyone: Gathers = self._shards or self.comm
        told = [json.loads(numbers) for numbers in everyone.allgather(json.dumps(list(mine)).encode())]
        return [max(numbers) for numbers in zip(*told, strict=True)]

    def _use(self, options: Options) -> None:
        """Go on with another method, at the step where this one is."""
        if options != self.reducer.options:
            before, self.reducer = self.reducer, self._make(options)
            self.reducer.follow(before)

    def load(self, saved: object) -> None:
        """Take over what was chosen before, and its state; or measure anew, if that was not over, from the step where
        it stood.

        Raises:
          ConfigError: as :func:`fedmpi.integrations.state.load`.
        """
        options, measuring = state.chosen(self._shards or self.comm, saved, self.tried)
        reducer = self._make(options)
        reducer.load_state_dict(saved)  # type: ignore[arg-type]  # it is what chosen() has looked at
        if measuring:
            self.restart(reducer.step, reducer.skipped)
        else:
            self.chosen, self.reducer = options, reducer

    def restart(self, step: int = 0, skipped: int = 0) -> None:
        """Measure anew, after so many steps. Called by all ranks."""
        before, self.reducer = self.reducer, self._make(self.tried[0])
        self.reducer.follow(before)
        if (before.step, before.skipped) != (step, skipped):
            self.reducer.step, self.reducer.skipped = step, skipped
            self.reducer.begin_span()
        self.chosen, self.took, self._times, self._last = None, [], [], None
        self.link, self._changed = None, 0

    def _link_facts(self) -> dict[str, float] | None:
        if self.link is None:
            return None
        return {"latency_seconds": self.link.small, "bytes_a_second": self.link.bandwidth}

    def facts(self) -> dict[str, Any]:
        """What was measured."""
        pairs = list(zip(self.tried, self.took, strict=False))
        return {
            "auto": {
                "chosen": self.chosen.model_dump(mode="json") if self.chosen else None,
                "why": self.why,
                "seconds_a_step": {_label(options): took.median for options, took in pairs},
                "quartiles": {_label(options): [took.low, took.high] for options, took in pairs},
                "link": self._link_facts(),
            }
        }


def _label(options: Options) -> str:
    plain = options.model_dump(mode="json", exclude_defaults=True)
    rest = ", ".join(f"{key}: {value}" for key, value in plain.items() if key != "name")
    return f"{options.name} ({rest})" if rest else options.name


def parse(method: AutoOptions | Options | dict[str, Any] | str) -> AutoOptions | Options:
    """The options of a method or of ``auto``.

    Raises:
      ConfigError: as :func:`fedmpi.methods.parse`.
    """
    if isinstance(method, (AutoOptions, Options)):
        return method
    if method == "auto":
        method = {"name": "auto"}
    if isinstance(method, dict) and method.get("name") == "auto":
        try:
            return AutoOptions.model_validate(method)
        except ValidationError as error:
            raise ConfigError(describe(error, AutoOptions, "method")) from None
    return methods.parse(method)
