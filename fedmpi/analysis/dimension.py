"""``fedmpi analyze dimension``: the smallest subspace in which training comes near full training.

Source: Li et al., "Measuring the intrinsic dimension of objective landscapes", ICLR 2018, with its share of 90 %; cited
for this in the appendix of "Intrinsic Gradient Compression for Scalable and Efficient Federated Learning". Real runs,
as a sweep does them: d doubles until the mean accuracy over seeds reaches the share of the uncompressed runs', then
the interval is halved. Accuracy is taken to grow with d: what is found is an upper bound for these settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmpi import config as configuration
from fedmpi.analysis import grid, plots, sweep
from fedmpi.analysis.grid import Job, Over
from fedmpi.analysis.page import Page, Table, png, prepare, text_table
from fedmpi.analysis.plots import mean_error
from fedmpi.analysis.runs import words
from fedmpi.comm import Comm, together
from fedmpi.config import Config
from fedmpi.errors import ConfigError, DataError
from fedmpi.methods.intrinsic import IntrinsicOptions

Point = dict[str, Any]


class Asked(NamedTuple):
    """What is looked for.

    Attributes:
      share: of the uncompressed runs' accuracy.
      low: the first d.
      high: the last one (default: D).
      within: the answer is at most so much larger than a d that falls short, as a share.
      seeds: runs of each d.
      schedule: of the subspaces (default: the configuration's, else static).
    """

    share: float = 0.9
    low: int = 25
    high: int | None = None
    within: float = 0.1
    seeds: int = 3
    schedule: str | None = None


def smallest(
    reaches: Callable[[int], bool], low: int, high: int, within: float
) -> tuple[int | None, int | None]:
    """The smallest number of ``low`` … ``high`` found that ``reaches``, and the largest found that does not; None where
    there is none. Doubles, then halves (geometrically) until the two are ``within`` of each other."""
    missed, reached = None, low
    while not reaches(reached):
        missed = reached
        if missed == high:
            return None, high
        reached = min(2 * missed, high)
    while missed is not None and reached > max(missed * (1 + within), missed + 1):
        middle = min(max(math.isqrt(missed * reached), missed + 1), reached - 1)
        if reaches(middle):
            reached = middle
        else:
            missed = middle
    return reached, missed


class Search:
    """Runs points when they are asked for; every rank calls alike. The runs' folders remember what is finished."""

    def __init__(
        self, base: Path, overrides: list[str], out: Path, comm: Comm, asked: Asked, quiet: bool
    ) -> None:
        self.base, self.overrides, self.out = base, overrides, out
        self.comm, self.asked, self.quiet = comm, asked, quiet
        self.method = _method(configuration.load(base, overrides), asked.schedule)
        self.done: dict[int | None, list[Job]] = {}  # by d; None: uncompressed

    def accuracy(self, d: int | None) -> float:
        """The mean accuracy over seeds of training in ``d`` dimensions (None: uncompressed).

        Raises:
          DataError: a run failed, or was never evaluated to a number.
        """
        return float(mean_error(self.point(d)["accuracy"])[0])

    def point(self, d: int | None) -> Point:
        """What the runs came to, as in a sweep's results."""
        if d not in self.done:
            if d is None:
                values: dict[str, Any] = {"cases": {"full": {"method": "dense"}}}
            else:
                case = {self.method["schedule"]: {"method": self.method}}
                values = {"cases": case, "over": {"method.dim": [d]}}
            over = Over.model_validate({"seeds": self.asked.seeds, **values})
            with together(self.comm, "reading the configuration"):
                jobs = grid.jobs(self.base, over, self.overrides, self.out / "runs")
            sweep.finish(jobs, self.comm, self.quiet)
            with together(self.comm, "reading the runs"):
                if self.comm.rank == 0:
                    _check(jobs)
            self.done[d] = jobs
        found = sweep.points(self.done[d])[0] if self.comm.rank == 0 else {}
        point: Point = json.loads(self.comm.broadcast(json.dumps(found).encode()))
        return point


def _method(config: Config, schedule: str | None) -> dict[str, Any]:
    """The options of the intrinsic method without d: the configuration's where it has that method."""
    method = config.method
    if not isinstance(method, IntrinsicOptions):
        method = IntrinsicOptions.model_validate({"name": "intrinsic", "dim": 1})
    options = method.model_dump(exclude={"dim"})
    return {**options, "schedule": schedule or options["schedule"]}


def _check(jobs: Sequence[Job]) -> None:
    for name, error in sweep.failures(jobs).items():
        raise DataError(f"dimension: {name} failed, so nothing can be compared with it: {error}")
    for job, accuracy in zip(jobs, _accuracies(jobs), strict=True):
        if accuracy is None or not math.isfinite(accuracy):
            raise DataError(f"dimension: {job.name}: expected an accuracy, got {accuracy}")


def _accuracies(jobs: Sequence[Job]) -> list[float | None]:
    """None of a run that measures something else."""
    found: list[float | None] = sweep.points(jobs)[0].get("accuracy", [None] * len(jobs))
    return found


def analyze(
    base: Path, overrides: list[str], out: Path, comm: Comm, asked: Asked, quiet: bool = False
) -> tuple[str, dict[str, Any] | None]:
    """Search, and write ``dimension.md``, ``.html``, ``.json`` and a picture of accuracy against d.

    Args:
      base: the configuration; its method gives the subspaces' other options where it is intrinsic.
      overrides: as on the command line.
      out: the folder; runs that are finished in it are not run again.
      comm: every rank calls this alike.
      asked: what is looked for.
      quiet: show nothing.

    Returns:
      Text for the user and the results, on rank 0; "" and None elsewhere.

    Raises:
      ConfigError: the configuration or ``asked`` is wrong, or ``out`` cannot be written.
      DataError: a run failed.
      Stopped: a signal asked for it; the same command goes on from there.
    """
    with together(comm, "reading the configuration"):
        search = Search(base, overrides, out, comm, asked, quiet)
        if comm.rank == 0:
            prepare(out, "--out")
    full = search.point(None)
    high = min(asked.high or full["params"], full["params"])
    if asked.low > high:
        raise ConfigError(f"--low: expected at most {high} (--high and the parameters), got {asked.low}")
    needed = asked.share * search.accuracy(None)
    reached, missed = smallest(lambda d: search.accuracy(d) >= needed, asked.low, high, asked.within)
    tried = {d: search.point(d) for d in sorted(d for d in search.done if d is not None)}
    if comm.rank:
        return "", None
    results = {
        "command": _command(search),
        "schedule": search.method["schedule"],
        "share": asked.share,
        "parameters": full["params"],
        "dimension": reached,
        "falls short": missed,
        "full": full,
        "points": list(tried.values()),
    }
    page, rows, said = Page("Intrinsic dimension"), _table(full, tried, asked.share), _sentence(results)
    page.text(f"{said} Mean ± standard error over {asked.seeds} seeds.")
    page.table(rows)
    page.picture("dimension", _picture(full, tried, asked.share), "Accuracy by dimension")
    page.heading("How to get this again")
    page.code(results["command"])
    written = page.write(out, "dimension", results)
    return f"{text_table(rows)}\n\n{said}\nWritten: {', '.join(map(str, written))}", results


def _command(search: Search) -> str:
    """The command line that does the search again."""
    asked, defaults = search.asked._asdict(), Asked._field_defaults
    options = [f"--{name} {value}" for name, value in asked.items() if value != defaults[name]]
    parts = ["fedmpi analyze dimension", words([search.base, *map(Path, search.overrides)]), *options]
    return " ".join([*parts, "--out", words([search.out])])


def _sentence(results: dict[str, Any]) -> str:
    reached, missed, D = results["dimension"], results["falls short"], results["parameters"]
    share = f"{100 * results['share']:g} % of the uncompressed accuracy"
    if reached is None:
        return f"No d up to {missed:,} reaches {share} ({D:,} parameters, {results['schedule']})."
    below = "the first that was tried" if missed is None else f"d = {missed:,} falls short"
    return f"d = {reached:,} of {D:,} parameters reaches {share} ({results['schedule']}); {below}."


def _table(full: Point, tried: dict[int, Point], share: float) -> Table:
    rows = [["d", "of D", "accuracy", "of the full", "reaches", "total ratio"]]
    base = mean_error(full["accuracy"])[0]
    for d, point in [*tried.items(), (full["params"], full)]:
        mean, error = mean_error(point["accuracy"])
        rows.append(
            [
                "full" if point is full else f"{d:,}",
                f"{100 * d / full['params']:.3g} %",
                f"{100 * mean:.2f} % ± {100 * error:.2f} %",
                f"{100 * mean / base:.1f} %",
                "yes" if mean >= share * base else "no",
                f"{mean_error(point['total_ratio'])[0]:.3g}x",
            ]
        )
    return rows


def _picture(full: Point, tried: dict[int, Point], share: float) -> bytes:
    picture = plots.figure(7, 5)
    axes = picture.subplots()
    base, spread = (100 * value for value in mean_error(full["accuracy"]))
    means = [mean_error(point["accuracy"]) for point in tried.values()]
    y, error = ([100 * m[i] for m in means] for i in (0, 1))
    axes.errorbar(list(tried), y, error, marker="o", capsize=3, label="in a subspace", **plots.look(0))
    axes.axhline(base, label="uncompressed", **plots.look(1))
    axes.axhspan(base - spread, base + spread, color=plots.COLOURS[1], alpha=0.15, linewidth=0)
    axes.axhline(share * base, color="0.5", linestyle=":", label=f"{100 * share:g} % of it")
    axes.set(xscale="log", xlabel="d, dimension of the subspace", ylabel="accuracy on the test set (%)")
    axes.legend(frameon=False)
    plots.tidy(axes)
    return png(picture)
