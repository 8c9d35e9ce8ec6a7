"""What a drop-in tells the person in front of the job: lines of the logger ``fedmpi``, on rank 0.

They go to stderr unless the job has configured logging; ``logging.getLogger("fedmpi").setLevel("WARNING")`` silences
them.
"""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_LOG = logging.getLogger("fedmpi")
T = TypeVar("T")


def say(rank: int, line: str) -> None:
    if rank:
        return
    if not _LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fedmpi: %(message)s"))
        _LOG.addHandler(handler)
        _LOG.propagate = False
    if _LOG.level == logging.NOTSET:
        _LOG.setLevel(logging.INFO)
    _LOG.info(line)


def say_at_end(rank: int, job: T, stats: Callable[[T], dict[str, Any]]) -> None:
    """A line of what the job came to, when the process ends while ``job`` is there."""
    there = weakref.ref(job)

    def end() -> None:
        if (found := there()) is not None and (line := summary(stats(found))):
            say(rank, line)

    if rank == 0:
        atexit.register(end)
        weakref.finalize(job, atexit.unregister, end)


def summary(stats: Mapping[str, Any]) -> str:
    """One line; "" if no step was averaged."""
    lost = stats["skipped"] if "skipped" in stats else stats["dropped"]
    if not stats["steps"] + lost:
        return ""
    sent, full = stats["payload_bytes"], stats["uncompressed_bytes"]
    line = f"{stats['method']}: {stats['steps']:,} step{'s' if stats['steps'] != 1 else ''}"
    if "rounds" in stats:
        line += f", {stats['rounds']:,} rounds"
    if lost:
        line += f" and {lost:,} {'skipped' if 'skipped' in stats else 'dropped'}"
    line += f", {size(sent)} sent a rank instead of {size(full)}"
    if sent:
        line += f" ({full / sent:.1f}x smaller)"
    what = "step" if "timed_steps" in stats else "round"
    if timed := stats[f"timed_{what}s"]:
        phases = ", ".join(
            f"{name} {1e3 * stats[f'{name}_seconds'] / timed:.1f}" for name in ("encode", "wire", "decode")
        )
        line += f"; ms a {what}: {phases} (without {stats['warmup_seconds']:.2f} s of the first two)"
    return line


def size(nbytes: float) -> str:
    """With three digits: ``1.86 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def bandwidth(x: float) -> str:
    """Bytes a second as bits a second."""
    if x == float("inf"):
        return "no link"
    return f"{8 * x / 1e9:.2f} Gb/s" if 8 * x >= 1e9 else f"{8 * x / 1e6:.1f} Mb/s"


def table(layers: list[dict[str, Any]]) -> str:
    """A line a message (:meth:`fedmpi.integrations.reducer.Reducer.layers`)."""
    width = max([8, *(len(_tensors(row)) for row in layers)])
    lines = [f"{'tensors':<{width}}  {'numbers':>12}  {'method':<10}  {'sent':>9}  {'ratio':>7}  {'kept':>9}"]
    for row in layers:
        lines.append(
            f"{_tensors(row):<{width}}  {row['numbers']:>12,}  {row['method']:<10}  {size(row['payload_bytes']):>9}  "
            f"{row['ratio']:>6.1f}x  {size(row['kept_bytes']):>9}"
        )
    return "\n".join(lines)


def _tensors(row: Mapping[str, Any]) -> str:
    first, *others = row["tensors"]
    return f"{first} … {others[-1]} ({len(others) + 1})" if others else first
