"""``method: auto``: the job's first steps try some methods in turn, and the fastest stays.

Compression often does not pay: on a fast link coding takes longer than it saves. So what counts is the time of
whole steps of this job on this link, its computing and what overlaps with it included, and a method that
compresses more than bf16 must win clearly. In a DDP hook bf16 is measured, and stays, as torch's own hook does it:
whole buckets, small tensors too.
"""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from fedmpi import methods
from fedmpi.comm.base import Comm, Gathers
from fedmpi.errors import ConfigError
from fedmpi.integrations import state
from fedmpi.integrations.reducer import Reducer
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

    @field_validator("candidates", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return tuple(methods.parse(v, "method.candidates") for v in value)


class Auto:
    """Which reducer a step uses.

    Attributes:
      reducer: the present one.
      seconds: median seconds of a step, on the slowest rank, by position: bf16's, then each candidate's.
      chosen: what stays, once that is decided.
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
        self.seconds: list[float] = []
        self.chosen: Options | None = None
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
            return self.reducer
        now = perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        if len(self._times) == self.options.steps:
            self._measured()
        self._last = perf_counter()
        return self.reducer

    def _measured(self) -> None:
        median = statistics.median(self._times[self._UNCOUNTED :])
        self.seconds.append(self._slowest(median))
        self._times = []
        if len(self.seconds) < len(self.tried):
            self._use(self.tried[len(self.seconds)])
            return
        bf16, *others = self.seconds
        best = min(range(len(others)), key=others.__getitem__)
        wins = others[best] <= (1 - self.options.margin) * bf16
        self.chosen = self.tried[1 + best if wins else 0]
        self._use(self.chosen)

    def _slowest(self, seconds: float) -> float:
        everyone: Gathers = self._shards or self.comm
        return max(map(float, everyone.allgather(repr(seconds).encode())))

    def _use(self, options: Options) -> None:
        """Go on with another method, at the step where this one is."""
        if options == self.reducer.options:
            return
        step, skipped = self.reducer.step, self.reducer.skipped
        self.reducer = self._make(options)
        self.reducer.step, self.reducer.skipped = step, skipped

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
        self.chosen, self.seconds, self._times, self._last = None, [], [], None
        self.reducer = self._make(self.tried[0])
        self.reducer.step, self.reducer.skipped = step, skipped

    def facts(self) -> dict[str, Any]:
        """What was measured."""
        pairs = zip(self.tried, self.seconds, strict=False)
        return {
            "auto": {
                "chosen": self.chosen.model_dump(mode="json") if self.chosen else None,
                "seconds_a_step": {_label(options): seconds for options, seconds in pairs},
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
