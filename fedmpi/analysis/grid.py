"""The grid of a sweep: OVER.yaml, its points and their runs.

    seeds: [0, 1, 2]                         # or a number: 3 is the same
    cases:                                   # overrides that go together, by name
      vanilla: {method: dense}
      δ = 0.2: {method: {name: lookback, threshold: 0.2}}
    over:                                    # every combination of these, for each case
      partition: [iid, {name: labels, labels_per_client: 3}]

``cases`` and ``over`` may be left out. Keys are those of a configuration, with dots.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, field_validator

from fedmpi import config as configuration
from fedmpi.analysis.legend import named
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.strict_yaml import dump
from fedmpi.validation import Strict, checked, mapping, no_words, read_yaml

_LONGEST = 80  # characters of a folder's name


class Over(Strict):
    """What OVER.yaml holds."""

    model_config = ConfigDict(extra="forbid")

    seeds: list[int] = Field([0], min_length=1, description="the runs of each point; a number n is 0 … n − 1")
    cases: dict[str, dict[str, Any]] = Field({"": {}}, min_length=1, description="named overrides")
    over: dict[str, list[Any]] = Field({}, description="key.path: values, all combinations")

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("over")
    @classmethod
    def _some(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in value.items():
            no_words(values, key)
            if not values:
                raise ValueError(f"{key}: expected at least one value")
        return value


class Job(NamedTuple):
    """One run of a sweep: a point and a seed."""

    label: str  # the point's
    case: str
    values: dict[str, Any]  # those of ``over``
    seed: int
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"


def read(path: Path | Mapping[str, Any]) -> Over:
    """OVER.yaml, or a mapping of the same keys.

    Raises:
      ConfigError: it cannot be read, or a key or value in it is wrong.
    """
    if isinstance(path, Mapping):
        return checked(Over, dict(path), "OVER")
    return checked(Over, mapping(read_yaml(path, "OVER"), f"OVER: {path}"), str(path))


def jobs(base: str | Path | Mapping[str, Any], over: Over, overrides: list[str], out: Path) -> list[Job]:
    """Every run of the grid, the first seed of all points first.

    Raises:
      ConfigError: a point is no valid configuration (names it), or two points are called the same.
    """
    points = []
    for case, fixed in over.cases.items():
        for combination in itertools.product(*over.over.values()):
            chosen = dict(zip(over.over, combination, strict=True))
            shown = [_shown(key, value) for key, value in chosen.items()]
            label = ", ".join([case, *shown] if case else shown) or "base"
            points.append((label, case, chosen, {**fixed, **chosen}))
    labels = [label for label, *_ in points]
    folders = [_folder(label) for label in labels]
    for names in (labels, folders):
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"OVER: several points are called {sorted(twice)[0]!r}; name them in cases")
    found = []
    for seed in over.seeds:
        for (label, case, values, changes), folder in zip(points, folders, strict=True):
            words = [f"{key}={_yaml(value)}" for key, value in {**changes, "seed": seed}.items()]
            try:
                config = configuration.load(base, [*overrides, *words])
            except ConfigError as error:
                raise ConfigError(f"{label}, seed {seed}: {error}") from None
            found.append(Job(label, case, values, seed, config, out / f"{folder}-seed{seed}"))
    return found


def _yaml(value: Any) -> str:
    return dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)


def _shown(key: str, value: Any) -> str:
    """``threshold=0.2``; ``partition=labels(labels_per_client=3)``."""
    if isinstance(value, dict) and "name" in value:
        value = named(value["name"], value)
    return f"{key.rpartition('.')[2]}={value}"


def _folder(label: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:_LONGEST]
