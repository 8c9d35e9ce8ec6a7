"""Local updates and data-parallel runs whose ranks survive one that ends: it costs its steps, and nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi import config
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm, LostError
from fedmpi.engine.faults import _COUNTERS
from fedmpi.engine.fewer import without
from fedmpi.engine.rounds import Simulation

from .conftest import JOBS, SMALL, Mpi
from .interrupted import train as train_in_threads
from .jobs import killed_between as job
from .test_faults import METHODS, TOPK, summary
from .test_faults import train as train_and_strike

LOCAL: dict[str, Any] = {
    **SMALL,
    "mode": "data_parallel",
    "clients": 0,
    "cohort": None,
    "rounds": 40,
    "evaluate_every": 40,
    "local": {"lr": 0.01, "batch": 20, "steps": 5, "optimizer": "adamw"},
    "server": {"lr": 0.7, "optimizer": "nesterov", "beta1": 0.5},
    "method": TOPK,
    "timeout": 3,
}


def test_a_synchronisation_that_is_done_anew_leaves_no_trace() -> None:
    """All ranks hear of a loss when they have averaged, and nobody has gone: residuals and draws as before."""

    def ranks(comm: Comm, losses: tuple[int, ...]) -> dict[str, Any]:
        comm.survives, told, met = True, [0], [0]

        def settle() -> None:
            told[0] += 1
            if told[0] in losses:
                raise LostError("made up")

        def shrink() -> None:
            met[0] += 1
            if met[0] == 1:
                raise LostError("one more")

        comm.settle, comm.shrink = settle, shrink  # type: ignore[method-assign]
        found = job.train(comm, seed=3)
        assert found["equal"]
        assert met[0] == len(losses) + bool(losses)
        return found

    def run(losses: tuple[int, ...]) -> Any:
        return run_ranks(2, lambda comm: ranks(comm, losses), timeout=60)

    assert run((2, 3, 7)) == run(())


@pytest.mark.parametrize("method", [TOPK, METHODS["lookback over topk"]], ids=["topk", "lookback"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_is_shared_out_among_the_same_ranks_goes_on_as_before(
    method: dict[str, Any], steps: int
) -> None:
    local = {"lr": 0.05, "batch": 20, "steps": steps}
    if steps > 1:
        local["optimizer"] = "adamw"
    values = config.parse({**LOCAL, "rounds": 8, "local": local, "method": method, "reproducible": True})

    def run(comm: Comm, again: bool) -> Any:
        comm.survives = True
        simulation = Simulation(values.for_ranks(comm.size), comm)
        for t in range(8):
            if again and t == 4:
                simulation.passes.made = {}
                simulation = without(simulation, range(comm.size), comm, _COUNTERS)
            simulation.round(t)
        return simulation.replica.parameters(), simulation.bytes, simulation.participations

    for mine, other in zip(
        run_ranks(2, lambda comm: run(comm, True)), run_ranks(2, lambda comm: run(comm, False)), strict=True
    ):
        assert torch.equal(mine[0], other[0])
        assert mine[1:] == other[1:]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(3000)
def test_ten_jobs_of_ten_go_on_without_a_rank_that_is_killed(
    openmpi: Mpi, record_property: Callable[[str, Any], None]
) -> None:
    """Killed between two synchronisations (and in one), at any step, any rank: code 0, and a loss as of any seed."""
    undisturbed = [
        run_ranks(3, lambda comm, seed=seed: job.train(comm, seed))[0]["loss"] for seed in range(10)
    ]
    draw, limit = random.Random(1), 2 * max(undisturbed) - min(undisturbed)
    for n in range(10):
        rank, step = draw.randrange(3), draw.randrange(5, job.STEPS - 5)
        words = [str(n), str(rank), str(step), *(["in"] if n in (3, 7) else [])]
        mpiexec = [str(openmpi.prefix / "bin" / "mpiexec"), "--with-ft", "ulfm", "-n", "3"]
        done = subprocess.run(
            [*mpiexec, sys.executable, str(JOBS / "killed_between.py"), *words],
            env=openmpi.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout.strip().splitlines()[-1])
        record_property("row", f"{n + 1} of 10: {words}, {found}, undisturbed {undisturbed}")
        assert found["members"] == [r for r in range(3) if r != rank]
        assert found["equal"]
        assert found["rounds"] == job.STEPS // job.H, "no round is lost"
        assert found["loss"] <= limit, undisturbed


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(3000)
def test_ten_runs_of_ten_go_on_without_a_rank_that_is_killed(
    openmpi: Mpi, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """The same of a configuration with ``local.steps``, at a random moment."""
    undisturbed = [
        train_in_threads({**LOCAL, "seed": seed}, tmp_path / f"seed{seed}", ranks=3)["loss"]
        for seed in range(10)
    ]
    draw, limit = random.Random(2), 2 * max(undisturbed) - min(undisturbed)
    for n in range(10):
        folder = tmp_path / str(n)
        folder.mkdir()
        rank, moment = draw.randrange(3), draw.uniform(1, 38)
        where = f"{rank} SIGKILL moment {moment:.3f}"
        ended = train_and_strike(
            openmpi, 3, where, folder, "--with-ft", "ulfm", **{**LOCAL, "seed": n, "checkpoint": {}}
        )
        assert ended.code == 0, ended.said
        found = summary(folder)
        record_property("row", f"{n + 1} of 10: {where}, loss {found['loss']:.4f}, undisturbed {undisturbed}")
        (lost,) = found["lost_ranks"]
        assert (lost["rank"], found["ranks"], found["clients"]) == (rank, 2, 2)
        assert found["messages"] == 3 * lost["round"] + 2 * (40 - lost["round"])
        assert found["loss"] <= limit, undisturbed
