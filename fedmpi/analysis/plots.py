"""Pictures. Figures are made without pyplot: no display, no global state.

Shape suffixes: R rows and K columns of a map.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fedmpi.analysis.page import png
from fedmpi.analysis.runs import Point, Run
from fedmpi.errors import ConfigError
from fedmpi.tasks.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart, without yellow (too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKED = 20  # a line of fewer points shows each of them
_PANEL = 2.4  # inches of one map of a grid


class Against(NamedTuple):
    """What the metric is drawn against."""

    x: Callable[[Point], float]
    title: str
    label: str
    nbytes: bool = True


ROUNDS = Against(lambda p: p.rounds, "by round", "round", nbytes=False)
UPLOADED = Against(lambda p: p.uploaded, "by uploaded bytes", "uploaded by all clients (bytes, logarithmic)")
DOWNLOADED = Against(
    lambda p: p.downloaded, "by downloaded bytes", "downloaded by all clients (bytes, logarithmic)"
)
TOTAL = Against(lambda p: p.total, "by total bytes", "sent both ways (bytes, logarithmic)")


def panels_for(runs: Sequence[Run]) -> Sequence[Against]:
    """What these runs are compared by: by simulated seconds, too, where some have them."""
    links = sorted({run.link for run in runs if run.link})
    if not links:
        return (ROUNDS, UPLOADED)
    label = f"simulated seconds ({'; '.join(links)})"
    timed = Against(lambda p: p.seconds, "by simulated time", label, nbytes=False)
    return (ROUNDS, UPLOADED, TOTAL, timed)


class Measured(NamedTuple):
    """What runs report first: accuracy, for classes."""

    title: str
    share: bool  # all of it is shown in percent

    @classmethod
    def of(cls, names: Iterable[str]) -> Measured:
        names = sorted(set(names)) or ["accuracy"]
        return cls(
            ", ".join(names).capitalize(), all(name in METRICS and METRICS[name].share for name in names)
        )

    @property
    def label(self) -> str:
        return f"{self.title.lower()} on the test set{' (%)' if self.share else ''}"


AGAINST = {
    "rounds": ROUNDS,
    "upload": UPLOADED,
    "download": DOWNLOADED,
    "total": TOTAL,
    "seconds": Against(lambda p: p.seconds, "by simulated time", "simulated seconds", nbytes=False),
}


def draw(axes: Axes | None, points: Sequence[Point], against: str, metric: str, label: str) -> Axes:
    """One run's line, beside those that are on ``axes`` already.

    Raises:
      ConfigError: ``against`` is none of :data:`AGAINST`.
    """
    if against not in AGAINST:
        raise ConfigError(f"against: expected one of {', '.join(AGAINST)}, got {against!r}")
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(layout="constrained")[1]
    chosen, measured = AGAINST[against], Measured.of([metric])
    _draw(axes, points, chosen, {**look(len(axes.lines)), "linewidth": 1.8, "label": label})
    _dress(axes, chosen, measured)
    axes.set_ylabel(measured.label)
    axes.legend(frameon=False)
    return axes


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many hundreds of pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def look(i: int) -> dict[str, Any]:
    """The i-th line's colour and dashes."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": _LINES[i // len(COLOURS) % len(_LINES)]}


