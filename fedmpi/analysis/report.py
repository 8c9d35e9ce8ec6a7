"""Compares runs: a table (text and Markdown) and a picture, from nothing but the runs' folders."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fedmpi.engine.manifest import read
from fedmpi.engine.progress import human
from fedmpi.engine.record import write_aside
from fedmpi.errors import CheckpointError, ConfigError, DataError

_NOTHING = "-"  # where a run has no such number: never evaluated, or nothing was sent
# Okabe and Ito's colours, which colour-blind people tell apart, without yellow (too pale on white).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKED = 20  # a line of fewer points shows each of them

Model = TypeVar("Model", bound=BaseModel)


def report(runs: Sequence[Path], out: Path | None = None) -> str:
    """Compare runs; writes ``report.md`` and ``report.png``.

    Args:
      runs: the runs' folders. One given twice counts once; one that holds a report is passed over, so that
        ``runs/*`` may be given a second time.
      out: where the files go (default: the folder ``report`` beside the runs).

    Returns:
      The comparison as text, and where the files are.

    Raises:
      DataError: a folder that is no run, or whose run is unfinished or damaged.
      ConfigError: the files cannot be written.
    """
    folders: dict[Path, Path] = {}
    for run in runs:
        if not _is_report(run):
            folders.setdefault(run.resolve(), run)
    if not folders:
        raise DataError("report: expected the folders of runs, got none")
    names = _names([run.absolute() for run in folders.values()])
    loaded = [_load(run, name) for run, name in zip(folders.values(), names, strict=True)]
    groups: dict[str, list[_Run]] = {}
    for one in loaded:
        groups.setdefault(one.twin, []).append(one)
    columns = [c for c in _COLUMNS if c.always or any(c.value(one) is not None for one in loaded)]
    tables = {"": _table(columns, [[one] for one in loaded])}
    repeated = [group for group in groups.values() if len({one.summary.seed for one in group}) > 1]
    if repeated:
        tables[_OVER_SEEDS] = _table(columns, repeated)
    sparse = [
        [one] for one in loaded if one.summary.values_only.get("total_ratio") != one.summary.total_ratio
    ]
    if any(group[0].summary.values_only for group in sparse):
        tables[_VALUES_ONLY] = _table(list(_VALUE_COLUMNS), sparse)

    out = _beside(list(folders)) if out is None else out
    document = _document(tables, loaded, f"fedmpi report {_words(folders.values())} --out {_words([out])}")
    picture = _picture(list(groups.values()))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_aside(out / "report.png", picture)
        write_aside(out / "report.md", document.encode())
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out}: {error.strerror or error}") from None
    parts = [(f"{title}:\n\n" if title else "") + _aligned(table) for title, table in tables.items()]
    text = "\n\n".join(parts)
    return f"{text}\n\nWritten: {out / 'report.md'}, {out / 'report.png'}"


# Reading a run's folder.


class _Summary(BaseModel):
    """What of summary.json is shown."""

    method: str
    accuracy: float | None
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
    seed: int
    ranks: int = 1
    comm: str = ""


class _Round(BaseModel):
    """What of a line of metrics.jsonl is drawn."""

    round: int
    accuracy: float | None
    upload_bytes: int
    simulated_seconds: float = 0.0


class _Point(NamedTuple):
    rounds: int
    uploaded: int
    seconds: float  # simulated; 0 where they were not
    accuracy: float


@dataclass(frozen=True)
class _Run:
    """A finished run.

    Attributes:
      folder: as the user gave it.
      name: short, and no other run's.
      twin: equal for runs that differ in nothing but the seed.
      points: the evaluated rounds.
      link: the simulated bandwidth; "" where none was.
    """

    folder: Path
    name: str
    twin: str
    summary: _Summary
    points: list[_Point]
    link: str


def _is_report(folder: Path) -> bool:
    return (folder / "report.md").is_file() and not (folder / "config.yaml").exists()


def _load(folder: Path, name: str) -> _Run:
    if not folder.is_dir():
        got = "got a file" if folder.exists() else "there is none"
        raise DataError(f"{folder}: expected a run's folder, {got}")
    if not (folder / "config.yaml").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        hint = f"; there are runs inside it: {_words(inside)}" if inside else ""
        raise DataError(f"{folder} is no run: it has no config.yaml{hint}")
    try:
        config = yaml.safe_load(_read(folder / "config.yaml"))
    except yaml.YAMLError as error:
        raise DataError(f"{folder / 'config.yaml'} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.yaml'}: expected a mapping of keys, got {type(config).__name__}")
    metrics = folder / "metrics.jsonl"
    if not (folder / "summary.json").exists():
        done, rounds = _read(metrics).count("\n") if metrics.exists() else 0, config.get("rounds", "?")
        raise DataError(
            f"{folder} is unfinished: it has no summary.json, and {done} of {rounds} rounds; it is still "
            "in progress or was interrupted: wait for it, run it again or leave it out"
        )
    summary = _parse(_Summary, _read(folder / "summary.json"), str(folder / "summary.json"))
    lines = _read(metrics).splitlines()
    rounds = [_parse(_Round, line, f"{metrics}, line {i}") for i, line in enumerate(lines, 1)]
    if len(rounds) != summary.rounds:
        raise DataError(f"{metrics}: expected {summary.rounds} lines, a line a round, got {len(rounds)}")
    uploaded = accumulate(line.upload_bytes for line in rounds)
    seconds = accumulate(line.simulated_seconds for line in rounds)
    points = [
        _Point(line.round + 1, total, clock, line.accuracy)
        for line, total, clock in zip(rounds, uploaded, seconds, strict=True)
        if line.accuracy is not None
    ]
    time = config.get("time")
    link = f"{time.get('upload')} up, {time.get('download')} down" if isinstance(time, dict) else ""
    config.pop("seed", None)
    return _Run(folder, name, json.dumps(config, sort_keys=True, default=str), summary, points, link)


def _read(path: Path) -> str:
    try:
        return read(path).decode("utf-8")
    except CheckpointError as error:  # also a link or a pipe: what lies in a run's folder may be anybody's
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8 text") from None


def _parse(model: type[Model], text: str, where: str) -> Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "json_invalid":
            raise DataError(f"{where}: not JSON, cut off or damaged ({problem['ctx']['error']})") from None
        raise DataError(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


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


def _scalars(run: _Run) -> float | None:
    s = run.summary
    return None if s.scalars is None or not s.messages else s.scalars / s.messages


def _values_only(name: str) -> Callable[[_Run], float | None]:
    return lambda run: run.summary.values_only.get(name)


class _Column(NamedTuple):
    header: str
    value: Callable[[_Run], float | None]
    show: Callable[[float], str]
    always: bool = True


_COLUMNS = (
    _Column("accuracy", lambda run: run.summary.accuracy, _percent),
    _Column("upload", lambda run: run.summary.upload_bytes, human),
    _Column("upload ratio", lambda run: run.summary.upload_ratio, ratio),
    _Column("download", lambda run: run.summary.download_bytes, human),
    _Column("download ratio", lambda run: run.summary.download_ratio, ratio),
    _Column("total ratio", lambda run: run.summary.total_ratio, ratio),
    _Column("scalars", _scalars, _percent, always=False),
    _Column("seconds", lambda run: run.summary.seconds, lambda seconds: f"{seconds:.1f}"),
    _Column("simulated s", lambda run: run.summary.simulated_seconds, lambda s: f"{s:.1f}", always=False),
)
_VALUE_COLUMNS = (
    _Column("upload ratio", _values_only("upload_ratio"), ratio),
    _Column("download ratio", _values_only("download_ratio"), ratio),
    _Column("total ratio", _values_only("total_ratio"), ratio),
)
_OVER_SEEDS = "Mean ± standard error over seeds"
_VALUES_ONLY = "Values only, positions of sparse values left out (the papers' convention)"
_RATIOS = "A ratio is uncompressed over sent bytes (total: of both directions together); 1 kB is 1000 bytes."
_LEFT = 2  # so many columns of words come first
_Table = list[list[str]]


def _table(columns: list[_Column], groups: list[list[_Run]]) -> _Table:
    """A header and a row a group; a group of one is a run."""
    rows = [["run", "method", "rounds", "seed", *(column.header for column in columns)]]
    for group in groups:
        first, seeds = group[0].summary, {run.summary.seed for run in group}
        seed = str(first.seed) if len(group) == 1 else f"{len(seeds)} seeds"
        cells = [_cell(column, group) for column in columns]
        rows.append([_label(group), first.method, str(first.rounds), seed, *cells])
    return rows


def _label(group: list[_Run]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} .. {group[-1].name}"


def _cell(column: _Column, group: list[_Run]) -> str:
    by_seed: dict[int, list[float]] = {}  # runs of one seed are no independent draws: they count as one
    for run in group:
        value = column.value(run)
        if value is None or math.isnan(value):
            return _NOTHING
        by_seed.setdefault(run.summary.seed, []).append(value)
    values = [statistics.fmean(same) for same in by_seed.values()]
    mean = column.show(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {column.show(statistics.stdev(values) / math.sqrt(len(values)))}"


def _aligned(rows: _Table) -> str:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        pairs = list(zip(row, widths, strict=True))
        words = [cell.ljust(width) for cell, width in pairs[:_LEFT]]
        lines.append("  ".join([*words, *(cell.rjust(width) for cell, width in pairs[_LEFT:])]))
    return "\n".join(lines)


def _markdown(rows: _Table) -> str:
    marks = [":--" if i < _LEFT else "--:" for i in range(len(rows[0]))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [rows[0], marks, *rows[1:]]]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def _document(tables: dict[str, _Table], runs: list[_Run], command: str) -> str:
    """report.md."""
    return "\n\n".join(
        [
            "# Comparison of runs",
            *((f"## {title}\n\n" if title else "") + _markdown(table) for title, table in tables.items()),
            _RATIOS,
            "![Accuracy by round and by uploaded bytes](report.png)",
            f"## How to get this again\n\nFrom the folder `{Path.cwd()}`:",
            "```sh\n" + "\n".join([*map(_command, runs), command]) + "\n```\n",
        ]
    )


def _command(run: _Run) -> str:
    train = f"fedmpi train {_words([run.folder / 'config.yaml'])}"
    if run.summary.ranks == 1:
        return train
    if run.summary.comm == "threads":
        return f"{train} --local-ranks {run.summary.ranks}"
    return f"mpirun -n {run.summary.ranks} {train}"


def _words(paths: Iterable[Path]) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)


# The picture.


def _picture(groups: list[list[_Run]]) -> bytes:
    """A PNG of accuracy by round, by uploaded bytes and, of the runs that have them, by simulated seconds; runs that
    differ in the seed only look the same."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, PercentFormatter

    drawn = [any(run.points for run in group) for group in groups]
    labels = [
        _label(g) if d else f"{_label(g)} (never evaluated)" for g, d in zip(groups, drawn, strict=True)
    ]
    across = max(1, min(len(labels), 120 // (max(map(len, labels)) + 6)))
    links = sorted({run.link for group in groups for run in group if run.link})
    size = (18 if links else 12, 5 + 0.25 * -(-len(labels) // across))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    by_round, by_bytes, *by_clock = figure.subplots(1, 3 if links else 2, sharey=True)
    handles = []
    for i, group in enumerate(groups):
        look: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[i // len(_COLOURS) % len(_LINES)],
            "linewidth": 1.8 if len(group) == 1 else 1.2,
        }
        handles.append(Line2D([], [], **look))
        for run in group:
            marker = "o" if len(run.points) < _MARKED else None
            style = {**look, "marker": marker, "markersize": 3.5}
            accuracy = [point.accuracy for point in run.points]
            by_round.plot([point.rounds for point in run.points], accuracy, **style)
            sent = [point for point in run.points if point.uploaded]  # a logarithm has no zero
            by_bytes.plot([point.uploaded for point in sent], [point.accuracy for point in sent], **style)
            for axes in by_clock if run.link else ():
                axes.plot([point.seconds for point in run.points], accuracy, **style)

    by_round.set(xlabel="round", ylabel="accuracy on the test set (%)", title="Accuracy by round")
    by_bytes.set(xlabel="uploaded by all clients (bytes, logarithmic)", title="Accuracy by uploaded bytes")
    by_round.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    by_round.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    by_bytes.set_xscale("log")
    low, high = by_bytes.get_xlim()
    by_bytes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))
    by_bytes.xaxis.set_minor_locator(NullLocator() if high / low < 500 else LogLocator(subs=range(2, 10)))
    by_bytes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    for axes in by_clock:
        axes.set(xlabel=f"simulated seconds (Mb/s: {'; '.join(links)})", title="Accuracy by simulated time")
        axes.tick_params(labelleft=True)
    for axes in (by_round, by_bytes, *by_clock):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_bytes.tick_params(labelleft=True)
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a folder's name is a $
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
