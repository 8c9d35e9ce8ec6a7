"""One suite of collectives over every kind of rank."""

from __future__ import annotations

import pytest

from fedmpi.comm import run_ranks

from .conftest import JOBS, Mpi
from .jobs.collectives import check


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_collectives_of_threads(ranks: int) -> None:
    run_ranks(ranks, check, timeout=60)


@pytest.mark.mpi
def test_collectives_of_mpi(mpi: Mpi) -> None:
    ranks = 3
    done = mpi(ranks, str(JOBS / "collectives.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    name = "MPICH" if mpi.name == "mpich" else "Open MPI"
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"rank {r} of {ranks}" for r in range(ranks)]
    assert all(name in line for line in lines)
