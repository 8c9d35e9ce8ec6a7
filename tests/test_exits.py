"""Jobs over Gloo end with 0 however busy the machine is: a thread of Gloo's that lives longer than Python aborts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from .conftest import JOBS, find_mpi, torchrun

LAUNCHES = 20
GLOO = {
    "collectives": (4, ["collectives.py", "wrap"]),
    "collectives of MPI's ranks": (3, ["collectives.py", "gloo"]),
    "hooks over parts": (4, ["part_checks.py"]),
    "a hook": (2, ["plain_ddp.py", "--fedmpi", "signsgd", "--steps", "5"]),
}


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes beside, that never wait."""
    loops = [subprocess.Popen(["nice", "-n", "5", sys.executable, "-c", "while True: pass"]) for _ in "ab"]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", GLOO)
@pytest.mark.usefixtures("busy")
def test_every_launch_under_load_ends_with_0(job: str) -> None:
    ranks, (script, *arguments) = GLOO[job]
    start = find_mpi("openmpi") if "MPI" in job else torchrun
    for launch in range(LAUNCHES):
        done = start(ranks, str(JOBS / script), *arguments)
        assert done.returncode == 0, f"launch {launch}: {done.stdout}{done.stderr}"
