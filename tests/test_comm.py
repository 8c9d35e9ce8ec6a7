"""One suite of collectives over every kind of rank, and every way to start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi.cli import main
from fedmpi.comm import Comm, connect, run_ranks
from fedmpi.comm.agree import agree
from fedmpi.comm.launcher import Launch, launcher
from fedmpi.comm.rendezvous import slurm_host
from fedmpi.comm.torch import TorchComm, _choose
from fedmpi.errors import CommError

from .conftest import JOBS, Mpi, torchrun
from .jobs.collectives import check

COLLECTIVES = str(JOBS / "collectives.py")
LAUNCHERS = ("OMPI_", "PMI", "SLURM", "TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
ALONE = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)} | {"OMP_NUM_THREADS": "1"}
GPUS = torch.cuda.device_count()


def ends(name: str, ranks: int) -> list[str]:
    return [f"{name}: {r} of {ranks}, {r} of {ranks} here" for r in range(ranks)]


def slurm(rank: int, size: int) -> dict[str, str]:
    """What srun --mpi=none sets."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_NTASKS": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_collectives_of_threads(ranks: int) -> None:
    run_ranks(ranks, check, timeout=60)


@pytest.mark.parametrize(
    ("one", "two"), [(1, 1.0), (1, True), (0, False), ([1, 2], [1, 2.0]), (None, "None"), (0.0, -0.0)]
)
def test_equal_values_of_two_types_are_a_disagreement(one: Any, two: Any) -> None:
    def main(comm: Comm) -> str:
        agree(comm, {"same": [1, None, float("nan")], "lr": two if comm.rank == 2 else one})
        return ""

    with pytest.raises(CommError, match=re.escape(f"disagree on lr: rank 0 has {one!r}, rank 2 has {two!r}")):
        run_ranks(3, main, timeout=60)
    run_ranks(2, lambda comm: agree(comm, {"lr": one, "none": float("nan")}), timeout=60)


def test_collectives_from_slurms_variables_and_a_killed_rank_is_named() -> None:
    """Five ranks, so that some are no neighbours of the killed one in Gloo's ring; several sums are under way."""
    command = [sys.executable, COLLECTIVES, "auto", "die"]
    without_mpi = ALONE | {
        "PMI_RANK": "0",
        "MPI4PY_LIBMPI": "/no/such/library",
    }  # srun --mpi=pmi2 all the same
    ranks = [
        subprocess.Popen(
            command, env=without_mpi | slurm(r, 5), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(5)
    ]
    outputs = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3, 3, 3, -9], outputs
    assert outputs[0][0].splitlines()[:10] == ends("gloo", 5) * 2
    for rank in range(4):
        lines = outputs[rank][0].splitlines()
        expected = (
            r"lost: gloo: rank {} of {}, summing 10(00)? torch\.float32: rank {} ended or did not come within"
        )
        assert re.match(expected.format(rank, 5, 4), lines[-1]), lines
        if rank >= 2:  # a group of three, by torch's numbers for its ranks
            assert re.match(expected.format(rank - 2, 3, r"2 \(4 of the job\)"), lines[-2]), lines


def test_training_under_torchrun_gives_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    arguments = ["train", "configs/quickstart.yaml", "rounds=4", "reproducible=true", "--quiet", "--out"]
    done = torchrun(2, "-m", "fedmpi", *arguments, str(tmp_path / "two"), env=ALONE)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, str(tmp_path / "one")]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert '"comm": "gloo"' in (tmp_path / "two" / "summary.json").read_text()


def test_missing_ranks_are_named() -> None:
    with pytest.raises(
        CommError, match=r"ranks \[1, 2, 3\] of 4 did not come to localhost:\d+ within 0\.5 s"
    ):
        TorchComm.start("gloo", environ=slurm(0, 4), timeout=0.5)


