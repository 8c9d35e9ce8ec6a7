"""The link study: learning rates, steps to an accuracy, time a step at each bandwidth; a table and a picture.

    python -m fedmpi.bench.link_study tune DIR     steps to an accuracy: every case at every rate, then more seeds
    python -m fedmpi.bench.link_study time DIR     seconds a step at every bandwidth
    python -m fedmpi.bench.link_study report DIR   DIR/link.md, link.json and link.png

Each part goes on where it was interrupted: what is measured stands in DIR/runs.jsonl and DIR/times.jsonl.
``launch/link-study.sh`` runs all three.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedmpi.bench.link_cases import CASES
from fedmpi.bench.link_driver import Job

TARGETS = (0.80,)
SEEDS = (0, 1, 2)
EVERY, SMOOTHED = 20, 3  # steps between two looks at the test images, and looks that are averaged
MOST = 300
IMAGES = 1000


def smoothed(curve: list[float]) -> list[float]:
    """The mean of the last three looks, at each look from the third on."""
    return [sum(curve[i - SMOOTHED + 1 : i + 1]) / SMOOTHED for i in range(SMOOTHED - 1, len(curve))]


def steps_to(curve: list[float], target: float) -> int | None:
    """Steps until the smoothed accuracy reaches ``target``; None if it does not."""
    for i, accuracy in enumerate(smoothed(curve)):
        if accuracy >= target:
            return (i + SMOOTHED) * EVERY
    return None


def train(job: Job, options: dict[str, Any], rate: float, seed: int, most: int = MOST) -> list[float]:
    """The accuracies of a training, until it has reached the last target, or plainly fails."""
    job.start("study", options, rate, seed)
    curve: list[float] = []
    while len(curve) * EVERY < most and steps_to(curve, TARGETS[-1]) is None:
        job.ask("steps", "study", count=EVERY)
        curve.append(job.ask("accuracy", "study", count=IMAGES)["accuracy"])
        if len(curve) >= 6 and max(curve) < 0.2:
            break
    job.ask("stop", "study")
    return curve


def best(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The run with fewest steps to the first target, then to the next; of those that reach neither, the most
    accurate."""

    def rank(run: dict[str, Any]) -> tuple[float, ...]:
        steps = [steps_to(run["curve"], target) or float("inf") for target in TARGETS]
        return *steps, -max(smoothed(run["curve"]), default=0.0)

    return min(runs, key=rank)


def tune(folder: Path, names: list[str]) -> None:
    path = folder / "runs.jsonl"
    with Job(name="fashion-mnist") as job:

        def run(name: str, rate: float, seed: int) -> None:
            wanted = {"case": name, "rate": rate, "seed": seed}
            if any(wanted.items() <= done.items() for done in lines(path)):
                return
            curve = train(job, CASES[name].options, rate, seed)
            append(path, wanted | {"curve": curve})
            print(
                f"{name}, rate {rate:g}, seed {seed}: {[steps_to(curve, t) for t in TARGETS]}",
                file=sys.stderr,
            )

        for name in names:
            for rate in CASES[name].rates:
                run(name, rate, SEEDS[0])
        for name in names:
            rate = best(d for d in lines(path) if d["case"] == name and d["seed"] == SEEDS[0])["rate"]
            for seed in SEEDS[1:]:
                run(name, rate, seed)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("tune", "time", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", action="append", help="only this one; can be given several times")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = arguments.case or [name for name in CASES if name not in ("fp32 DDP", "auto")]
    if arguments.part == "tune":
        tune(arguments.folder, names)


if __name__ == "__main__":
    main()
