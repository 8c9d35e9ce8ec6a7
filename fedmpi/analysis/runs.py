"""Reads what a finished run left in its folder."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fedmpi import strict_yaml
from fedmpi.engine import manifest
from fedmpi.errors import CheckpointError, DataError
from fedmpi.tasks.metrics import METRICS

Model = TypeVar("Model", bound=BaseModel)


class Summary(BaseModel):
    """What of summary.json is shown."""

    model_config = ConfigDict(extra="allow")  # metrics by their names, and what is not shown

    method: str
    metric: str = "accuracy"
    score: float | None  # of this metric
    rounds: int
    messages: int
    scalars: int | None = None
    upload_bytes: int
    download_bytes: int
    upload_ratio: float | None
    download_ratio: float | None
    total_ratio: float | None
    values_only: dict[str, float | None] = {}
    seconds: float
    simulated_seconds: float | None = None
    client_score: float | None = None
    client_worst: float | None = None
    client_after_score: float | None = None
    client_after_worst: float | None = None
    seed: int
    ranks: int = 1
    comm: str = ""

    @property
    def metrics(self) -> dict[str, float | None]:
        """All of them, the first one first."""
        extra = self.model_extra or {}
        names = [self.metric, *(n for n in extra if n in METRICS or ":" in n)]
        return {n: extra[n] for n in names if isinstance(extra.get(n), float | int | None)}

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(name := values.get("metric", "accuracy"), str):
            after = "client_after_score", f"client_after_{name}"
            for key, of in (("score", name), ("client_score", f"client_{name}"), after):
                if of in values:
                    values = {**values, key: values[of]}
        return values


class _Round(BaseModel):
    """What of a line of metrics.jsonl is drawn."""

    model_config = ConfigDict(extra="allow")  # metrics, by their names

    round: int
    upload_bytes: int
    download_bytes: int
    simulated_seconds: float = math.nan


class Point(NamedTuple):
    """An evaluated round: rounds, bytes of all clients and simulated seconds (or NaN) so far, and the metric then."""

    rounds: int
    uploaded: int
    downloaded: int
    seconds: float
    score: float

    @property
    def total(self) -> int:
        return self.uploaded + self.downloaded


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      folder: as the user gave it.
      name: short, and no other run's.
      twin: equal for runs that differ in nothing but the seed.
      points: the evaluated rounds.
      link: the simulated bandwidth; "" where none was.
      config: the configuration, as in config.yaml.
    """

    folder: Path
    name: str
    twin: str
    summary: Summary
    points: list[Point]
    link: str
    config: Mapping[str, Any]


def load(folder: Path, name: str) -> Run:
    """The finished run in ``folder``, to be called ``name``.

    Raises:
      DataError: it is no run, or is unfinished or damaged.
    """
    if not folder.is_dir():
        got = "got a file" if folder.exists() else "there is none"
        raise DataError(f"{folder}: expected a run's folder, {got}")
    if not (folder / "config.yaml").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        hint = f"; there are runs inside it: {words(inside)}" if inside else ""
        raise DataError(f"{folder} is no run: it has no config.yaml{hint}")
    try:
        config = strict_yaml.parse(read(folder / "config.yaml"))
    except strict_yaml.NotYaml as error:
        raise DataError(f"{folder / 'config.yaml'} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.yaml'}: expected a mapping of keys, got {type(config).__name__}")
    metrics = folder / "metrics.jsonl"
    if not (folder / "summary.json").exists():
        done, rounds = read(metrics).count("\n") if metrics.exists() else 0, config.get("rounds", "?")
        raise DataError(
            f"{folder} is unfinished: it has no summary.json, and {done} of {rounds} rounds; it is still "
            "in progress or was interrupted: wait for it, run it again or leave it out"
        )
    summary = parse(Summary, read(folder / "summary.json"), str(folder / "summary.json"))
    lines = read(metrics).splitlines()
    rounds = [parse(_Round, line, f"{metrics}, line {i}") for i, line in enumerate(lines, 1)]
    scores = [_score(line, summary.metric, f"{metrics}, line {i}") for i, line in enumerate(rounds, 1)]
    if len(rounds) != summary.rounds:
        raise DataError(f"{metrics}: expected {summary.rounds} lines, a line a round, got {len(rounds)}")
    uploaded = accumulate(line.upload_bytes for line in rounds)
    downloaded = accumulate(line.download_bytes for line in rounds)
    seconds = accumulate(line.simulated_seconds for line in rounds)
    points = [
        Point(line.round + 1, up, down, clock, score)
        for line, up, down, clock, score in zip(rounds, uploaded, downloaded, seconds, scores, strict=True)
        if score is not None
    ]
    time = config.get("time")
    link = f"{time.get('upload')} Mb/s up, {time.get('download')} Mb/s down" if isinstance(time, dict) else ""
    rest = {key: value for key, value in config.items() if key != "seed"}
    return Run(folder, name, json.dumps(rest, sort_keys=True, default=str), summary, points, link, config)


def _score(line: _Round, metric: str, where: str) -> float | None:
    """The value of ``metric``; None where the round was not evaluated."""
    extra = line.model_extra or {}
    if metric not in extra:
        raise DataError(f"{where}: {metric}: Field required")
    value = extra[metric]
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise DataError(f"{where}: {metric}: expected a number, got {value!r:.40}")


def read(path: Path) -> str:
    """A file's text; DataError that names it where it cannot be read."""
    try:
        return manifest.read(path).decode("utf-8")
    except CheckpointError as error:  # also a link or a pipe: what lies in a run's folder may be anybody's
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8 text") from None


def parse(model: type[Model], text: str, where: str) -> Model:
    """JSON as a checked ``model``; DataError that says ``where`` it is wrong."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "json_invalid":
            raise DataError(f"{where}: not JSON, cut off or damaged ({problem['ctx']['error']})") from None
        raise DataError(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def words(paths: Iterable[Path]) -> str:
    """Paths as words of a shell command."""
    return " ".join(shlex.quote(str(path)) for path in paths)
