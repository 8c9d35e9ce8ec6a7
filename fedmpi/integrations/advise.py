"""``fedmpi advise``: does compression pay on this link, with these processors, for so many parameters?

Everything is measured here and now, unless a link is imagined, whose times are computed
(:class:`~fedmpi.comm.imagined.ImaginedComm`): the link by all-reduces of two sizes, each method by steps of the very
:class:`~fedmpi.integrations.reducer.Reducer` that the drop-ins use, on random gradients. What it cannot know is what a
method costs in accuracy, and how much of the exchange a job hides behind its backward pass: a quarter of its computing
is taken for it (:data:`HIDES`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any, NamedTuple

import torch

from fedmpi import methods
from fedmpi.comm.base import Comm
from fedmpi.comm.imagined import ImaginedComm
from fedmpi.errors import ConfigError
from fedmpi.integrations.fragments import Fragment
from fedmpi.integrations.reducer import Reducer
from fedmpi.integrations.say import bandwidth
from fedmpi.integrations.settings import Shapes
from fedmpi.methods import METHODS
from fedmpi.optimizers import Optimizer

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
HIDES = 0.25
"""Of a step's computing, the part that hides the wire: with it steps over slower links follow from those over a fast
one, for the two jobs that ``configs/studies/link.py`` measures (``configs/results/link.json``, ``link-mlp.json``)."""

_BUDGET = 2.5  # seconds that a method's steps may take
_SHORT, _LONG = 0.3, 0.8  # over a link that is imagined; a first step that takes so long is the only one
_NEAR = 1.05  # within so much of the fastest, the simpler method is the advice


class Link(NamedTuple):
    """What an all-reduce costs: ``latency`` seconds and 1 / ``bandwidth`` seconds a byte that a rank sends."""

    latency: float
    bandwidth: float


class Row(NamedTuple):
    """One method, on the slowest rank; seconds of one step, bytes that a rank sends in it.

    Attributes:
      low, high: the least and the most that encoding and decoding took in a step; equal where there was one.
      steps: that were measured.
      every: H, of local updates: all of this is a round's share of a step.
    """

    label: str
    encode: float
    wire: float
    decode: float
    sent: float
    low: float = math.nan
    high: float = math.nan
    steps: int = 1
    every: int = 1

    @property
    def codec(self) -> float:
        return self.encode + self.decode

    def step(self, computing: float = 0.0) -> float:
        """Seconds of a step of the job: its computing, coding, and what of the wire that does not hide."""
        hidden = HIDES * computing if self.every == 1 else 0.0
        return computing + self.codec + max(0.0, self.wire - hidden)

    def like(self, other: Row) -> bool:
        """Their steps differ by no more than those of each do among themselves."""
        spreads = (row.high - row.low for row in (self, other) if row.steps > 1)
        return abs(self.step() - other.step()) <= sum(spreads) / 2


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
    reducer.warmup = 0
    noise = _noise(comm.rank, total).split([group.spec.size for group in reducer.groups])
    names = ("encode", "wire", "decode", "sent")
    imagined = comm if isinstance(comm, ImaginedComm) else None
    budget = _BUDGET if imagined is None else _SHORT
    spent, each = 0.0, list[list[float]]()
    # One step to warm up, then as many as the budget allows: the same number on every rank.
    while len(each) < 2 or (spent < budget and len(each) < 8):
        before, waited = reducer.seconds | {"sent": comm.sent}, imagined.waited if imagined else 0.0
        for i, group in enumerate(reducer.groups):
            group.flat_D.copy_(noise[i])
            reducer.reduce(i)
        after = reducer.seconds | {"sent": comm.sent}
        if imagined is not None:  # instead of what standing for the others took
            after["wire"] = before["wire"] + imagined.waited - waited
        each.append(_slowest(comm, [after[name] - before[name] for name in names]))
        spent += each[-1][0] + each[-1][2] + (0.0 if imagined else each[-1][1])
        if imagined is not None and spent > _LONG:
            break
    counted = each[1:] or each
    encode, wire, decode, sent = (statistics.mean(column) for column in zip(*counted, strict=True))
    codec = [row[0] + row[2] for row in counted]
    return Row(label, encode, wire, decode, sent, min(codec), max(codec), len(counted))


def measure_local(comm: Comm, shapes: Shapes, every: int) -> Row:
    """A round of :func:`fedmpi.local_sgd` without compression, shared out over its steps. Called by all ranks."""
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    fragment = Fragment(parameters, "dense", comm, Optimizer("nesterov"), 0.7, {})
    fragment.reducer.warmup = 0
    imagined = comm if isinstance(comm, ImaginedComm) else None
    each = []
    for step in range(1, 4):
        started, sent, waited = perf_counter(), comm.sent, imagined.waited if imagined else 0.0
        before = fragment.reducer.seconds["wire"]
        fragment.take(step)
        fragment.merge(fragment.exchange())
        seconds, wire = perf_counter() - started, fragment.reducer.seconds["wire"] - before
        link_took = imagined.waited - waited if imagined else wire
        each.append([x / every for x in _slowest(comm, [seconds - wire, link_took, comm.sent - sent])])
    codecs, wires, sents = zip(*each[1:], strict=True)
    codec, wire, nbytes = statistics.mean(codecs), statistics.mean(wires), statistics.mean(sents)
    label = f"local_sgd (every: {every})"
    return Row(label, codec, wire, 0.0, nbytes, min(codecs), max(codecs), len(codecs), every)


@lru_cache(1)
def _noise(rank: int, size: int) -> torch.Tensor:
    """Gradients of all parameters, drawn once for all methods."""
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def _resolved(method: dict[str, Any] | str, total: int) -> tuple[dict[str, Any], str]:
    options: dict[str, Any] = {"name": method} if isinstance(method, str) else dict(method)
    if isinstance(options.get("dim"), float):
        options["dim"] = max(1, round(options["dim"] * total))
    rest = ", ".join(f"{k}: {v}".lower() for k, v in options.items() if k != "name")
    return options, f"{options['name']} ({rest})" if rest else options["name"]


def break_even(row: Row, bf16: Row, computing: float = 0.0) -> float | None:
    """The bandwidth in bytes a second below which ``row`` is faster than bf16; infinite if always, None if never."""
    saved, dearer, hidden = bf16.sent - row.sent, row.codec - bf16.codec, HIDES * computing
    if saved <= 0:
        return None
    if dearer <= 0:
        return math.inf
    point = bf16.sent / (dearer + hidden)  # where all of the row's wire is hidden
    return point if row.every > 1 or row.sent / point <= hidden else saved / dearer


def advise(
    comm: Comm,
    shapes: Shapes,
    candidates: Sequence[dict[str, Any] | str] = CANDIDATES,
    say: Callable[[str], None] = lambda line: None,
    computing: float = 0.0,
    every: int = 100,
) -> str:
    """The table and the verdict, the same on every rank.

    Args:
      computing: seconds of a step of the job without any exchange.
      every: H, of local updates.

    Raises:
      ConfigError: a method that was asked for cannot be a drop-in.
    """
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    here = link(comm)
    rows = []
    for method in candidates if "bf16" in candidates else ("bf16", *candidates):
        say(f"measuring {_resolved(method, total)[1]} …")
        rows.append(measure(comm, shapes, method))
    notes = {_resolved(m, total)[1]: methods.parse(_resolved(m, total)[0]).rate_note for m in candidates}
    bf16 = next(row for row in rows if row.label == "bf16")
    local = [measure_local(comm, shapes, every)]
    ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''} over {comm.name}"
    speed = f"latency {1e6 * here.latency:.0f} µs, {bandwidth(here.bandwidth)} a rank"
    lines = [
        f"{total:,} parameters, {ranks}: {speed}",
        "",
        f"{'method':<42}{'encode':>10}{'wire':>10}{'decode':>10}{'step':>10}{'±':>8}{'sent':>11}   pays below",
    ]
    for row in [*rows, *local]:
        seconds = (row.encode, row.wire, row.decode, row.step(computing))
        times = "".join(f"{1e3 * x:>7.1f} ms" for x in seconds)
        spread = f"{1e3 * (row.high - row.low) / 2:>5.1f} ms" if row.steps > 1 else f"{'once':>8}"
        sent = f"{row.sent / 1e6:>8.2f} MB"
        lines.append(f"{row.label:<42}{times}{spread}{sent}   {_pays(row, bf16, computing)}".rstrip())
    if computing:
        what = f"A step is {1e3 * computing:.1f} ms of computing, a quarter of which hides the wire,"
        lines += ["", f"{what} coding, and the rest of the wire."]
    lines += ["", verdict(rows, bf16, comm.size, computing)]
    if comm.size > 1:
        best = min(rows, key=lambda row: row.step(computing))
        chosen = best.label if lines[-1].startswith("Use ") else "bf16"
        if note := notes.get(chosen):
            lines.append(f"Its learning rate: {note}.")
        for row in local:
            lines.append(
                f"Averaging the parameters once in {row.every} steps (fedmpi.local_sgd) would take "
                f"{1e3 * row.step(computing):.1f} ms a step, where the training bears it."
            )
    return "\n".join(lines)


def _pays(row: Row, bf16: Row, computing: float) -> str:
    """Below which bandwidth; and whether it can be told here."""
    if row is bf16:
        return ""
    point = break_even(row, bf16, computing)
    text = "never" if point is None else "any" if point == math.inf else bandwidth(point)
    return f"{text} (here: within noise)" if row.like(bf16) else text


def verdict(rows: Sequence[Row], bf16: Row, ranks: int, computing: float = 0.0) -> str:
    """One plain sentence."""
    if ranks == 1:
        return "One rank exchanges nothing: start this under mpirun, srun or torchrun to measure a link."
    best = min(rows, key=lambda row: row.step(computing))
    least, half = best.step(computing), bf16.step(computing)
    if half <= _NEAR * least:
        return f"Stay with bf16: {1e3 * half:.1f} ms a step; nothing here saves more than 5 % of it."
    if best.like(bf16):
        return f"Stay with bf16: {1e3 * half:.1f} ms a step; {best.label} is ahead within noise only."
    if best.label == "dense":
        return f"Do not compress: {1e3 * least:.1f} ms a step against {1e3 * half:.1f} ms with bf16."
    return (
        f"Use {best.label}: {1e3 * least:.1f} ms a step against {1e3 * half:.1f} ms with bf16 "
        f"({half / least:.1f}x), if its accuracy suits you."
    )


def check(given: Sequence[Any]) -> Sequence[dict[str, Any] | str]:
    """Methods as the command line gives them.

    Raises:
      ConfigError: something else than a name or a mapping with one.
    """
    for method in given:
        if not isinstance(method, str) and not (
            isinstance(method, dict) and isinstance(method.get("name"), str)
        ):
            raise ConfigError(f"--method: expected a name or {{name: …}}, got {method!r}")
    return given
