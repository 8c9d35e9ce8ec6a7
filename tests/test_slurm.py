"""The shipped batch files on a real Slurm: slurm/test-cluster.sh, two nodes on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.run import run

from .conftest import SMALL, model_hash, write_config

pytestmark = pytest.mark.slurm
SLURM = Path(__file__).parent.parent / "slurm"
PATIENCE = 240.0  # seconds after which a job counts as stuck; below pytest's own limit


def lacking(reason: str) -> NoReturn:
    """Skip; in CI, where Slurm has to be there, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"in CI these tests may not be skipped: {reason}")
    pytest.skip(reason)


class Cluster:
    """A running test cluster, and jobs on it that work in a folder of the test's."""

    def __init__(self, conf: str, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": conf, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        # More ranks than CPUs, of which srun, unlike mpirun, tells nothing: waiting ranks must not spin.
        self.env["OMPI_MCA_mpi_yield_when_idle"] = "1"

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, file: str, *arguments: str, options: tuple[str, ...] = ("--ntasks=2",)) -> str:
        """The job's number."""
        return self("sbatch", "--parsable", *options, str(SLURM / file), *arguments).strip()

    def state(self, job: str) -> set[str]:
        """Of the job's array tasks, or of the job."""
        return set(re.findall(r"JobState=(\S+)", self("scontrol", "show", "job", job)))

    def until(self, job: str, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, f"job {job}: {self.state(job)}\n{self.output()}"
            time.sleep(0.1)

    def finish(self, job: str) -> None:
        """Wait for the job's end, which must be a good one."""
        alive = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
        self.until(job, lambda: not alive & self.state(job))
        assert self.state(job) == {"COMPLETED"}, self.output()

    def output(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in self.folder.glob("slurm-*.out"))

    def outcome(self, run: str) -> tuple[dict[str, Any], str]:
        """A run's summary, and a hash of its model."""
        folder = self.folder / "runs" / run
        return json.loads((folder / "summary.json").read_text()), model_hash(folder)

    @property
    def nodes(self) -> list[str]:
        return self("sinfo", "-h", "-N", "-p", "compute", "-o", "%N").split()

    def need_two_nodes(self) -> list[str]:
        if len(self.nodes) < 2:
            lacking("a second host name cannot be had here (unshare --uts)")
        return self.nodes


@pytest.fixture(scope="session")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cluster's slurm.conf. Under pytest-xdist it is started by the first worker that needs it and stopped by the
    last one that lets go of it: each holds a shared lock as long."""
    paths = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if not all(shutil.which(program, path=paths) for program in ("slurmctld", "slurmd", "munged", "sbatch")):
        lacking("no Slurm here; ./launch/test.sh installs it, as root")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers
    env = {**os.environ, "FEDMPI_SLURM": str(shared / "slurm")}
    script = str(SLURM / "test-cluster.sh")
    with (shared / "slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        started = subprocess.run([script, "up"], env=env, capture_output=True, text=True, check=False)
        assert started.returncode == 0, started.stdout + started.stderr
        yield started.stdout.splitlines()[-1].removeprefix("export SLURM_CONF=")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        subprocess.run([script, "down"], env=env, check=True)


@pytest.fixture
def cluster(conf: str, tmp_path: Path) -> Cluster:
    return Cluster(conf, tmp_path)


# A run that ends with the same bits wherever it runs.
EXACT = {**SMALL, "reproducible": True}


def model_of(path: str, folder: Path, *overrides: str) -> str:
    """The hash of the model that the configuration ends with in this process."""
    run(config.load(path, list(overrides)), solo(), folder / "here", quiet=True, overwrite=True)
    return model_hash(folder / "here")


@pytest.mark.parametrize(
    ("file", "options", "comm"),
    [
        # requeue.sbatch, tested below, is this file and more.
        pytest.param("cpu.sbatch", ("--ntasks=2",), "Open MPI", marks=pytest.mark.slow),
        ("cpu-nodes.sbatch", ("--ntasks-per-node=1",), "Open MPI"),
        ("mpich.sbatch", ("--ntasks-per-node=2",), "MPICH"),
        ("gpu.sbatch", ("--ntasks-per-node=2",), "gloo"),
        pytest.param("gpu.sbatch", ("--nodes=2", "--ntasks-per-node=1"), "gloo", marks=pytest.mark.slow),
    ],
)
def test_a_file_trains_two_ranks(
    file: str, options: tuple[str, ...], comm: str, cluster: Cluster, tmp_path: Path
) -> None:
    if "--ntasks-per-node=1" in options:
        cluster.need_two_nodes()
    if comm == "MPICH" and "FEDMPI_MPICH" not in os.environ:
        lacking("FEDMPI_MPICH names no MPICH; ./launch/test.sh installs one and sets it")
    path = write_config(tmp_path, EXACT)
    overrides = ["rounds=6"]
    if comm == "gloo":  # on a machine without NCCL, or with as many GPUs as ranks, alike
        overrides.append("comm=gloo")
        # The nodes' names are in no DNS.
        cluster.env |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    job = cluster.submit(file, path, *overrides, options=options)
    expected = model_of(path, tmp_path, *overrides)
    cluster.finish(job)
    summary, model = cluster.outcome(f"slurm-{job}")
    assert summary["ranks"] == 2
    assert all(summary["clients_by_rank"])
    assert comm in summary["comm"]
    assert model == expected


def test_an_array_sweeps_settings(cluster: Cluster, tmp_path: Path) -> None:
    path = write_config(tmp_path, EXACT)
    job = cluster.submit("sweep.sbatch", path, options=("--array=1,2",))
    cluster.finish(job)
    for task, overrides in (
        ("1", ["method=signsgd", "server.lr=0.003", "seed=0"]),
        ("2", ["method=dense", "seed=1"]),
    ):
        summary, model = cluster.outcome(f"sweep-{job}/{task}")
        assert summary["ranks"] == 2
        assert "Open MPI" in summary["comm"]
        assert model == model_of(path, tmp_path, *overrides)


@pytest.mark.parametrize("cause", ["preemption", pytest.param("time limit", marks=pytest.mark.slow)])
def test_an_interrupted_job_starts_again_and_ends_with_the_same_model(
    cause: str, cluster: Cluster, tmp_path: Path
) -> None:
    """Preemption is Slurm's own requeue, with SIGTERM; before the time limit the ranks get --signal, and the file
    requeues the job. The job has a node to itself, so that it is the only one that is preempted."""
    long = {"rounds": 200, "evaluate_every": 200, "local": {"lr": 0.1, "steps": 8, "batch": 20}}
    path = write_config(tmp_path, {**EXACT, **long})
    node = cluster.nodes[-1]
    job = cluster.submit("requeue.sbatch", path, options=("--ntasks=2", "--exclusive", f"--nodelist={node}"))
    metrics = tmp_path / "runs" / f"slurm-{job}" / "metrics.jsonl"
    cluster.until(job, lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    if cause == "preemption":
        cluster("srun", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--ntasks=1", "true")
    else:
        cluster("scancel", "--signal=USR1", job)
    expected = model_of(path, tmp_path)
    cluster.finish(job)
    assert "Restarts=1 " in cluster("scontrol", "show", "job", job)
    assert re.search(r"continuing after round \d+ of 200", cluster.output())
    assert len(metrics.read_text().splitlines()) == 200
    summary, model = cluster.outcome(f"slurm-{job}")
    assert summary["ranks"] == 2
    assert model == expected


@pytest.mark.slow
def test_doctor_shows_where_the_ranks_of_two_nodes_run(cluster: Cluster) -> None:
    nodes = cluster.need_two_nodes()
    step = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1", "--mpi=pmix"]
    said = cluster("srun", *step, sys.executable, "-m", "fedmpi", "doctor")
    assert "srun, 4 ranks" in said
    rows = [line.split()[:4] for line in said.splitlines() if re.match(r"\d ", line)]
    assert rows == [[str(2 * node + i), nodes[node], str(i), "1"] for node in (0, 1) for i in (0, 1)]
