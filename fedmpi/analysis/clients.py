"""What clients come to, one by one: clients.csv of runs, and their picture.

Shape suffix: K clients.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmpi.analysis import plots
from fedmpi.analysis.page import png
from fedmpi.analysis.runs import Run, read
from fedmpi.errors import DataError

FILE = "clients.csv"


class Clients(NamedTuple):
    """The metric of each client on its own test samples, increasing; ``after`` a round of local steps, [] where that
    was not asked for."""

    before: list[float]
    after: list[float]


def load(folder: Path) -> Clients | None:
    """Those of a run; None where clients were not tested.

    Raises:
      DataError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    rows = list(csv.reader(io.StringIO(read(path))))
    width = len(rows[0]) if rows else 0
    if width not in (3, 4) or rows[0][:2] != ["client", "samples"]:
        raise DataError(
            f"{path}: expected a header client, samples and metrics, got {','.join(rows[0] if rows else ())!r:.80}"
        )
    columns: list[list[float]] = [[], []]
    for i, row in enumerate(rows[1:], 2):
        try:
            if len(row) != width:
                raise ValueError(f"{len(row)} fields")
            for column, text in zip(columns, row[2:], strict=False):
                column += [value] if text and math.isfinite(value := float(text)) else []
        except ValueError as error:
            raise DataError(f"{path}, line {i}: expected {width} fields, numbers last, got {error}") from None
    return Clients(*map(sorted, columns))


def picture(groups: Mapping[str, Sequence[Run]], found: Mapping[str, Clients]) -> bytes:
    """A PNG: the clients of each run from the worst to the best, before (solid) and after local steps (dashed).

    Args:
      groups: runs that look the same (they differ in the seed only), by label.
      found: by the name of each run that has some.
    """
    from matplotlib.lines import Line2D

    drawn = {label: [run for run in group if run.name in found] for label, group in groups.items()}
    drawn = {label: group for label, group in drawn.items() if group}
    measured = plots.Measured.of(run.summary.metric for group in drawn.values() for run in group)
    scale = 100 if measured.share else 1
    figure = plots.figure(7, 5)
    axes: Any = figure.subplots()
    handles = []
    for i, (label, group) in enumerate(drawn.items()):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        handles.append(Line2D([], [], color=colour, label=label))
        for run in group:
            for values, dashes in ((found[run.name].before, "-"), (found[run.name].after, "--")):
                share = [100 * (k + 1) / len(values) for k in range(len(values))]
                axes.plot(share, [scale * v for v in values], dashes, color=colour, drawstyle="steps-pre")
    if any(clients.after for clients in found.values()):
        handles += [Line2D([], [], color="grey", linestyle="--", label="after local steps")]
    axes.set_xlabel("clients, from the worst to the best (%)")
    axes.set_ylabel(f"{measured.title.lower()} on the client's own test{' (%)' if measured.share else ''}")
    plots.tidy(axes)
    legend = axes.legend(handles=handles, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a folder's name is a $
    return png(figure)
