"""The link study: learning rates, steps to an accuracy, time a step at each bandwidth; a table and a picture.

    python -m configs.studies.link_study tune DIR     steps to an accuracy: every case at every rate, then more seeds
    python -m configs.studies.link_study time DIR     seconds a step at every bandwidth; whole trainings at two
    python -m configs.studies.link_study report DIR   DIR/link.md, link.json and link.png

Each part goes on where it was interrupted: what is measured stands in DIR/runs.jsonl, times.jsonl and wholes.jsonl.
``launch/link-study.sh`` runs all three.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.studies import link, link_report
from configs.studies.link_cases import CASES, OURS, POWERSGD, REFERENCE, SAME_AS_BF16
from configs.studies.link_driver import Job

SEEDS = (0, 1, 2)
MOST = 300  # steps of a training in the study


def train(job: Job, options: dict[str, Any], rate: float, seed: int) -> list[float]:
    """The accuracies of a training, until it has reached the target, or plainly fails."""
    job.start("study", options, rate, seed)
    curve: list[float] = []
    while len(curve) * link.EVERY < MOST and link.steps_to(curve, link.ACCURACY) is None:
        job.ask("steps", "study", count=link.EVERY)
        curve.append(job.ask("accuracy", "study", count=link.IMAGES)["accuracy"])
        if len(curve) >= 6 and max(curve) < 0.2:
            break
    job.ask("stop", "study")
    return curve


def best(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The run with fewest steps to the target; of those that do not reach it, the most accurate."""

    def rank(run: dict[str, Any]) -> tuple[float, float]:
        steps = link.steps_to(run["curve"], link.ACCURACY)
        return steps or float("inf"), -max(link.smoothed(run["curve"]), default=0.0)

    return min(runs, key=rank)


def tune(folder: Path, model: str, names: list[str]) -> None:
    path = folder / "runs.jsonl"
    with Job(model, name="fashion-mnist") as job:

        def run(name: str, rate: float, seed: int) -> None:
            wanted = {"model": model, "case": name, "rate": rate, "seed": seed}
            if any(wanted.items() <= done.items() for done in lines(path)):
                return
            curve = train(job, link.cases(model)[name][0], rate, seed)
            append(path, wanted | {"curve": curve})
            steps = link.steps_to(curve, link.ACCURACY)
            print(f"{name}, rate {rate:g}, seed {seed}: {steps} steps", file=sys.stderr)

        for name in names:
            for rate in CASES[name].rates:
                run(name, rate, SEEDS[0])
        for name in names:
            rate = best(d for d in lines(path) if d["case"] == name and d["seed"] == SEEDS[0])["rate"]
            for seed in SEEDS[1:]:
                run(name, rate, seed)


def time(folder: Path, model: str, speeds: list[str]) -> None:
    """At each bandwidth by itself: a few minutes."""
    times, wholes = folder / "times.jsonl", folder / "wholes.jsonl"
    for speed in speeds:
        if all(line["speed"] != speed for line in lines(times)):
            with Job(model, name="fashion-mnist") as job:
                turn = link.compare_steps(job, speed, repeats=4, count=4)
            for name in turn.names:
                row = turn.row(name, speed)
                line = {
                    "model": model,
                    "speed": speed,
                    "case": name,
                    "sent": turn.sent[name],
                    "seconds": row.seconds._asdict(),
                }
                append(times, line | {"ratio": row.ratio._asdict()})
        if speed in link.FASTER and all(line["speed"] != speed for line in lines(wholes)):
            with Job(model, name="fashion-mnist") as job:
                found = link.train(job, speed, (REFERENCE, POWERSGD, *OURS), link.ACCURACY)
            for name, (seconds, steps) in found.items():
                line = {"model": model, "speed": speed, "case": name}
                append(wholes, line | {"seconds": seconds, "steps": steps})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _names(runs: list[dict[str, Any]]) -> list[str]:
    return [name for name in CASES if any(run["case"] == name for run in runs)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("tune", "time", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp", help="a folder has one only")
    parser.add_argument("--case", action="append", help="only this one; can be given several times")
    parser.add_argument("--speed", action="append", choices=list(link.SPEEDS), help="likewise")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder
    files = [folder / f"{name}.jsonl" for name in ("runs", "times", "wholes")]
    if there := {line["model"] for file in files for line in lines(file)} - {arguments.model}:
        parser.error(f"{folder} holds a study of {', '.join(there)}; another folder for {arguments.model}")
    if arguments.part == "tune":
        names = [name for name in link.cases(arguments.model) if name not in SAME_AS_BF16]
        tune(folder, arguments.model, arguments.case or names)
    elif arguments.part == "time":
        time(folder, arguments.model, arguments.speed or list(link.SPEEDS))
    else:
        runs = lines(folder / "runs.jsonl")
        tuned = {
            name: best(r for r in runs if r["case"] == name and r["seed"] == SEEDS[0])
            for name in _names(runs)
        }
        found = link_report.collect(
            runs, tuned, lines(folder / "times.jsonl"), lines(folder / "wholes.jsonl")
        )
        link_report.write(found, folder)


if __name__ == "__main__":
    main()
