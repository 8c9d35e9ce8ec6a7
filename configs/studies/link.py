"""``python -m configs.studies link``: data-parallel training across a link of a set bandwidth, against DDP's bf16 hook.

Two ranks of one thread each train one model side by side under every case; at each bandwidth the cases take turns of
some steps, with the reference in every turn. Time to an accuracy is that of whole trainings, looks at the test
images left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from configs.studies.link_cases import CASES, OURS, POWERSGD, REFERENCE
from configs.studies.link_driver import Job
from fedmpi.bench.timing import Row, Spread, Table
from fedmpi.errors import ConfigError

SPEEDS: dict[str, float | None] = {"unshaped": None, "1 Gb/s": 1e9, "100 Mb/s": 1e8, "10 Mb/s": 1e7}
SLOWER = 1 / 0.97  # times the reference's seconds a step, for auto on a fast link
FASTER = {"100 Mb/s": 1 / 6, "1 Gb/s": 1 / 1.7}  # times the reference's seconds to the accuracy
ACCURACY = 0.80
EVERY, IMAGES, MOST = (
    20,
    1000,
    400,
)  # steps between looks at so many test images; steps after which to give up
_WARM = 4  # steps that do not count: DDP rebuilds its buckets, kernels are loaded
_SLOW = 2.5e7  # bits a second: below so many, a turn has one step, below twice as many two, and so on


class Turn:
    """Seconds a step of each case, by turns."""

    def __init__(self, job: Job, names: Sequence[str]) -> None:
        self.job, self.names = job, names
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.sent: dict[str, float] = {}

    def take(self, count: int) -> None:
        for name in self.names:
            answer = self.job.ask("steps", name, count=count)
            self.seconds[name].append(answer["seconds"] / count)
            self.sent[name] = answer["sent"] / count

    def row(self, name: str, speed: str, target: float | None = None) -> Row:
        """Each turn against the mean of the reference's turns before and after it."""
        own, reference = self.seconds[name], self.seconds[self.names[0]]
        around = [(a + b) / 2 for a, b in pairwise(reference)]
        ratios = [seconds / other for seconds, other in zip(own, around, strict=False)]
        label = f"{name}, {speed}: {self.sent[name] / 1e6:.3f} MB"
        return Row(label, Spread.of(own), Spread.of(reference), Spread.of(ratios), target)


def steps(job: Job, speed: str, names: Sequence[str], repeats: int, most: int) -> Turn:
    """``repeats`` turns, and one more of which only the reference counts, after one that does not count."""
    job.pair.shape(SPEEDS[speed])
    bits = SPEEDS[speed] or 1e12
    count = max(1, min(most, round(bits / _SLOW)))
    turn = Turn(job, [REFERENCE, *(name for name in names if name != REFERENCE)])
    for _ in range(repeats + 1):
        turn.take(count)
    return turn


def smoothed(curve: Sequence[float]) -> list[float]:
    """The mean of each three looks that follow each other."""
    return [sum(curve[i : i + 3]) / 3 for i in range(len(curve) - 2)]


def steps_to(curve: Sequence[float], accuracy: float) -> int | None:
    """Steps until the smoothed accuracy is reached; None if it is not."""
    reached = (i for i, smooth in enumerate(smoothed(curve)) if smooth >= accuracy)
    return next(((i + 3) * EVERY for i in reached), None)


def cases(model: str) -> dict[str, tuple[dict[str, Any], float]]:
    """A model's cases: options and rates."""
    found = ((name, case.of(model)) for name, case in CASES.items())
    return {name: case for name, case in found if case is not None}


def compare_steps(job: Job, speed: str, repeats: int, count: int) -> Turn:
    """All cases at one bandwidth, each in training anew; ``auto`` judges the link first."""
    job.pair.shape(SPEEDS[speed])
    names = list(cases(job.model))
    for name, (options, rate) in cases(job.model).items():
        job.start(name, options, rate)
    for name in names:
        warm = min(_WARM, 1 + round((SPEEDS[speed] or 1e12) / _SLOW))
        job.ask("steps", name, count=warm)
    while "auto" in names and job.ask("stats", "auto")["auto"]["chosen"] is None:
        job.ask("steps", "auto", count=1)
    turn = steps(job, speed, names, repeats, count)
    for name in names:
        job.ask("stop", name)
    return turn


def train(job: Job, speed: str, names: Sequence[str], accuracy: float) -> dict[str, tuple[float, int]]:
    """Seconds and steps of each case's training until its accuracy, the mean of three looks, reaches ``accuracy``.

    Raises:
      ConfigError: one does not reach it.
    """
    job.pair.shape(SPEEDS[speed])
    found: dict[str, tuple[float, int]] = {}
    seconds, curves = dict.fromkeys(names, 0.0), {name: list[float]() for name in names}
    for name in names:
        options, rate = cases(job.model)[name]
        job.start(name + " anew", options, rate)
    for done in range(EVERY, MOST + 1, EVERY):
        for name in [name for name in names if name not in found]:
            seconds[name] += job.ask("steps", name + " anew", count=EVERY)["seconds"]
            curves[name].append(job.ask("accuracy", name + " anew", count=IMAGES)["accuracy"])
            if steps_to(curves[name], accuracy) is not None:
                found[name] = seconds[name], done
    for name in names:
        job.ask("stop", name + " anew")
        if name not in found:
            raise ConfigError(f"link study: {name} has not reached {accuracy:.0%} within {MOST} steps")
    return found


def compare(
    found: dict[str, tuple[float, int]],
    name: str,
    other: str,
    speed: str,
    accuracy: float,
    target: float | None,
) -> Row:
    (own, count), (reference, others) = found[name], found[other]
    label = f"{accuracy:.0%} at {speed}: {name} ({count} steps) × {other} ({others} steps)"
    return Row(label, Spread.of([own]), Spread.of([reference]), Spread.of([own / reference]), target)


def run(
    repeats: int = 5,
    count: int = 8,
    speeds: Sequence[str] = tuple(SPEEDS),
    accuracy: float = ACCURACY,
    data: str = "fashion-mnist",
    model: str = "mlp",
) -> Table:
    """Args:
      repeats: turns at each bandwidth.
      count: steps of a turn; fewer where the link is slow.
      speeds: of :data:`SPEEDS`; a time to the accuracy is measured at those with a target.
      accuracy: on test images.
      data: a data set of images.
      model: mlp, or cnn: about as many parameters, and ten times as much to compute.

    Raises:
      ConfigError: there can be no such link here (says what it takes), or a case does not learn.
      DataError: the data are not there.
    """
    rows: list[Row] = []
    with Job(model, name=data) as job:
        for speed in speeds:
            turn = compare_steps(job, speed, repeats, count)
            rows += [
                turn.row(name, speed, SLOWER if (name, speed) == ("auto", "unshaped") else None)
                for name in turn.names
            ]
        for speed in (s for s in speeds if s in FASTER):
            found = train(job, speed, (REFERENCE, POWERSGD, *OURS), accuracy)
            best = min(OURS, key=lambda name: found[name][0])
            rows.append(compare(found, best, REFERENCE, speed, accuracy, FASTER[speed]))
            rows.append(compare(found, best, POWERSGD, speed, accuracy, 1.0))
        facts: dict[str, str | int] = {
            "ranks": 2,
            "threads": 1,
            "model": model,
            "parameters": job.parameters,
            "data": data,
            "link": "veth + tbf",
            "torch": torch.__version__,
            "repeats": repeats,
        }
    return Table("link", facts, REFERENCE, rows)
