"""``fedmpi sweep``: a grid of values and seeds, several runs side by side, and one report at the end.

Each run has a folder of its own under the sweep's ``runs``. A run is finished when it has a summary.json and was
made from the configuration that the sweep asks for now; only those that are not are run, from their last
checkpoint where there is one. A run that fails leaves its message in error.txt and does not stop the others.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmpi import strict_yaml
from fedmpi.analysis import grid, plots
from fedmpi.analysis.grid import Job
from fedmpi.analysis.legend import common, setting
from fedmpi.analysis.page import Page, png, text_table, write
from fedmpi.analysis.report import LEFT, RATIOS, columns_for, table
from fedmpi.analysis.runs import Run, Summary, load, parse, read, words
from fedmpi.comm import Comm, together
from fedmpi.comm.groups import split
from fedmpi.engine.record import write_aside, writing
from fedmpi.engine.run import run
from fedmpi.errors import ConfigError, DataError, FedMPIError, Stopped
from fedmpi.tasks.metrics import METRICS

_ERROR = "error.txt"
_TICKS = 8  # so many values, or fewer, have a tick each
_KEPT = (  # of a run's summary, in the results
    "accuracy",
    "client_accuracy",
    "client_median",
    "client_worst",
    "client_after_accuracy",
    "client_after_worst",
    "loss",
    "upload_bytes",
    "download_bytes",
    "upload_ratio",
    "download_ratio",
    "total_ratio",
    "scalars",
    "scalar_tensors",
    "messages",
    "seconds",
)


def sweep(
    base: Path | Mapping[str, Any],
    over: Path | Mapping[str, Any],
    overrides: list[str],
    out: Path,
    comm: Comm,
    side_by_side: int = 1,
    quiet: bool = False,
) -> tuple[str, dict[str, Any] | None]:
    """Run what is not finished yet of a grid; write ``report.md``, ``.html`` and pictures when all is.

    Args:
      base: the configuration that the points start from. What is given as a mapping is also written into ``out``.
      over: the grid (:mod:`fedmpi.analysis.grid`).
      overrides: of the base, as on the command line.
      out: the sweep's folder.
      comm: every rank calls ``sweep`` alike.
      side_by_side: groups of ranks with a run each; within a Slurm array, each task takes its share too.
      quiet: show nothing.

    Returns:
      Text for the user, and the results (on rank 0, and only if no run is left to others).

    Raises:
      Stopped: a signal asked for it; the same command goes on from there.
      FedMPIError: the grid is wrong, or ``out`` cannot be written; not for a run that fails.
    """
    with together(comm, "reading the sweep"):
        todo = grid.jobs(base, grid.read(over), overrides, out / "runs")
    group, number = split(comm, side_by_side)
    task, tasks = slurm_array()
    share = todo[task * side_by_side + number :: tasks * side_by_side]
    finish(share, group, quiet, alone=side_by_side == 1)
    comm.allgather(b"")  # the report waits for the slowest group
    if comm.rank:
        return "", None
    made_by = command(_written(base, out / "base.yaml"), _written(over, out / "over.yaml"), overrides, out)
    return _conclude(todo, out, made_by)


def _written(given: Path | Mapping[str, Any], path: Path) -> Path:
    """The file that holds it; made at ``path`` of a mapping."""
    if isinstance(given, Mapping):
        write(path, strict_yaml.dump(dict(given), sort_keys=False).encode(), "--out")
        return path
    return given


def finish(jobs: Sequence[Job], group: Comm, quiet: bool = False, alone: bool = True) -> None:
    """Run what is not finished of ``jobs``, one after the other; a run that fails is noted in its folder.

    Args:
      jobs: runs, each with its folder.
      group: the ranks that do each of them; all call this alike.
      quiet: show nothing.
      alone: no other group shows its progress in the same terminal.

    Raises:
      Stopped: a signal asked for it.
      FedMPIError: a folder cannot be written.
    """
    tell = group.rank == 0 and not quiet
    started, ran = time.monotonic(), 0
    for i, job in enumerate(jobs):
        state = _state(job, group)
        if state == "finished":
            continue
        if tell:
            left = f", about {(time.monotonic() - started) / ran * (len(jobs) - i):.0f} s left" if ran else ""
            print(f"run {i + 1}/{len(jobs)}: {job.name}{left}", file=sys.stderr, flush=True)
        _run(job, group, quiet=quiet or not alone, resume=state == "begun")
        ran += 1


def slurm_array(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which task of how many this is of a Slurm job array; (0, 1) outside of one.

    Raises:
      ConfigError: the array's numbers have gaps.
    """
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return 0, 1
    first, step, count = (
        int(environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    task = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step
    if task >= count:
        raise ConfigError(
            f"Slurm array: expected evenly spaced numbers, as in --array=0-{count - 1}, got {count} from {first}, "
            f"of which {environ['SLURM_ARRAY_TASK_ID']} is one"
        )
    return task, count


def _state(job: Job, group: Comm) -> str:
    """finished, begun or new, as rank 0 sees it: the others may not see its disk."""
    if group.rank:
        return group.broadcast(b"").decode()
    same = False
    with suppress(DataError, strict_yaml.NotYaml):  # a damaged run is run again
        same = strict_yaml.parse(read(job.folder / "config.yaml")) == job.config.plain()
    state = "new" if not same else "finished" if (job.folder / "summary.json").is_file() else "begun"
    return group.broadcast(state.encode()).decode()


def _run(job: Job, group: Comm, quiet: bool, resume: bool) -> None:
    """One run, from its last checkpoint where it has one; what goes wrong in it is written down."""
    error = ""
    group.sent = group.received = 0  # wire bytes are this run's alone
    try:
        run(job.config, group, job.folder, quiet=quiet, resume=resume, overwrite=not resume)
    except Stopped:  # by a signal, which is meant for the sweep
        raise
    except FedMPIError as problem:  # on all ranks of the group alike
        error = str(problem)
    except Exception as problem:
        traceback.print_exc()
        if group.size > 1:  # the others wait in a collective
            print(f"fedmpi: {job.name}: rank {group.rank} failed; ending all", file=sys.stderr, flush=True)
            group.abort()
            raise
        error = f"{type(problem).__name__}: {problem}"
    with together(group, job.name):
        if group.rank == 0:
            _note(job, error)


def _note(job: Job, error: str) -> None:
    with writing(job.folder, "--out"):
        if error:
            print(f"fedmpi: {job.name} failed: {error}", file=sys.stderr, flush=True)
            job.folder.mkdir(parents=True, exist_ok=True)
            write_aside(job.folder / _ERROR, error.encode())
        else:
            (job.folder / _ERROR).unlink(missing_ok=True)


def command(base: Path, over: Path, overrides: Sequence[str], out: Path) -> str:
    """The command line that makes the sweep again."""
    return " ".join(["fedmpi sweep", words([base, over]), *map(str, overrides), "--out", words([out])])


def _conclude(todo: list[Job], out: Path, made_by: str) -> tuple[str, dict[str, Any] | None]:
    """The report of what is finished, unless some runs are still others' business."""
    done = [job for job in todo if (job.folder / "summary.json").is_file()]
    failed = failures(todo)
    missing = len(todo) - len(done) - len(failed)
    if missing:
        return f"{missing} of {len(todo)} runs are not finished: the task that finishes last reports", None
    results = {"command": made_by, "points": points(done), "failed": failed}
    if not done:
        return "Every run failed: nothing to report", results
    groups: dict[str, list[Run]] = {}
    for job in done:
        groups.setdefault(job.label, []).append(load(job.folder, job.label))
    rows = table(columns_for(one for group in groups.values() for one in group), list(groups.values()))
    page = _page(groups, rows, _curves(done), failed, made_by)
    written = page.write(out, "report", results)
    lost = f"\n\nFailed: {len(failed)} of {len(todo)} runs: {'; '.join(failed)}" if failed else ""
    return f"{text_table(rows, LEFT)}{lost}\n\nWritten: {', '.join(map(str, written))}", results


def failures(jobs: Sequence[Job]) -> dict[str, str]:
    """The messages of those that failed, by name."""
    return {
        job.name: read(job.folder / _ERROR)
        for job in jobs
        if not (job.folder / "summary.json").is_file() and (job.folder / _ERROR).is_file()
    }


def _summary(job: Job) -> dict[str, Any]:
    """What a run's summary.json says; DataError where it is damaged."""
    path = job.folder / "summary.json"
    text = read(path)
    parse(Summary, text, str(path))
    found: dict[str, Any] = json.loads(text)
    return found


def points(done: Sequence[Job]) -> list[dict[str, Any]]:
    """The results: for each point what its runs came to, a list over seeds."""
    found: dict[str, dict[str, Any]] = {}
    for job in done:
        summary = _summary(job)
        point = found.setdefault(
            job.label,
            {
                "label": job.label,
                "case": job.case,
                "values": job.values,
                "rounds": summary["rounds"],
                "params": summary["params"],
                "seeds": [],
            },
        )
        point["seeds"].append(job.seed)
        for name in (*_KEPT, *(n for n in summary if (n in METRICS or ":" in n) and n not in _KEPT)):
            if name in summary:
                point.setdefault(name, []).append(summary[name])
    return list(found.values())


def _page(
    groups: dict[str, list[Run]],
    rows: list[list[str]],
    curves: dict[str, bytes],
    failed: dict[str, str],
    made_by: str,
) -> Page:
    page = Page("Sweep")
    configs = [run.config for group in groups.values() for run in group]
    if alike := setting(configs):
        page.text(alike)
    page.text("Mean ± standard error over seeds. " + RATIOS)
    page.table(rows, LEFT)
    title = plots.Measured.of(run.summary.metric for group in groups.values() for run in group).title
    panels = (plots.ROUNDS, plots.UPLOADED, plots.DOWNLOADED, plots.TOTAL)
    page.picture(
        "accuracy",
        plots.score_picture(groups, panels, band=True, title=setting(configs)),
        f"{title} by round and by uploaded, downloaded and total bytes; bands are a standard error",
    )
    for name, picture in curves.items():
        page.picture(f"accuracy-by-{name.rpartition('.')[2]}", picture, f"{title} by `{name}`")
    if failed:
        page.heading("Failed runs")
        page.table([["run", "error"], *([name, error] for name, error in failed.items())], left=2)
    page.heading("Configuration")
    page.text("What all runs have in common:")
    page.code(strict_yaml.dump(common(configs), sort_keys=False).rstrip(), "yaml")
    page.heading("How to get this again")
    page.code(made_by)
    return page


def _curves(done: list[Job]) -> dict[str, bytes]:
    """What runs report first against each key of ``over`` with three or more numbers as values, by key."""
    keys = {key for job in done for key, value in job.values.items() if _number(value)}
    pictures, metrics = {}, [_summary(job).get("metric", "accuracy") for job in done]
    for key in sorted(keys):
        lines: dict[str, dict[float, list[float]]] = {}
        for job, metric in zip(done, metrics, strict=True):
            score = _summary(job)[metric]
            others = {k: v for k, v in job.values.items() if k != key}
            name = ", ".join([job.case, *(f"{k.rpartition('.')[2]}={v}" for k, v in others.items())])
            if _number(job.values.get(key)) and score is not None and score == score:
                lines.setdefault(name.strip(", "), {}).setdefault(job.values[key], []).append(score)
        if max((len(line) for line in lines.values()), default=0) > 2:
            pictures[key] = _curve(key, lines, plots.Measured.of(metrics))
    return pictures


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve(key: str, lines: dict[str, dict[float, list[float]]], measured: plots.Measured) -> bytes:
    from matplotlib.ticker import MaxNLocator

    picture = plots.figure(7, 5)
    axes = picture.subplots()
    for i, (name, by_value) in enumerate(lines.items()):
        x = sorted(by_value)
        mean, error = zip(*(plots.mean_error(by_value[value]) for value in x), strict=True)
        shown = [[(100 if measured.share else 1) * v for v in values] for values in (mean, error)]
        axes.errorbar(x, shown[0], shown[1], marker="o", capsize=3, label=name or None, **plots.look(i))
    every = {value for line in lines.values() for value in line}
    if min(every) > 0 and max(every) / min(every) > 20:
        axes.set_xscale("log")
    if len(every) <= _TICKS:
        plots.ticks(axes, sorted(every))
    elif all(isinstance(value, int) for value in every):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=key, ylabel=measured.label, title=f"{measured.title} by {key.rpartition('.')[2]}")
    if any(lines):
        axes.legend(frameon=False)
    plots.tidy(axes)
    return png(picture)