def ticks(axes: Axes, values: Sequence[float]) -> None:
    """A tick at each value of the x axis, and no others."""
    from matplotlib.ticker import NullLocator

    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def score_picture(
    groups: Mapping[str, Sequence[Run]],
    panels: Sequence[Against] = (ROUNDS, UPLOADED),
    band: bool = False,
    title: str = "",
    format: str = "png",
) -> bytes:
    """A picture of what runs report first (accuracy, for classes), a panel for each of ``panels``.

    Args:
      groups: runs that look the same (they differ in the seed only), by label.
      panels: what it is drawn against.
      band: a group's mean and its standard error as a band, in place of a line for each of its runs.
      title: above all panels.
      format: png, svg or pdf.
    """
    from matplotlib.lines import Line2D

    labels = [name if any(r.points for r in g) else f"{name} (never evaluated)" for name, g in groups.items()]
    across = max(1, min(len(labels), 120 // (max(map(len, labels)) + 6)))
    measured = Measured.of(run.summary.metric for group in groups.values() for run in group)
    rows = -(-len(panels) // 2)
    picture = figure(12, 5 * rows + 0.25 * -(-len(labels) // across))
    if title:
        picture.suptitle(title, fontsize=11, parse_math=False)
    grid: Any = picture.subplots(rows, 2, sharey=True, squeeze=False)
    for axes, against in zip(grid.flat, panels, strict=True):
        for i, group in enumerate(groups.values()):
            style = {**look(i), "linewidth": 1.8 if len(group) == 1 else 1.2}
            (_draw_mean if band and _aligned(group) else _draw_each)(axes, group, against, style)
        _dress(axes, against, measured)
    for axes in grid[:, 0]:
        axes.set_ylabel(measured.label)
    handles = [Line2D([], [], **look(i)) for i in range(len(labels))]
    legend = picture.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a folder's name is a $
    return png(picture, format)


def _aligned(group: Sequence[Run]) -> bool:
    """All runs were evaluated after the same rounds."""
    return len({tuple(p.rounds for p in run.points) for run in group}) == 1


def _draw_each(axes: Axes, group: Sequence[Run], against: Against, style: dict[str, Any]) -> None:
    for run in group:
        _draw(axes, run.points, against, style)


def _draw(axes: Axes, points: Sequence[Point], against: Against, style: dict[str, Any]) -> None:
    some = [p for p in points if against.x(p) or not against.nbytes]  # a logarithm has no zero
    marker = "o" if len(points) < _MARKED else None
    axes.plot([against.x(p) for p in some], [p.score for p in some], marker=marker, markersize=3.5, **style)


def _draw_mean(axes: Axes, group: Sequence[Run], against: Against, style: dict[str, Any]) -> None:
    steps = list(zip(*(run.points for run in group), strict=True))
    x = [statistics.fmean(against.x(p) for p in step) for step in steps]
    y, error = [], []
    for step in steps:
        mean, spread = mean_error([p.score for p in step])
        y.append(mean)
        error.append(spread)
    start = next((i for i, value in enumerate(x) if value), len(x)) if against.nbytes else 0
    marker = "o" if len(x) < _MARKED else None
    axes.plot(x[start:], y[start:], marker=marker, markersize=3.5, **style)
    low, high = ([a + sign * b for a, b in zip(y, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(x[start:], low[start:], high[start:], color=style["color"], alpha=0.15, linewidth=0)


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; 0 for the error of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _dress(axes: Axes, against: Against, measured: Measured) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    axes.set(xlabel=against.label, title=f"{measured.title} {against.title}")
    if measured.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    if against.nbytes:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        near = high / low < 500
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
        axes.xaxis.set_minor_locator(NullLocator() if near else LogLocator(subs=range(2, 10)))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=against is ROUNDS, min_n_ticks=1))
    tidy(axes)
    axes.tick_params(labelleft=True)


def maps(panels: Mapping[str, Tensor], x: str, y: str, title: str) -> bytes:
    """A PNG of heat maps ``(R, K)`` with values from -1 to 1, by their titles, on one colour scale."""
    from matplotlib.ticker import MaxNLocator

    across = min(len(panels), 5)
    rows = -(-len(panels) // across)
    picture = figure(_PANEL * across + 1.2, (_PANEL + 0.55) * rows + 0.4)
    grid: Any = picture.subplots(rows, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, values_RK) in zip(grid.flat, panels.items(), strict=False):
        height, width = values_RK.shape
        image = axes.imshow(
            values_RK.numpy(),
            vmin=-1,
            vmax=1,
            cmap="RdBu_r",
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, width + 0.5, height + 0.5, 0.5),  # counted from 1
        )
        axes.set_title(name, fontsize=9)
        axes.set(xlabel=x, ylabel=y)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
    picture.colorbar(image, ax=grid, shrink=0.9, label=title)
    return png(picture)
