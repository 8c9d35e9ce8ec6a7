"""What a person sees while it runs: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedmpi.tasks.metrics import METRICS, Metric

_LAST = 10  # rounds that tell how long the others will take


def human(nbytes: float) -> str:
    """1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def span(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _console() -> Console:
    """Where a live bar can go. Open MPI gives every rank a pipe as stderr and a terminal of size 0 or the
    user's own size as stdout, so a rank asks where its launcher's output really goes."""
    if not sys.stderr.isatty() and sys.stdout.isatty():
        try:
            target = str(Path(f"/proc/{os.getppid()}/fd/1").readlink())
        except OSError:
            target = ""
        if target.startswith(("/dev/pts/", "/dev/tty")):
            return Console(file=sys.stdout)
    return Console(stderr=True)


def shown(name: str, value: float | None, share: bool = True) -> str:
    """A metric for people: accuracy 96.4%."""
    if value is None:
        return f"{name} -"
    return f"{name} {100 * value:.1f}%" if share else f"{name} {value:.4g}"


def reached(summary: Mapping[str, Any]) -> str:
    """What a run came to, by its first metric."""
    name, value = summary["metric"], summary[summary["metric"]]
    share = name in METRICS and METRICS[name].share
    return f"{name} {100 * value:.2f} %" if share and value is not None else shown(name, value, share)


class Display:
    """Shows every round on a terminal; elsewhere a line every 5 seconds, and the first and last round's."""

    def __init__(self, title: str, rounds: int, enabled: bool = True) -> None:
        self._console = _console()
        self._enabled, self._rounds = enabled, rounds
        self._live: Progress | None = None
        self._started = self._printed = time.monotonic()
        self._clients = self._up = self._down = self._before = 0
        self._ends: deque[float] = deque(maxlen=_LAST + 1)  # of the last rounds
        self._metrics: Mapping[str, Metric] = {}
        self._measured = ""
        if enabled and self._console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
            )
            self._live = Progress(TextColumn(title), *columns, console=self._console)
            self._task = self._live.add_task("", total=rounds, info="")
            self._live.start()

    def start(
        self, done: int, sent: dict[str, int], metrics: Mapping[str, Metric] = MappingProxyType({})
    ) -> None:
        """The rounds begin, ``done`` of them and ``sent`` bytes being an earlier process's; of ``metrics`` by name."""
        self._metrics = metrics
        self._before, self._up, self._down = done, sent["upload"], sent["download"]
        self._started = self._printed = time.monotonic()
        self._ends.clear()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if text and self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def round(self, line: dict[str, Any]) -> None:
        if not self._enabled:
            return
        self._clients += line["clients"]
        self._up += line["upload_bytes"]
        self._down += line["download_bytes"]
        if any(line[name] is not None for name in self._metrics):
            found = [shown(name, line[name], metric.share) for name, metric in self._metrics.items()]
            self._measured = "".join(f" {text}" for text in found)
        now = time.monotonic()
        done = line["round"] + 1
        rate = self._clients / max(now - self._started, 1e-9)
        loss = "no loss" if line["loss"] is None else f"loss {line['loss']:.4f}"
        info = f"{loss}{self._measured} up {human(self._up)} down {human(self._down)} {rate:.0f} clients/s"
        info += self._left(now, self._rounds - done)
        if self._live is not None:
            self._live.update(self._task, completed=done, info=info)
        elif done in (self._before + 1, self._rounds) or now - self._printed > 5:
            self._printed = now
            print(f"round {done}/{self._rounds} {info}", file=sys.stderr, flush=True)

    def _left(self, now: float, rounds: int) -> str:
        """The time that is left by the last rounds; the first one, which prepares much, tells nothing."""
        self._ends.append(now)
        if not rounds or len(self._ends) < 2:
            return ""
        return f" {span((now - self._ends[0]) / (len(self._ends) - 1) * rounds)} left"

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
