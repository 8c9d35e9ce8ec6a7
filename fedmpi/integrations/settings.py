"""How a method is applied to a job: which parameters go exactly, which together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from fedmpi.errors import ConfigError
from fedmpi.meet.ways import Name
from fedmpi.methods.base import Options
from fedmpi.plan import Rule, Tensors
from fedmpi.validation import Strict, checked

Shapes = Mapping[str, tuple[int, ...]]

_LITTLE = 16  # a group of less than such a part of the largest waits for the next


class Settings(Strict):
    """How a method is applied to a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int = Field(0, ge=0, lt=2**63, description="the same on every rank")
    exact_below: int = Field(
        1024,
        ge=0,
        description="tensors of fewer numbers and those of one dimension (norms, biases) are averaged exactly; "
        "0: none are",
    )
    parts: tuple[Rule, ...] = Field(
        (),
        description="tensors that go otherwise: [{match: ..., travels: exact | a method}], of which the first that "
        "fits a name counts, whatever exact_below says",
    )
    start_after: int = Field(0, ge=0, description="steps that are averaged exactly before compression starts")
    steps_per_epoch: int = Field(1, ge=1, description="steps for which time-varying subspaces stay")
    group_mb: float = Field(
        25.0,
        gt=0,
        description="parameters that are compressed and sent together, in MB of float32; a larger one goes alone, or "
        "with a few small ones; methods whose numbers count over the whole model (k, dim, a sketch) take all in one",
    )
    exchange: Name = Field(
        "auto", description="how messages meet: sum, gather, merge, owner (fedmpi/meet/ways.py)"
    )

    @classmethod
    def of(cls, **settings: Any) -> Settings:
        """Raises:
        ConfigError: an unknown setting, or a value of the wrong type or range.
        """
        return checked(cls, settings)

    @field_validator("parts")
    @classmethod
    def _travel(cls, parts: tuple[Rule, ...]) -> tuple[Rule, ...]:
        for rule in parts:
            if rule.travels in ("local", "frozen"):
                raise ValueError(
                    f"expected exact or a method, got {rule.travels} for {rule.match!r}: what a rank keeps for itself "
                    "is not given to DDP (ignored parameters), what nobody changes has requires_grad=False"
                )
        return parts

    @property
    def says_nothing(self) -> bool:
        """None of how tensors travel was given."""
        return self.model_fields_set.isdisjoint(("exact_below", "parts", "start_after", "exchange"))

    def split(self, shapes: Shapes) -> tuple[Shapes, Shapes]:
        """The parameters that are averaged exactly, and the others."""
        ways = self.ways(shapes)
        exact = {n: s for n, s in shapes.items() if ways[n] == "exact"}
        return exact, {n: s for n, s in shapes.items() if n not in exact}

    def ways(self, shapes: Shapes) -> dict[str, Options | Literal["exact"] | None]:
        """How each parameter goes: exactly, by a rule's method, or (None) by the job's.

        Raises:
          ConfigError: a rule fits none.
        """
        tensors = Tensors(dict(shapes), {}, frozenset(), frozenset())
        fitting = {name: next((r for r in self.parts if tensors.fits(r, name)), None) for name in shapes}
        for rule in self.parts:
            if not any(tensors.fits(rule, name) for name in shapes):
                raise ConfigError(
                    f"parts.match: {rule.match!r} fits none of the parameters; expected a pattern of names such as "
                    f"{', '.join(list(shapes)[:3])}"
                )
        ways: dict[str, Options | Literal["exact"] | None] = {}
        for name, shape in shapes.items():
            found = fitting[name]
            if found is None or not math.prod(shape):
                ways[name] = "exact" if self.exact(shape) else None
            else:
                ways[name] = found.travels if isinstance(found.travels, Options) else "exact"
        return ways

    def exact(self, shape: tuple[int, ...]) -> bool:
        """A tensor of this shape is averaged exactly: also one of no numbers, in which there is nothing to compress."""
        size = math.prod(shape)
        return size == 0 or (self.exact_below > 0 and (len(shape) < 2 or size < self.exact_below))

    def grouped(self, shapes: Shapes, ranks: int) -> list[Shapes]:
        """The groups that parameters go in, from the last parameter to the first, as gradients become ready.

        One as large as a group is one by itself, whose gradient can be averaged where it lies; small ones before and
        after it go together, and a few with the next group, for a message costs time whatever its length.
        """
        limit = self.group_mb * 2**20 / 4
        if self.exchange == "owner":
            limit = min(limit, sum(map(math.prod, shapes.values())) / ranks)
        parts: list[dict[str, tuple[int, ...]]] = []
        small: dict[str, tuple[int, ...]] = {}
        room = 0.0
        for name in reversed(list(shapes)):
            size = math.prod(shapes[name])
            if size >= limit:
                parts.append({name: shapes[name]})
                continue
            if size > room:
                small, room = {}, limit
                parts.append(small)
            small[name] = shapes[name]
            room -= size
        place = {name: i for i, name in enumerate(shapes)}
        parts.sort(key=lambda part: -min(place[name] for name in part))
        for i in reversed(range(len(parts) - 1)):
            if sum(map(math.prod, parts[i].values())) < limit / _LITTLE:
                parts[i : i + 2] = [parts[i] | parts[i + 1]]
        return list(parts)
