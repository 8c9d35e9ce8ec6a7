"""``fedmpi advise``: does compression pay on this link, with these processors, for so many parameters?

Everything is measured here and now, unless a link is imagined, whose times are computed
(:class:`~fedmpi.comm.imagined.ImaginedComm`): the link by all-reduces of two sizes, each method by steps of the very
:class:`~fedmpi.integrations.reducer.Reducer` that the drop-ins use, on random gradients. What it cannot know is how
much of the exchange a job hides behind its backward pass, and what a method costs in accuracy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any, NamedTuple

import torch

from fedmpi import random
from fedmpi.comm.base import Comm
from fedmpi.comm.imagined import ImaginedComm
from fedmpi.errors import ConfigError
from fedmpi.integrations.reducer import Reducer
from fedmpi.integrations.settings import Shapes
from fedmpi.methods import METHODS

CANDIDATES: tuple[dict[str, Any] | str, ...] = tuple(
    candidate
    for candidate in (
        "dense",
        "bf16",
        {"name": "qsgd", "bits": 4},
        {"name": "signsgd", "feedback": True},
        {"name": "topk", "ratio": 0.01, "feedback": True},
        {"name": "randomk", "ratio": 0.01, "feedback": True},
        {"name": "powersgd", "rank": 4, "feedback": True},
        {"name": "intrinsic", "dim": 0.01, "matrix": "hashed"},
    )
    if (candidate if isinstance(candidate, str) else candidate["name"]) in METHODS
)
"""What is compared unless methods are named; a ``dim`` below 1 is a share of the parameters."""

_SMALL, _LARGE = 1 << 8, 1 << 22  # float32 numbers of the link's two all-reduces
_BUDGET = 2.5  # seconds that a method's steps may take
_SHORT = 0.2  # over a link that is imagined
_NEAR = 1.05  # within so much of the fastest, the simpler method is the advice


class Link(NamedTuple):
    """What an all-reduce costs: ``latency`` seconds and 1 / ``bandwidth`` seconds a byte that a rank sends."""

    latency: float
    bandwidth: float


class Row(NamedTuple):
    """One method, on the slowest rank; seconds of one step, bytes that a rank sends in it."""

    label: str
    encode: float
    wire: float
    decode: float
    sent: float

    @property
    def total(self) -> float:
        return self.encode + self.wire + self.decode

    @property
    def codec(self) -> float:
        return self.encode + self.decode


def shapes_of(params: int) -> dict[str, tuple[int, ...]]:
    """Matrices of 1024 columns, 4096 rows at most, and the rest as a vector: about what layers look like."""
    shapes: dict[str, tuple[int, ...]] = {}
    rows, rest = divmod(params, 1024)
    while rows:
        shapes[f"layer {len(shapes)}"] = (min(rows, 4096), 1024)
        rows -= min(rows, 4096)
    return shapes | ({"rest": (rest,)} if rest else {})


def link(comm: Comm) -> Link:
    """Latency and bandwidth, from the medians of all-reduces of two sizes."""
    if comm.size == 1:
        return Link(0.0, float("inf"))
    if isinstance(comm, ImaginedComm):
        return Link(comm.latency, comm.bandwidth)
    small, large = (_median(comm, n) for n in (_SMALL, _LARGE))
    per_rank = 2 * (comm.size - 1) / comm.size * 4 * (_LARGE - _SMALL)
    return Link(small, per_rank / max(large - small, 1e-9))


def _median(comm: Comm, n: int) -> float:
    x, seconds = torch.zeros(n), []
    for _ in range(7):
        started = perf_counter()
        comm.sum([x])
        seconds.append(perf_counter() - started)
    return _slowest(comm, [statistics.median(seconds[1:])])[0]


def _slowest(comm: Comm, mine: Sequence[float]) -> list[float]:
    """Each number's largest value over the ranks."""
    every = comm.allgather_tensor(torch.tensor(mine, dtype=torch.float64))
    return [float(x) for x in every.amax(0)]


def measure(comm: Comm, shapes: Shapes, method: dict[str, Any] | str) -> Row:
    """A method's step. Called by all ranks.

    Raises:
      ConfigError: the method cannot be a drop-in, or does not fit the parameters.
    """
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    options, label = _resolved(method, total)
    reducer = Reducer(shapes, options, comm)
    noise = _noise(comm.rank, total).split([group.spec.size for group in reducer.groups])
    names = ("encode", "wire", "decode", "sent")
    imagined = comm if isinstance(comm, ImaginedComm) else None
    budget = _BUDGET if imagined is None else _SHORT
    spent, steps, total_of = 0.0, 0, dict.fromkeys(names, 0.0)
    # One step to warm up, then as many as the budget allows: the same number on every rank.
    while steps < 2 or (spent < budget and steps < 8):
        before, started, waited = (
            reducer.seconds | {"sent": comm.sent},
            perf_counter(),
            imagined.waited if imagined else 0.0,
        )
        for i, group in enumerate(reducer.groups):
            group.flat_D.copy_(noise[i])
            reducer.reduce(i)
        seconds, after = perf_counter() - started, reducer.seconds | {"sent": comm.sent}
        if imagined is not None:  # instead of what standing for the others took
            after["wire"] = before["wire"] + imagined.waited - waited
        spent += _slowest(comm, [seconds])[0]
        steps += 1
        if steps > 1:
            total_of = {n: total_of[n] + after[n] - before[n] for n in names}
    encode, wire, decode, sent = _slowest(comm, [total_of[n] / (steps - 1) for n in names])
    return Row(label, encode, wire, decode, sent)


