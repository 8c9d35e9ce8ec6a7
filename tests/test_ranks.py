"""Real MPI processes, Open MPI and MPICH: the same run at any number of ranks, and ends that hang nobody."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedmpi.cli import main
from fedmpi.comm import solo

from .conftest import JOBS, SMALL, Mpi, find_mpi, model_hash, one_mpi, run_jobs, write_config
from .jobs.runs import outcome
from .test_conformance import RUNS, assert_same_run

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def references() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(configuration, its outcome in one process) for every method, exact and not."""
    exact_or_not = [{**RUNS[name], "reproducible": exact} for name in RUNS for exact in (True, False)]
    return [(values, outcome(values, solo())) for values in exact_or_not]


FAST = [("openmpi", 3), ("mpich", 2)]
SLOW = [(mpi, ranks) for ranks in (1, 2, 3, 4) for mpi in ("openmpi", "mpich") if (mpi, ranks) not in FAST]
FULL = "FEDMPI_FULL" in os.environ


@pytest.mark.parametrize(
    ("mpi", "ranks"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    indirect=["mpi"],
)
def test_collectives_and_that_processes_equal_one_process(
    mpi: Mpi, ranks: int, references: list[tuple[dict[str, Any], dict[str, Any]]], tmp_path: Path
) -> None:
    """The collectives of MPI and of Gloo started from it; every method in both topologies: equal parameters (to the
    bit when reproducible) and protocol bytes. The fast suite does exact sums once for every method, in one topology
    under Open MPI and in the other under MPICH, and sums of floats, which all methods share, for every third one, in
    the topology that is left."""
    topologies = ("allreduce", "aggregator")
    expected = [
        ({**values, "topology": topology}, reference)
        for number, (values, reference) in enumerate(references)
        for topology in topologies
        if FULL
        or (
            (values["reproducible"] == (topology == "aggregator")) == (mpi.name == "mpich")
            and (values["reproducible"] or number // 2 % 3 == 0)
        )
    ]
    answers, said = run_jobs(mpi, ranks, [values for values, _ in expected], tmp_path, "mpi", "gloo")
    library = "MPICH" if mpi.name == "mpich" else "Open MPI"
    ends = [f"{rank} of {ranks}, {rank} of {ranks} here" for rank in range(ranks)]
    lines = [line.split(": ") for line in said.splitlines()]
    assert [line[-1] for line in lines] == 2 * ends
    assert all(name.startswith(library) for name, _ in lines[:ranks])
    assert {name for name, _ in lines[ranks:]} == {"gloo"}
    for answer, (values, reference) in zip(answers, expected, strict=True):
        assert answer["ranks"] == ranks
        assert_same_run(answer, reference, values["reproducible"])
        trained = answer["clients_by_rank"]
        assert sum(trained) == SMALL["cohort"] * SMALL["rounds"]
        assert (trained[0] == 0) == (values["topology"] == "aggregator" and ranks > 1)
        assert (answer["wire_bytes"] == 0) == (ranks == 1)


def test_the_command_line_writes_the_same_model_under_mpi_threads_and_alone(
    openmpi: Mpi, tmp_path: Path
) -> None:
    config = write_config(tmp_path, {**SMALL, "reproducible": True})

    def arguments(name: str, *more: str) -> list[str]:
        return ["-m", "fedmpi", "train", config, "--out", str(tmp_path / name), *more]

    done = openmpi(2, *arguments("mpi2"))
    assert done.returncode == 0, done.stderr
    for name, ranks in (("alone", "1"), ("threads", "4")):
        assert main([*arguments(name, "--local-ranks", ranks)[2:]]) == 0
    assert model_hash(tmp_path / "mpi2") == model_hash(tmp_path / "alone") == model_hash(tmp_path / "threads")
    summary = json.loads((tmp_path / "mpi2" / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert "Open MPI" in summary["comm"]


@one_mpi
def test_ranks_that_disagree_end_with_the_difference(mpi: Mpi, tmp_path: Path) -> None:
    config = write_config(tmp_path, SMALL)
    done = mpi(2, str(JOBS / "disagree.py"), config, str(tmp_path / "out"))
    assert done.returncode != 0
    assert "ranks disagree on local.lr: rank 0 has 0.1, rank 1 has 0.5" in done.stderr
    assert "Traceback" not in done.stderr


@one_mpi
def test_a_client_whose_loss_is_not_a_number_is_named_on_all_ranks(mpi: Mpi, tmp_path: Path) -> None:
    done = mpi(2, str(JOBS / "poison.py"), write_config(tmp_path, SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert len(lines) == 2
    assert all("client 4, round" in line for line in lines)


@one_mpi
def test_a_rank_that_fails_alone_ends_all(mpi: Mpi, tmp_path: Path) -> None:
    done = mpi(2, str(JOBS / "crash.py"), str(tmp_path / "out"))
    assert done.returncode != 0
    assert "rank 1 failed; ending all ranks" in done.stderr


@one_mpi
def test_doctor_does_a_real_collective(mpi: Mpi) -> None:
    done = mpi(2, "-m", "fedmpi", "doctor")
    assert done.returncode == 0, done.stderr
    assert "sums and gathers correctly" in done.stdout
    assert "2 ranks on cpu: mpi" in done.stdout  # and why: mpirun or mpiexec starts MPI ranks
    assert "starts MPI ranks" in done.stdout
    assert ("MPICH" if mpi.name == "mpich" else "Open MPI") in done.stdout


def test_a_launcher_of_another_mpi_is_named() -> None:
    """MPICH's mpiexec with Open MPI's library: every process would be rank 0 of 1."""
    mpich = find_mpi("mpich")
    del mpich.env["MPI4PY_LIBMPI"]
    done = mpich(2, "-m", "fedmpi", "train", "configs/quickstart.yaml")
    assert done.returncode != 0
    assert "mpi4py uses another MPI than the launcher" in done.stderr
