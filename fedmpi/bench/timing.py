"""Timing a case in turns with its reference, and the table that comes of it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fedmpi.comm import solo
from fedmpi.comm.placement import own_device

Work = Callable[[], object]


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """One value is its own quartiles."""
        several = values if len(values) > 1 else 2 * list(values)
        low, median, high = statistics.quantiles(several, n=4, method="inclusive")
        return cls(low, median, high)


class Row(NamedTuple):
    """One case.

    Attributes:
      seconds, reference: of the case, and of what it is compared with.
      ratio: seconds / reference, of turns that follow each other.
      target: the ratio to stay below; None where there is none.
    """

    name: str
    seconds: Spread
    reference: Spread
    ratio: Spread
    target: float | None

    @property
    def met(self) -> bool:
        return self.target is None or self.ratio.median <= self.target

    def plain(self) -> dict[str, dict[str, float]]:
        """What was measured, for JSON."""
        return {
            "seconds": self.seconds._asdict(),
            "reference_seconds": self.reference._asdict(),
            "ratio": self.ratio._asdict(),
        }


def measure(
    name: str,
    work: Work,
    reference: Work,
    target: float | None,
    repeats: int,
    device: torch.device | None = None,
) -> Row:
    """Time ``work`` between two turns of ``reference``, ``repeats`` times after one that does not count, so that what
    else the machine does weighs on both alike.

    Args:
      device: where they work; default: the CPU.
    """
    work()
    reference()
    references, seconds = [clock(reference, device)], []
    for _ in range(repeats):
        seconds.append(clock(work, device))
        references.append(clock(reference, device))
    pairs = zip(seconds, references, references[1:], strict=False)
    ratios = [own / ((before + after) / 2) for own, before, after in pairs]
    return Row(name, Spread.of(seconds), Spread.of(references), Spread.of(ratios), target)


def clock(work: Work, device: torch.device | None = None) -> float:
    """Seconds, by a GPU's own events where that is the device."""
    if device is None or device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        work()
        end_event.record()
        end_event.synchronize()
    milliseconds: float = begin_event.elapsed_time(end_event)
    return milliseconds / 1000


def place(wish: str) -> torch.device:
    """The device that ``--device`` names: auto, cpu, cuda or cuda:N.

    Raises:
      ConfigError: it is not here.
    """
    return own_device(wish, solo())


def named(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of words as columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class Table(NamedTuple):
    """A benchmark's outcome.

    Attributes:
      bench: its name on the command line.
      facts: what was measured on what.
      against: what the reference is.
    """

    bench: str
    facts: dict[str, str | int]
    against: str
    rows: list[Row]

    def verdict(self, row: Row) -> str:
        if row.target is None:
            return ""
        return "met" if row.met else "MISSED"

    def missed(self) -> list[str]:
        """Cases whose target is not met."""
        return [row.name for row in self.rows if self.verdict(row) == "MISSED"]

    def text(self) -> str:
        """Medians, with quartiles in brackets."""
        head = ("case", "ms", f"× {self.against}", "target", "")
        lines = [
            (
                row.name,
                f"{1e3 * row.seconds.median:.2f} [{1e3 * row.seconds.low:.2f} … {1e3 * row.seconds.high:.2f}]",
                f"{row.ratio.median:.2f} [{row.ratio.low:.2f} … {row.ratio.high:.2f}]",
                "" if row.target is None else f"≤ {row.target:g}",
                self.verdict(row),
            )
            for row in self.rows
        ]
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        return "\n".join([f"{self.bench}: {facts}", columns([head, *lines])])

    def json(self) -> str:
        rows = [
            {
                "case": row.name,
                **row.plain(),
                "target": row.target,
                "verdict": self.verdict(row),
            }
            for row in self.rows
        ]
        return json.dumps(
            {"bench": self.bench, **self.facts, "against": self.against, "rows": rows}, indent=2
        )
