"""The papers' claims beside our figures, from result files that sweeps and analyses wrote.

A verdict is computed by a small named rule (:data:`RULES`) and never written by hand. Differences of accuracy are taken
seed by seed where both points have the same seeds; "ahead" means by more than twice the difference's standard error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict

from fedmpi.analysis.page import Table, markdown_table
from fedmpi.analysis.plots import mean_error
from fedmpi.errors import ConfigError, DataError
from fedmpi.validation import Strict, checked, mapping, read_yaml, suggest

NOT_RUN = "not run"


class Verdict(NamedTuple):
    figures: str
    held: bool


class _Strict(Strict):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Experiment(_Strict):
    """One result file: results/<name>.json, the command that makes it, and what is smaller than in the paper."""

    command: str
    setting: str
    minutes: float  # on one core, roughly


class Claim(_Strict):
    claim: str
    paper: str
    of: list[str]  # experiments; several are repetitions with other seeds
    rule: dict[str, Any]  # its name, and its arguments


class Claims(_Strict):
    experiments: dict[str, Experiment]
    claims: list[Claim]


Point = dict[str, Any]


class Results:
    """What the experiments of one claim came to: the points of a sweep, or the numbers of analyses."""

    def __init__(self, loaded: Sequence[dict[str, Any]]) -> None:
        self.loaded = loaded

    def point(self, label: str) -> Point:
        """The point of a sweep, by its label."""
        points = {p["label"]: p for one in self.loaded for p in one.get("points", [])}
        if label not in points:
            raise DataError(f"claims: no point {label!r} in the results; {suggest(label, points)}")
        return dict(points[label])

    def numbers(self, key: str) -> list[float]:
        """A number of each analysis."""
        for one in self.loaded:
            if not isinstance(one.get(key), (int, float)):
                raise DataError(f"claims: no number {key!r} in the results; {suggest(key, one)}")
        return [float(one[key]) for one in self.loaded]


def _percent(values: Sequence[float]) -> str:
    mean, error = mean_error(values)
    return f"{100 * mean:.2f} ± {100 * error:.2f} %" if len(values) > 1 else f"{100 * mean:.2f} %"


def _difference(a: Point, b: Point) -> tuple[float, float]:
    """Mean and standard error of the accuracies' difference, in points."""
    if a["seeds"] == b["seeds"]:
        pairs = zip(a["accuracy"], b["accuracy"], strict=True)
        mean, error = mean_error([100 * (x - y) for x, y in pairs])
        return mean, error
    (x, ex), (y, ey) = mean_error(a["accuracy"]), mean_error(b["accuracy"])
    return 100 * (x - y), 100 * (ex**2 + ey**2) ** 0.5


def _saved(a: Point, b: Point) -> float:
    """The share of b's uploaded bytes that a saves, in percent."""
    return 100 * (1 - sum(a["upload_bytes"]) / sum(b["upload_bytes"]))


def _against(a: Point, b: Point) -> str:
    mean, error = _difference(a, b)
    return f"{_percent(a['accuracy'])} against {_percent(b['accuracy'])} ({mean:+.2f} ± {error:.2f} points)"


def _beside(r: Results, of: list[str], than: list[str]) -> tuple[str, list[tuple[float, float]]]:
    """Each of ``of`` beside the one of ``than`` in its place, as text and as differences."""
    pairs = [(r.point(a), r.point(b)) for a, b in zip(of, than, strict=True)]
    shown = "; ".join(f"{a['label']}: {_against(a, b)}" for a, b in pairs)
    return shown, [_difference(a, b) for a, b in pairs]


def saves(r: Results, of: str, than: str, lose: float, least: float) -> Verdict:
    """``of`` saves at least ``least`` percent of the upload and loses at most ``lose`` points."""
    a, b = r.point(of), r.point(than)
    held = _saved(a, b) >= least and _difference(a, b)[0] >= -lose
    return Verdict(f"{_against(a, b)}, upload saved {_saved(a, b):.0f} %", held)