@lru_cache(1)
def _noise(rank: int, size: int) -> torch.Tensor:
    """Gradients of all parameters, drawn once for all methods."""
    return random.normal(random.key(0, client=rank, stream="advise"), size)


def _resolved(method: dict[str, Any] | str, total: int) -> tuple[dict[str, Any], str]:
    options: dict[str, Any] = {"name": method} if isinstance(method, str) else dict(method)
    if isinstance(options.get("dim"), float):
        options["dim"] = max(1, round(options["dim"] * total))
    rest = ", ".join(f"{k}: {v}".lower() for k, v in options.items() if k != "name")
    return options, f"{options['name']} ({rest})" if rest else options["name"]


def break_even(row: Row, bf16: Row) -> float | None:
    """The bandwidth in bytes a second below which ``row`` is faster than bf16; infinite if always, None if never."""
    saved, dearer = bf16.sent - row.sent, row.codec - bf16.codec
    if saved <= 0:
        return None
    return float("inf") if dearer <= 0 else saved / dearer


def advise(
    comm: Comm,
    shapes: Shapes,
    candidates: Sequence[dict[str, Any] | str] = CANDIDATES,
    say: Callable[[str], None] = lambda line: None,
    computing: float = 0.0,
) -> str:
    """The table and the verdict, the same on every rank.

    Args: computing: seconds of a step of the job without any exchange.

    Raises:
      ConfigError: a method that was asked for cannot be a drop-in.
    """
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    here = link(comm)
    rows = []
    for method in candidates if "bf16" in candidates else ("bf16", *candidates):
        say(f"measuring {_resolved(method, total)[1]} …")
        rows.append(measure(comm, shapes, method))
    bf16 = next(row for row in rows if row.label == "bf16")
    ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''} over {comm.name}"
    speed = f"latency {1e6 * here.latency:.0f} µs, {_bandwidth(here.bandwidth)} a rank"
    lines = [
        f"{total:,} parameters, {ranks}: {speed}",
        "",
        f"{'method':<42}{'encode':>10}{'wire':>10}{'decode':>10}{'step':>10}{'sent':>10}   pays below",
    ]
    for row in rows:
        step = computing + row.total
        times = "".join(f"{1e3 * x:>7.1f} ms" for x in (row.encode, row.wire, row.decode, step))
        point = break_even(row, bf16)
        pays = (
            ""
            if row is bf16
            else "never"
            if point is None
            else "any"
            if point == float("inf")
            else _bandwidth(point)
        )
        lines.append(f"{row.label:<42}{times}{row.sent / 1e6:>7.2f} MB   {pays}")
    if computing:
        what = f"a step is {1e3 * computing:.1f} ms of computing and all of the exchange"
        lines += ["", f"{what}, as if none of it went on during the backward pass"]
    return "\n".join([*lines, "", verdict(rows, bf16, comm.size, computing)])


def verdict(rows: Sequence[Row], bf16: Row, ranks: int, computing: float = 0.0) -> str:
    """One plain sentence."""
    if ranks == 1:
        return "One rank exchanges nothing: start this under mpirun, srun or torchrun to measure a link."
    best = min(rows, key=lambda row: row.total)
    least, half = computing + best.total, computing + bf16.total
    if half <= _NEAR * least:
        return f"Stay with bf16: {1e3 * half:.1f} ms a step; nothing here saves more than 5 % of it."
    if best.label == "dense":
        return f"Do not compress: {1e3 * least:.1f} ms a step against {1e3 * half:.1f} ms with bf16."
    return (
        f"Use {best.label}: {1e3 * least:.1f} ms a step against {1e3 * half:.1f} ms with bf16 "
        f"({half / least:.1f}x), if its accuracy suits you."
    )


def _bandwidth(x: float) -> str:
    """Bytes a second as bits a second."""
    if x == float("inf"):
        return "no link"
    return f"{8 * x / 1e9:.2f} Gb/s" if 8 * x >= 1e9 else f"{8 * x / 1e6:.1f} Mb/s"


def check(methods: Sequence[Any]) -> Sequence[dict[str, Any] | str]:
    """Methods as the command line gives them.

    Raises:
      ConfigError: something else than a name or a mapping with one.
    """
    for method in methods:
        if not isinstance(method, str) and not (
            isinstance(method, dict) and isinstance(method.get("name"), str)
        ):
            raise ConfigError(f"--method: expected a name or {{name: …}}, got {method!r}")
    return methods
