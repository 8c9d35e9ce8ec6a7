"""Simulated time: who comes too late, how long a round lasts, and that all ranks agree on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fedmpi import config, random
from fedmpi.analysis.report import report
from fedmpi.comm import run_ranks, solo
from fedmpi.engine.clients import cohort
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.engine.summary import summary
from fedmpi.errors import ConfigError

from .conftest import SMALL, Mpi, metrics, run_jobs
from .jobs.runs import outcome

TIME = {"compute": 0.01, "upload": 1.0, "download": 8.0}
SPREAD = {**TIME, "compute_spread": 0.6, "jitter": 0.3, "bandwidth_spread": 0.5}


def simulate(time: dict[str, Any], **changes: Any) -> Simulation:
    return Simulation(config.parse({**SMALL, "time": time, **changes}), solo())


def expected_seconds(simulation: Simulation, t: int, plan: dict[str, float], up: int, down: int) -> Any:
    """Of each called client, transcribed from the definition in fedmpi/engine/timing.py."""
    seed, seconds = simulation.config.seed, {}
    for c in cohort(simulation.config, simulation.partition, t).tolist():

        def factor(stream: str, sigma: str, round: int = 0, c: int = c) -> float:
            z = float(random.normal(random.key(seed, round, c, f"simulated {stream}"), 1))
            return math.exp(plan.get(sigma, 0) * z)

        link = factor("link", "bandwidth_spread")
        n = int(simulation.partition.sizes[c])
        compute = plan["compute"] * 2 * min(20, n)  # two steps on batches of 20
        compute *= factor("speed", "compute_spread") * factor("jitter", "jitter", t)
        moved = 8e-6 * (down / plan["download"] + up / plan["upload"]) / link
        seconds[c] = compute + moved
    return seconds


@pytest.mark.parametrize("plan", [TIME, SPREAD])
def test_a_round_lasts_until_its_last_message(plan: dict[str, float]) -> None:
    simulation, total = simulate(plan), 0.0
    for t in range(4):
        line = simulation.round(t)
        seconds = expected_seconds(simulation, t, plan, 4 * 650, 4 * 650)
        assert line["simulated_seconds"] == pytest.approx(max(seconds.values()), rel=1e-5)
        assert (line["late"], line["clients"]) == (0, 4)
        total += line["simulated_seconds"]
    assert summary(simulation)["simulated_seconds"] == total


def test_the_first_to_arrive_are_taken() -> None:
    plan = {**SPREAD, "first": 2}
    simulation = simulate(plan, method="signsgd")
    for t in range(6):
        before = simulation.ledger.upload.clone(), simulation.ledger.download.clone()
        line = simulation.round(t)
        sent = (simulation.ledger.upload - before[0]).nonzero()[:, 0].tolist()
        down = simulation.ledger.download - before[1]
        called = cohort(simulation.config, simulation.partition, t)
        if t:
            assert bool((down[called] > 0).all()), "who comes too late has downloaded, too"
        seconds = {c: expected_seconds(simulation, t, plan, 82, int(down[c]))[c] for c in called.tolist()}
        assert sent == sorted(sorted(seconds, key=seconds.__getitem__)[:2])
        assert line["simulated_seconds"] == pytest.approx(max(seconds[c] for c in sent), rel=1e-5)
        assert (line["late"], line["clients"]) == (2, 2)
    assert summary(simulation)["late"] == 12


def test_a_deadline_waits_for_the_fastest_in_any_case() -> None:
    everybody = expected_seconds(simulate(SPREAD), 0, SPREAD, 2600, 2600)
    ordered = sorted(everybody.values())
    for deadline, come, lasts in (
        (ordered[1] + 1e-6, 2, ordered[1] + 1e-6),  # the server cannot know that nobody else will come
        (ordered[3] + 1e-6, 4, ordered[3]),
        (ordered[0] / 2, 1, ordered[0]),
    ):
        line = simulate({**SPREAD, "deadline": deadline}).round(0)
        assert (line["clients"], line["late"]) == (come, 4 - come)
        assert line["simulated_seconds"] == pytest.approx(lasts, rel=1e-5)


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("method", ["lookback", {"name": "topk", "feedback": True, "ratio": 0.05}])
def test_a_late_client_keeps_what_it_had_and_ranks_agree(method: Any, topology: str) -> None:
    values = {
        **SMALL,
        "method": method,
        "topology": topology,
        "reproducible": True,
        "rounds": 6,
        "time": {**SPREAD, "first": 3, "deadline": 0.6},
        "dropout": 0.1,
    }
    simulation = Simulation(config.parse(values), solo())
    lines = []
    for t in range(6):
        called = cohort(simulation.config, simulation.partition, t)
        states, uploads = simulation.clients.get(called), simulation.ledger.upload.clone()
        lines.append(simulation.round(t))
        after, sent = simulation.clients.get(called), (simulation.ledger.upload - uploads)[called] > 0
        for name, value in states.items():
            assert torch.equal(value[~sent], after[name][~sent])
    assert sum(line["late"] for line in lines) > 3
    alone = outcome(values, solo())
    for result in run_ranks(3, lambda comm: outcome(values, comm), timeout=60):
        for name in ("sha256", "simulated_seconds", "late", "upload_bytes", "messages"):
            assert result[name] == alone[name], name


@pytest.mark.slow
@pytest.mark.mpi
def test_processes_agree_on_time(mpi: Mpi, tmp_path: Path) -> None:
    values = {**SMALL, "reproducible": True, "dropout": 0.1, "time": {**SPREAD, "first": 3, "deadline": 0.6}}
    methods = ("lookback", "signsgd", {"name": "powersgd", "feedback": True})
    jobs = [
        {**values, "method": method, "topology": topology}
        for method in methods
        for topology in ("allreduce", "aggregator")
    ]
    for job, answer in zip(jobs, run_jobs(mpi, 3, jobs, tmp_path)[0], strict=True):
        alone = outcome(job, solo())
        for name in ("sha256", "simulated_seconds", "late", "upload_bytes", "messages"):
            assert answer[name] == alone[name], (job, name)


def test_simulated_seconds_survive_a_resume(tmp_path: Path) -> None:
    values = {**SMALL, "method": "lookback", "time": {**SPREAD, "first": 3}, "checkpoint": {"rounds": 3}}
    whole = run(config.parse(values), solo(), tmp_path / "whole", quiet=True)
    run(config.parse({**values, "rounds": 3}), solo(), tmp_path / "part", quiet=True)
    (tmp_path / "part" / "summary.json").unlink()
    assert (tmp_path / "part" / "checkpoints" / "round-00000003").is_dir()
    again = run(config.parse(values), solo(), tmp_path / "part", quiet=True, resume=True)
    assert again["simulated_seconds"] == whole["simulated_seconds"]

    def lines(name: str) -> list[float]:
        return [line["simulated_seconds"] for line in metrics(tmp_path / name)]

    assert lines("part") == lines("whole")
    assert sum(lines("whole")) == pytest.approx(whole["simulated_seconds"])


def test_a_report_shows_simulated_seconds_at_their_bandwidth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config.parse({**SMALL, "time": TIME, "evaluate_every": 1}), solo(), tmp_path / "timed", quiet=True)
    run(config.parse(SMALL), solo(), tmp_path / "plain", quiet=True)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    text = report([tmp_path / "timed", tmp_path / "plain"], tmp_path / "out")
    header, _, timed, plain = (line.split() for line in text.splitlines()[:4])
    assert header[-2:] == ["simulated", "s"]
    lines = metrics(tmp_path / "timed")
    seconds = np.cumsum([line["simulated_seconds"] for line in lines])
    assert timed[-1] == f"{seconds[-1]:.1f}"
    assert plain[-1] == "-"
    *_, axes = figures[0].axes
    assert axes.get_xlabel() == "simulated seconds (1.0 Mb/s up, 8.0 Mb/s down)"
    drawn, plain_line = axes.get_lines()
    assert not np.isfinite(plain_line.get_xdata()).any()
    assert np.allclose(drawn.get_xdata(), seconds)
    assert list(drawn.get_ydata()) == [line["accuracy"] for line in lines]
    report([tmp_path / "plain"], tmp_path / "out")
    assert len(figures[1].axes) == 2, "nothing without simulated time"


def test_wrong_times_are_named() -> None:
    for changes, says in (
        ({"time": {**TIME, "first": 5}}, "time.first: expected at most the cohort, 4, got 5"),
        ({"time": {**TIME, "upload": 0}}, "time.upload: expected greater than 0, got 0"),
        ({"time": {"compute": 1.0}}, "time.upload: required, not given"),
        ({"time": TIME, "mode": "data_parallel", "cohort": None}, "time: expected none with mode"),
    ):
        with pytest.raises(ConfigError) as caught:
            config.parse({**SMALL, "local": {"lr": 0.1}, **changes})
        assert says in str(caught.value)