def most_saved(r: Results, of: list[str], than: str, lose: float, least: float) -> Verdict:
    """The largest saving of ``of`` within ``lose`` points of ``than`` is at least ``least`` percent."""
    b = r.point(than)
    near = [p for p in map(r.point, of) if _difference(p, b)[0] >= -lose]
    if not near:
        return Verdict(f"none is within {lose:g} points of {_percent(b['accuracy'])}", False)
    best = max(near, key=lambda p: _saved(p, b))
    return Verdict(
        f"{best['label']}: {_saved(best, b):.0f} % saved, {_against(best, b)}", _saved(best, b) >= least
    )


def trade(r: Results, of: list[str], than: str) -> Verdict:
    """Along ``of`` the saving grows and the accuracy falls (by more than twice the error from first to last)."""
    points, b = [r.point(label) for label in of], r.point(than)
    saved = [_saved(p, b) for p in points]
    mean, error = _difference(points[-1], points[0])
    shown = [
        f"{p['label']}: {_percent(p['accuracy'])}, {s:.0f} % saved"
        for p, s in zip(points, saved, strict=True)
    ]
    return Verdict("; ".join(shown), all(x <= y for x, y in pairwise(saved)) and mean < -2 * error)


def ahead(r: Results, of: list[str], than: list[str]) -> Verdict:
    """Each of ``of`` is ahead of the one of ``than`` in its place."""
    shown, differences = _beside(r, of, than)
    return Verdict(shown, all(mean > 2 * error for mean, error in differences))


def tie(r: Results, of: list[str], than: list[str], within: float) -> Verdict:
    """Each of ``of`` is within ``within`` points of the one of ``than`` in its place."""
    shown, differences = _beside(r, of, than)
    return Verdict(shown, all(abs(mean) <= within for mean, _ in differences))


def grows(r: Results, of: list[str]) -> Verdict:
    """Accuracy grows along ``of``: no step down by more than twice its error, and the last ahead of the first."""
    points = [r.point(label) for label in of]
    steps = [_difference(b, a) for a, b in pairwise(points)]
    mean, error = _difference(points[-1], points[0])
    shown = "; ".join(f"{p['label']}: {_percent(p['accuracy'])}" for p in points)
    return Verdict(shown, all(m > -2 * e for m, e in steps) and mean > 2 * error)


def peak(r: Results, of: list[str]) -> Verdict:
    """The best along ``of`` lies inside and is ahead of both ends, and the last is the worst."""
    points = [r.point(label) for label in of]
    means = [mean_error(p["accuracy"])[0] for p in points]
    top = points[means.index(max(means))]
    ends = [_difference(top, points[0]), _difference(top, points[-1])]
    shown = "; ".join(f"{p['label']}: {_percent(p['accuracy'])}" for p in points)
    return Verdict(shown, all(m > 2 * e for m, e in ends) and min(means) == means[-1])


def slower(r: Results, of: list[str], than: str, most: float) -> Verdict:
    """The fastest run of ``of`` takes at most ``most`` times as long as the fastest of ``than``."""
    base = min(r.point(than)["seconds"])
    times = {label: min(r.point(label)["seconds"]) / base for label in of}
    shown = "; ".join(f"{label}: {time:.2f} times as long" for label, time in times.items())
    return Verdict(shown, max(times.values()) <= most)


def dimension(r: Results, at_most: float) -> Verdict:
    """The smallest d that a search found to reach its share of the full accuracy is at most ``at_most`` of all
    parameters."""
    found = r.loaded[0]
    share, D, d, missed = (found[key] for key in ("share", "parameters", "dimension", "falls short"))
    full, accuracy = (
        _percent(found["full"]["accuracy"]),
        {p["values"]["method.dim"]: p["accuracy"] for p in found["points"]},
    )
    if d is None:
        return Verdict(f"none up to {missed:,} reaches {100 * share:g} % of {full}", False)
    shown = f"d = {d:,} of {D:,} ({100 * d / D:.2g} %): {_percent(accuracy[d])} of {full}"
    below = "" if missed is None else f"; d = {missed:,}: {_percent(accuracy[missed])}"
    return Verdict(shown + below, d <= at_most * D)


def between(r: Results, number: str, low: float, high: float) -> Verdict:
    """The mean of an analysis's number lies in [``low``, ``high``]."""
    mean, error = mean_error(r.numbers(number))
    shown = f"{mean:.4g} ± {error:.2g}" if len(r.loaded) > 1 else f"{mean:.4g}"
    return Verdict(f"{number}: {shown}", low <= mean <= high)


