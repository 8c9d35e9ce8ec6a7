"""The link study's tables: Markdown, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.studies import link
from configs.studies.link_cases import REFERENCE, SAME_AS_BF16

Lines = Sequence[dict[str, Any]]
_INVERSE = {name: 0.0 if bits is None else 1 / bits for name, bits in link.SPEEDS.items()}


def collect(runs: Lines, tuned: dict[str, dict[str, Any]], times: Lines, wholes: Lines) -> dict[str, Any]:
    """What each case came to.

    Args:
      runs: trainings. tuned: by case, the one at its best rate.
      times: of a step, by case and bandwidth. wholes: times of whole trainings.
    """
    cases: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(line["case"] for line in times):
        best = tuned[REFERENCE if name in SAME_AS_BF16 else name]
        # What auto compresses differs from link to link: its steps to the accuracy are not those of a case.
        same = [r for r in runs if name != "auto" and (r["case"], r["rate"]) == (best["case"], best["rate"])]
        steps = {str(r["seed"]): link.steps_to(r["curve"], link.ACCURACY) for r in same}
        reached = [count for count in steps.values() if count is not None]
        mine = {line["speed"]: line for line in times if line["case"] == name}
        cases[name] = {
            "rate": best["rate"],
            "steps": steps,
            "median_steps": statistics.median(reached) if steps and len(reached) == len(steps) else None,
            "sent": next(iter(mine.values()))["sent"],
            "seconds_a_step": {speed: line["seconds"]["median"] for speed, line in mine.items()},
            "step_against_bf16": {speed: line["ratio"] for speed, line in mine.items()},
        }
    for case in cases.values():
        case["break_even"] = break_even(case, cases[REFERENCE])
    return {"accuracy": link.ACCURACY, "cases": cases, "whole_trainings": list(wholes)}


def seconds_to(case: dict[str, Any], speed: str) -> float | None:
    """To the accuracy: steps times the seconds of a step."""
    steps = case["median_steps"]
    return (
        None
        if steps is None or speed not in case["seconds_a_step"]
        else steps * case["seconds_a_step"][speed]
    )


def break_even(case: dict[str, Any], bf16: dict[str, Any]) -> float | None:
    """The bandwidth in bits a second below which the accuracy comes sooner than with bf16: infinite where it always
    does, None where it does at none that was measured. Times between two bandwidths are linear in 1 / bandwidth."""
    shared = sorted(set(case["seconds_a_step"]) & set(bf16["seconds_a_step"]), key=_INVERSE.__getitem__)
    gains = []
    for speed in shared:
        own, reference = seconds_to(case, speed), seconds_to(bf16, speed)
        if own is None or reference is None:
            return None
        gains.append((_INVERSE[speed], reference - own))
    if not gains or gains[-1][1] <= 0:
        return None
    point = float("inf")
    for (x, low), (y, high) in pairwise(gains):
        if low <= 0 < high:
            point = 1 / (x + (y - x) * -low / (high - low))
    return point


def _bandwidth(bits: float | None) -> str:
    if bits is None:
        return "never"
    if bits == float("inf"):
        return "any"
    return f"{bits / 1e9:.2g} Gb/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mb/s"


def markdown(found: dict[str, Any]) -> str:
    speeds = [s for s in link.SPEEDS if s in found["cases"][REFERENCE]["seconds_a_step"]]
    head = [
        "case",
        "rate",
        f"steps to {found['accuracy']:.0%} (seeds)",
        "MB a step",
        *(f"ms, {s}" for s in speeds),
    ]
    head += [*(f"s to {found['accuracy']:.0%}, {s}" for s in speeds), "sooner than bf16 below"]
    rows = [head, [":--", *["--:"] * (len(head) - 1)]]
    for name, case in found["cases"].items():
        each = ", ".join(str(s) if s else f"> {300}" for s in case["steps"].values()) or "–"
        times = [case["seconds_a_step"].get(s) for s in speeds]
        totals = [seconds_to(case, s) for s in speeds]
        row = [name, f"{case['rate']:g}", each, f"{case['sent'] / 1e6:.3f}"]
        row += ["–" if t is None else f"{1e3 * t:.0f}" for t in times]
        row += ["–" if t is None else f"{t:.1f}" for t in totals]
        rows.append([*row, "" if name == REFERENCE else _bandwidth(case["break_even"])])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    whole = ["| whole training | link | steps | s | bf16 is … times slower |", "|:--|:--|--:|--:|--:|"]
    for line in found["whole_trainings"]:
        (bf16,) = [
            w["seconds"]
            for w in found["whole_trainings"]
            if (w["speed"], w["case"]) == (line["speed"], REFERENCE)
        ]
        ratio = f"{bf16 / line['seconds']:.2f}"
        whole.append(
            f"| {line['case']} | {line['speed']} | {line['steps']} | {line['seconds']:.1f} | {ratio} |"
        )
    return text + "\n\n" + "\n".join(whole) + "\n"


def write(found: dict[str, Any], folder: Path) -> None:
    """link.md, link.json and link.png in ``folder``."""
    (folder / "link.md").write_text(markdown(found))
    plain = {
        **found,
        "cases": {n: c | {"break_even": _bandwidth(c["break_even"])} for n, c in found["cases"].items()},
    }
    (folder / "link.json").write_text(json.dumps(plain, indent=1) + "\n")
    plot(found, folder / "link.png")


def plot(found: dict[str, Any], path: Path) -> None:
    """Seconds to the accuracy at each bandwidth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    speeds = list(link.SPEEDS)[::-1]
    for i, (name, case) in enumerate(found["cases"].items()):
        points = [(speeds.index(s), seconds_to(case, s)) for s in speeds]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            style = "-" if "hook" in name or "DDP" in name else "--"
            axes.plot(*zip(*known, strict=True), style, marker="osv^Dx*"[i % 7], label=name, markersize=4)
    axes.set_xticks(range(len(speeds)), speeds)
    axes.set_yscale("log")
    axes.set_xlabel("bandwidth of the link")
    axes.set_ylabel(f"seconds to {found['accuracy']:.0%} on Fashion-MNIST")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
