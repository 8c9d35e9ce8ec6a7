"""Compares runs: a table (text and Markdown) and a picture, from nothing but the runs' folders."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fedmpi.analysis import clients, plots
from fedmpi.analysis.legend import apart, common, setting
from fedmpi.analysis.page import FORMATS, Page, Table, text_table, write
from fedmpi.analysis.plots import panels_for, score_picture
from fedmpi.analysis.runs import Run, load, words
from fedmpi.engine.progress import human
from fedmpi.errors import ConfigError, DataError
from fedmpi.strict_yaml import dump
from fedmpi.tasks.metrics import METRICS

_NOTHING = "-"  # where a run has no such number: never evaluated, or nothing was sent


def report(runs: Sequence[Path], out: Path | None = None, format: str = "png") -> str:
    """Compare runs; writes ``report.md``, ``report.html`` and ``report.png``, and ``clients.png`` where clients
    were tested.

    Args:
      runs: the runs' folders. One given twice counts once; one that holds a report is passed over, so that
        ``runs/*`` may be given a second time.
      out: where the files go (default: the folder ``report`` beside the runs).
      format: svg or pdf: the picture is also written so.

    Returns:
      The comparison as text, and where the files are.

    Raises:
      DataError: a folder that is no run, or whose run is unfinished or damaged.
      ConfigError: the files cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    folders: dict[Path, Path] = {}
    for run in runs:
        if not _is_report(run):
            folders.setdefault(run.resolve(), run)
    if not folders:
        raise DataError("report: expected the folders of runs, got none")
    names = _names([run.absolute() for run in folders.values()])
    loaded = [load(run, name) for run, name in zip(folders.values(), names, strict=True)]
    groups: dict[str, list[Run]] = {}
    for one in loaded:
        groups.setdefault(one.twin, []).append(one)
    columns = columns_for(loaded)
    tables = {"": table(columns, [[one] for one in loaded])}
    repeated = [group for group in groups.values() if len({one.summary.seed for one in group}) > 1]
    if repeated:
        tables[_OVER_SEEDS] = table(columns, repeated)
    sparse = [
        [one] for one in loaded if one.summary.values_only.get("total_ratio") != one.summary.total_ratio
    ]
    if any(group[0].summary.values_only for group in sparse):
        tables[_VALUES_ONLY] = table(list(_VALUE_COLUMNS), sparse)

    out = _beside(list(folders)) if out is None else out
    lines = list(groups.values())
    shown = dict(
        zip(
            apart([group[0].config for group in lines], [label(group) for group in lines]), lines, strict=True
        )
    )
    title = setting([one.config for one in loaded])
    pictures = {
        kind: score_picture(shown, panels_for(loaded), title=title, format=kind)
        for kind in {"png": 0, format: 0}
    }
    page = _page(
        tables, loaded, f"fedmpi report {words(folders.values())} --out {words([out])}", pictures["png"]
    )
    found = {run.name: of for run in loaded if (of := clients.load(run.folder)) is not None}
    if found:
        page.picture("clients", clients.picture(shown, found), "Clients from the worst to the best")
    written = page.write(out, "report")
    for kind in pictures.keys() - {"png"}:
        write(out / f"report.{kind}", pictures[kind], "--out")
        written.append(out / f"report.{kind}")
    parts = [(f"{title}:\n\n" if title else "") + text_table(rows, LEFT) for title, rows in tables.items()]
    text = "\n\n".join(parts)
    return f"{text}\n\nWritten: {', '.join(map(str, written))}"


def _is_report(folder: Path) -> bool:
    return (folder / "report.md").is_file() and not (folder / "config.yaml").exists()


def _names(folders: list[Path]) -> list[str]:
    """Each folder's name, with as many parents as it takes to tell it from the others."""
    names = [folder.name for folder in folders]
    for depth in range(2, max(len(folder.parts) for folder in folders) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            name if names.count(name) == 1 else str(Path(*folder.parts[-depth:]))
            for name, folder in zip(names, folders, strict=True)
        ]
    return names


def _beside(folders: list[Path]) -> Path:
    parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    if parent == Path(parent.anchor):
        raise ConfigError(f"--out: the runs have no folder in common but {parent}; say where the report goes")
    here = Path.cwd()
    return (parent.relative_to(here) if parent.is_relative_to(here) else parent) / "report"


# The table.


def ratio(value: float) -> str:
    """31.9x; below 10 with two decimals."""
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _scalars(run: Run) -> float | None:
    s = run.summary
    return None if s.scalars is None or not s.messages else s.scalars / s.messages


def _values_only(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.summary.values_only.get(name)


class Column(NamedTuple):
    header: str
    value: Callable[[Run], float | None]
    show: Callable[[float], str]
    always: bool = True


_COLUMNS = (
    Column("upload", lambda run: run.summary.upload_bytes, human),
    Column("upload ratio", lambda run: run.summary.upload_ratio, ratio),
    Column("download", lambda run: run.summary.download_bytes, human),
    Column("download ratio", lambda run: run.summary.download_ratio, ratio),
    Column("total ratio", lambda run: run.summary.total_ratio, ratio),
    Column("scalars", _scalars, _percent, always=False),
    Column("seconds", lambda run: run.summary.seconds, lambda seconds: f"{seconds:.1f}"),
    Column("simulated s", lambda run: run.summary.simulated_seconds, lambda s: f"{s:.1f}", always=False),
)
_VALUE_COLUMNS = (
    Column("upload ratio", _values_only("upload_ratio"), ratio),
    Column("download ratio", _values_only("download_ratio"), ratio),
    Column("total ratio", _values_only("total_ratio"), ratio),
)
_OVER_SEEDS = "Mean ± standard error over seeds"
_VALUES_ONLY = "Values only, positions of sparse values left out (the papers' convention)"
RATIOS = "A ratio is uncompressed over sent bytes (total: of both directions together); 1 kB is 1000 bytes."
LEFT = 2  # so many columns of words come first


def columns_for(runs: Iterable[Run]) -> list[Column]:
    """The columns of a table of ``runs``: those that every run has, and those that one of them has."""
    runs = list(runs)
    names = dict.fromkeys(name for run in runs for name in run.summary.metrics)
    show = _percent if all(_is_share(run.summary.metric) for run in runs) else _number
    tested = (
        Column("clients' mean", lambda run: run.summary.client_score, show, always=False),
        Column("worst tenth", lambda run: run.summary.client_worst, show, always=False),
        Column("mean after", lambda run: run.summary.client_after_score, show, always=False),
        Column("worst after", lambda run: run.summary.client_after_worst, show, always=False),
    )
    every = (*map(_measured, names), *tested, *_COLUMNS)
    return [c for c in every if c.always or any(c.value(run) is not None for run in runs)]


def _measured(metric: str) -> Column:
    return Column(
        metric, lambda run: run.summary.metrics.get(metric), _percent if _is_share(metric) else _number
    )


def _is_share(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].share


def table(columns: list[Column], groups: list[list[Run]]) -> Table:
    """A header and a row a group; a group of one is a run."""
    rows = [["run", "method", "rounds", "seed", *(column.header for column in columns)]]
    for group in groups:
        first, seeds = group[0].summary, {run.summary.seed for run in group}
        seed = str(first.seed) if len(group) == 1 else f"{len(seeds)} seeds"
        cells = [_cell(column, group) for column in columns]
        rows.append([label(group), first.method, str(first.rounds), seed, *cells])
    return rows


def label(group: list[Run]) -> str:
    """The name of runs that differ in the seed only."""
    return group[0].name if len({run.name for run in group}) == 1 else f"{group[0].name} .. {group[-1].name}"


def _cell(column: Column, group: list[Run]) -> str:
    by_seed: dict[int, list[float]] = {}  # runs of one seed are no independent draws: they count as one
    for run in group:
        value = column.value(run)
        if value is None or math.isnan(value):
            return _NOTHING
        by_seed.setdefault(run.summary.seed, []).append(value)
    values = [statistics.fmean(same) for same in by_seed.values()]
    mean = column.show(statistics.fmean(values))
    error = column.show(statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0)
    return mean if error == column.show(0.0) else f"{mean} ± {error}"


def _page(tables: dict[str, Table], runs: list[Run], command: str, picture: bytes) -> Page:
    """report.md and report.html."""
    page = Page("Comparison of runs")
    if alike := setting([run.config for run in runs]):
        page.text(alike)
    for title, rows in tables.items():
        if title:
            page.heading(title)
        page.table(rows, LEFT)
    page.text(RATIOS)
    title = plots.Measured.of(run.summary.metric for run in runs).title
    page.picture("report", picture, f"{title} by round and by uploaded bytes")
    page.heading("Configuration")
    page.text("What all runs have in common:" if len(runs) > 1 else "As in `config.yaml`:")
    page.code(dump(common([run.config for run in runs]), sort_keys=False).rstrip(), "yaml")
    page.heading("How to get this again")
    page.text(f"From the folder `{Path.cwd()}`:")
    page.code("\n".join([*map(_command, runs), command]))
    return page


def _command(run: Run) -> str:
    train = f"fedmpi train {words([run.folder / 'config.yaml'])}"
    if run.summary.ranks == 1:
        return train
    if run.summary.comm == "threads":
        return f"{train} --local-ranks {run.summary.ranks}"
    return f"mpirun -n {run.summary.ranks} {train}"