def test_an_absent_rank_0_is_named() -> None:
    nobody = slurm(1, 2) | {"SLURM_STEP_ID": "1"}
    with pytest.raises(CommError, match=r"rank 1: no rank 0 at localhost:\d+ within 0\.5 s .* MASTER_ADDR"):
        connect("gloo", environ=nobody, timeout=0.5)


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
ELASTIC = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "3"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (OMPI, Launch("mpirun (Open MPI)", 3, True, "mpi")),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, Launch("mpiexec (MPICH)", 3, True, "mpi")),
        (slurm(0, 2) | {"PMI_SIZE": "2", "PMI_RANK": "0"}, Launch("srun", 2, True, "slurm")),
        (slurm(0, 2) | {"PMIX_RANK": "0"}, Launch("srun", 2, True, "slurm")),
        (slurm(0, 2), Launch("srun", 2, False, "slurm")),
        (slurm(0, 2) | OMPI, Launch("mpirun (Open MPI)", 3, True, "mpi")),
        (BATCH, None),  # a batch script's own process: srun has set nothing
        (BATCH | OMPI, Launch("mpirun (Open MPI)", 3, True, "mpi")),
        (ELASTIC | slurm(0, 1) | OMPI, Launch("torchrun", 2, False, "torchrun")),
        (TORCHRUN, Launch("RANK and WORLD_SIZE", 2, False, "torchrun")),
        (TORCHRUN | OMPI, Launch("mpirun (Open MPI)", 3, True, "mpi")),
    ],
)
def test_launchers(environ: dict[str, str], expected: Launch | None) -> None:
    assert launcher(environ) == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n7", "n7"), ("gpu[03-05,9],x1", "gpu03"), ("a1,b[2-3]", "a1"), ("r[1-2]n[07,9]-ib,z", "r1n07-ib")],
)
def test_rank_0s_host_in_a_slurm_node_list(nodes: str, host: str) -> None:
    assert slurm_host({"SLURM_STEP_NODELIST": nodes}) == host
    assert slurm_host({"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_NUM_NODES": "1"}) == "127.0.0.1"


def test_without_a_node_list_the_launching_node_serves() -> None:
    assert slurm_host({"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}) == "10.0.0.1"


def failure(comm: str, environ: dict[str, str]) -> str:
    with pytest.raises(CommError) as caught:
        connect(comm, environ=environ, timeout=0.5)
    return str(caught.value)


def test_what_cannot_connect_says_why() -> None:
    assert "comm: expected one of auto, mpi, gloo, nccl, got 'tcp'" in failure("tcp", {})
    assert "MASTER_PORT: expected a whole number, got x" in failure("gloo", TORCHRUN | {"MASTER_PORT": "x"})
    assert "LOCAL_RANK: expected a whole number, got -1" in failure("gloo", TORCHRUN | {"LOCAL_RANK": "-1"})
    assert "rank: expected 0 to 1 for 2 ranks, got 2" in failure("gloo", TORCHRUN | {"RANK": "2"})
    lacking = slurm(0, 2)
    del lacking["SLURM_STEP_NODELIST"]
    assert "MASTER_ADDR: expected rank 0's host, got nothing" in failure("gloo", lacking)
    with pytest.raises(CommError, match="group: expected an initialized process group"):
        TorchComm()


def test_nccl_is_taken_where_every_rank_has_its_own_gpu() -> None:
    def facts(*gpus: str) -> list[dict[str, str]]:
        return [{"host": f"h{i}", "gpu": gpu} for i, gpu in enumerate(gpus)]

    assert _choose("auto", facts("a", "b")) == "nccl"
    assert _choose("auto", facts("a", "a")) == _choose("auto", facts("a", "")) == "gloo"
    assert _choose("gloo", facts("", "")) == _choose("gloo", facts("a", "b")) == "gloo"
    assert _choose("nccl", facts("a", "b")) == "nccl"
    with pytest.raises(CommError, match=r"rank 2 shares one with rank 0; take gloo or auto"):
        _choose("nccl", facts("a", "b", "a"))
    with pytest.raises(CommError, match="rank 1 has none on h1"):
        _choose("nccl", facts("a", ""))


@pytest.mark.skipif(GPUS > 0, reason="here are GPUs")
def test_nccl_without_a_gpu_is_refused() -> None:
    assert "comm: nccl needs a GPU on every rank" in failure("nccl", {})


@pytest.mark.gpu
@pytest.mark.mpi
@pytest.mark.skipif(GPUS < 1, reason="no GPU here: MPI with GPU tensors is not tried")
def test_collectives_of_gpu_tensors_over_mpi(mpi: Mpi) -> None:
    done = mpi(2, COLLECTIVES, "cuda")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"NCCL needs a GPU a rank, here are {GPUS}")
def test_collectives_of_nccl() -> None:
    done = torchrun(2, COLLECTIVES, "nccl", env=ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ends("nccl", 2)