def lower(r: Results, of: list[str], than: str) -> Verdict:
    """Each number of ``of`` is below that of ``than``, taken run by run, by more than twice the difference's error."""
    base = r.numbers(than)
    values = {name: r.numbers(name) for name in of}
    shown = [
        f"{name} {mean:.3g} ± {error:.2g}" if len(base) > 1 else f"{name} {mean:.3g}"
        for name, (mean, error) in ((name, mean_error(v)) for name, v in {than: base, **values}.items())
    ]
    below = (mean_error([x - y for x, y in zip(base, v, strict=True)]) for v in values.values())
    return Verdict("; ".join(shown), all(mean > 2 * error for mean, error in below))


def differs(r: Results, number: str, by: str) -> Verdict | None:
    """An analysis's number differs by more than twice its error between the two values of ``by``; None where only
    one was run."""
    groups: dict[str, list[float]] = {}
    for one, value in zip(r.loaded, r.numbers(number), strict=True):
        groups.setdefault(str(one.get(by)), []).append(value)
    shown = "; ".join(f"{name}: {mean_error(values)[0]:.4g}" for name, values in groups.items())
    if len(groups) < 2:
        return None
    (a, ea), (b, eb) = map(mean_error, groups.values())
    return Verdict(f"{number}: {shown}", abs(a - b) > 2 * (ea**2 + eb**2) ** 0.5)


RULES: dict[str, Callable[..., Verdict | None]] = {
    rule.__name__: rule
    for rule in (
        saves,
        most_saved,
        trade,
        ahead,
        tie,
        grows,
        peak,
        slower,
        dimension,
        between,
        lower,
        differs,
    )
}


def table(path: Path, results: Path) -> str:
    """The claims of ``path`` (YAML) with the figures in the folder ``results``, as a Markdown document.

    Raises:
      ConfigError: the file cannot be read or is wrong.
      DataError: a result file is damaged, or lacks what a rule asks for.
    """
    claims = checked(Claims, mapping(read_yaml(path, "claims"), f"claims: {path}"), str(path))
    rows: Table = [["claim", "paper", "our figures", "verdict", "experiment"]]
    for claim in claims.claims:
        for name in claim.of:
            if name not in claims.experiments:
                raise ConfigError(f"{path}: unknown experiment {name!r}; {suggest(name, claims.experiments)}")
        there = [name for name in claim.of if (results / f"{name}.json").is_file()]
        figures, said = "", NOT_RUN
        verdict = judge(claim, [results / f"{name}.json" for name in there]) if there else None
        if verdict is not None:
            figures, said = verdict.figures, "held" if verdict.held else "not held"
            said += f" ({len(there)} of {len(claim.of)} seeds)" if len(there) < len(claim.of) else ""
        rows.append([claim.claim, claim.paper, figures, said, ", ".join(claim.of)])
    experiments: Table = [["experiment", "setting", "command", "minutes of a core"]]
    for name, one in claims.experiments.items():
        experiments.append([name, one.setting, f"`{one.command}`", f"{one.minutes:g}"])
    made = (
        f"Made by `python -m configs.studies claims` from `{path}` and the files in `{results}`: do not edit. "
        "Figures are means ± standard errors over seeds; accuracies are on the test set."
    )
    return (
        "\n\n".join(
            [
                "# The papers' claims and our figures",
                made,
                markdown_table(rows, left=5),
                "## How to get each again",
                markdown_table(experiments, left=3),
                "",
            ]
        ).rstrip()
        + "\n"
    )


def judge(claim: Claim, files: Sequence[Path]) -> Verdict | None:
    """The rule's verdict on the result files; None where they do not suffice for one."""
    loaded = []
    for file in files:
        try:
            loaded.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: expected a result file (JSON): {error}") from None
    rule = {**claim.rule}
    name = rule.pop("name", None)
    if name not in RULES:
        raise ConfigError(f"claims: unknown rule {name!r}; {suggest(name, RULES)}")
    try:
        return RULES[name](Results(loaded), **rule)
    except KeyError as error:
        raise DataError(
            f"claims: rule {name}: no {error} in the results, which hold {', '.join(loaded[0])}"
        ) from None
    except TypeError as error:
        raise ConfigError(f"claims: rule {name}: {error}") from None
