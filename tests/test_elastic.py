"""Ranks that come and go (tests/jobs/elastic.py): what counts is the same everywhere, and little is lost."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedmpi
from fedmpi.errors import CommError, ConfigError

from .conftest import JOBS
from .jobs import elastic as job

Rows = dict[str, list[dict[str, Any]]]


def run(folder: Path, seconds: float, every: float, seed: int = 0) -> tuple[dict[str, Any], Rows, str]:
    """Its events and exit codes, each rank's rows, and all that they printed, and the rank of a stopped coordinator."""
    words = [str(JOBS / "elastic.py"), str(folder), str(seconds), str(every), str(seed)]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=abs(seconds) + 200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = "\n".join([*(path.read_text() for path in sorted(folder.glob("rank*.out"))), done.stdout])
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for path in sorted(folder.glob("rank*.jsonl"))
    }
    return json.loads((folder / "events.json").read_text()), rows, said


def check_digests(rows: Rows) -> int:
    """All that were in a synchronisation came out with the same bits; how many there were."""
    found = defaultdict(set)
    for mine in rows.values():
        for row in mine:
            if row["what"] in ("joined", "synchronised"):
                found[row["synchronisation"]].add((row["step"], row["digest"]))
    assert {n: seen for n, seen in found.items() if len(seen) > 1} == {}
    return len(found)


def check_exits(found: dict[str, Any], said: str, refused: tuple[str, ...] = ()) -> None:
    killed = {event["name"] for event in found["events"] if event["what"] == "kill"}
    expected = {name: -9 if name in killed else 2 if name in refused else 0 for name in found["codes"]}
    assert found["codes"] == expected, said
    assert "terminate called" not in said
    assert "Traceback" not in said


def goodput(found: dict[str, Any], rows: Rows) -> float:
    """The part of the time in which ranks were there, and not stopped, that went into steps that count, whatever
    other load made of their length."""
    at = defaultdict(dict[str, float])
    for event in found["events"]:
        at[event["name"]][event["what"]] = event["time"]
    live = useful = 0.0
    for name, mine in rows.items():
        own = at[name]
        last = own.get("kill", mine[-1]["time"])
        live += last - own["start"] - (own.get("continue", last) - own["stop"] if "stop" in own else 0.0)
        useful += sum(row["spent"] for row in mine if row["what"] == "synchronised")
    return useful / live


def test_one_is_killed_another_comes_and_the_coordinator_is_replaced(tmp_path: Path) -> None:
    found, rows, said = run(tmp_path, 150, 0)
    refused = next(event["name"] for event in found["events"] if event["what"] == "refused")
    check_exits(found, said, (refused,))
    assert check_digests({name: mine for name, mine in rows.items() if name != refused}) >= 7
    assert "has method.name 'topk', this rank has 'dense'" in said
    # A stopped one, for which torch's own client would wait for ever.
    assert re.search(r"elastic: no coordinator answers at \S+ for 0.1 s \(no answer within \d+ s\)", said)
    killed, newcomer = rows["rank002"], rows["rank006"]
    assert killed[-1]["what"] == "synchronised"
    joined = next(row for row in newcomer if row["what"] == "joined")
    assert joined["step"] > killed[-1]["step"], "it begins where the others are"
    for name in ("rank001", "rank003", "rank004"):
        end = rows[name][-1]
        assert (end["joined"], end["left"], end["rejoined"]) == (1, 1, 0)
        steps = [row["step"] for row in rows[name] if row["what"] == "synchronised"]
        assert steps == list(range(job.SHORT, steps[-1] + 1, job.SHORT)), "the others do not start anew"
    back = next(event["time"] for event in found["events"] if event["name"] == "coordinator2")
    assert sum(row["time"] > back and row["what"] == "synchronised" for row in newcomer) >= 2
    assert newcomer[-1]["ranks"] == 4


@pytest.mark.slow
def test_four_ranks_of_which_one_goes_and_one_comes_every_ten_seconds(tmp_path: Path) -> None:
    """Ten minutes with FEDMPI_ELASTIC_SECONDS=600."""
    seconds = float(os.environ.get("FEDMPI_ELASTIC_SECONDS", "120"))
    found, rows, said = run(tmp_path / "rolling", seconds, 10)
    check_exits(found, said)
    synchronisations = check_digests(rows)
    share = goodput(found, rows)
    print(
        f"{synchronisations} synchronisations of {len(rows)} ranks with one digest each, goodput {share:.3f}"
    )
    assert {event["what"] for event in found["events"]} >= {"kill", "stop", "continue"}
    assert share >= 0.85
    last = max(row["step"] for mine in rows.values() for row in mine if row["what"] == "synchronised")
    losses = [undisturbed(tmp_path / str(seed), last, seed) for seed in range(4)]
    mine = final_loss(rows)
    band = max(losses) - min(losses)
    print(f"loss {mine:.4f}, undisturbed {', '.join(f'{x:.4f}' for x in losses)}")
    assert mine <= max(losses) + band, "three dozen newcomers cost no more than a seed does"


def undisturbed(folder: Path, steps: int, seed: int) -> float:
    found, rows, said = run(folder, -steps, 0, seed + 1)
    check_exits(found, said)
    return final_loss(rows)


def final_loss(rows: Rows) -> float:
    """After the last synchronisation with most of the ranks in it."""
    synchronised = [row for mine in rows.values() for row in mine if row["what"] == "synchronised"]
    last = max(row["synchronisation"] for row in synchronised if row["ranks"] >= job.RANKS - 1)
    return statistics.fmean(row["loss"] for row in synchronised if row["synchronisation"] == last)


def wrapped(**how: Any) -> Any:
    net = nn.Linear(8, 8)
    return fedmpi.local_sgd(net, torch.optim.SGD(net.parameters(), lr=0.1), **how)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"elastic": "here"}, r'elastic: expected the coordinator\'s "host:port", got \'here\''),
        ({"elastic": {"at": "here:1", "leese": 3}}, r"elastic.leese: unknown key"),
        (
            {"elastic": "here:1", "every": lambda cycle: 5},
            r"every: expected a number with elastic, got a function",
        ),
        ({"elastic": "here:1", "overlap": 1}, r"overlap: expected 0 with elastic, got 1"),
        (
            {"elastic": "here:1", "exchange": "owner"},
            r"exchange: expected gather or sum with elastic, got owner",
        ),
        ({"elastic": "here:1", "comm": "mpi"}, r"elastic: expected neither group nor comm with it"),
    ],
)
def test_what_does_not_go_with_it_is_said(how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        wrapped(**how)


def test_a_coordinator_that_is_not_there_or_does_not_answer_is_named() -> None:
    def refused(port: int) -> str:
        with pytest.raises(CommError) as error:
            wrapped(elastic={"at": f"127.0.0.1:{port}", "coordinator": 0.1})
        return str(error.value)

    said = refused(port := job.free_port())
    assert said.startswith(f"elastic: no coordinator answers at 127.0.0.1:{port} for 0.1 s ([Errno 111]")
    assert said.endswith(f"start one there with: fedmpi coordinator --port {port}")
