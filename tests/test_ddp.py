"""The DDP hook in real jobs: torchrun over Gloo, and mpirun over MPI (the checks: tests/jobs/ddp_checks.py)."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import JOBS, find_mpi, gloo_ranks, one_mpi, torchrun
from .jobs import ddp_checks

FULL = "FEDMPI_FULL" in os.environ
LAUNCHES = {"2 ranks": ("", 2), "torchrun 4": ("", 4), "mpirun 2": ("openmpi", 2)}
PLAIN = [str(JOBS / "plain_ddp.py"), "--hidden", "512", "--steps", "60"]
PLAIN += [word for name in ("no", "bf16", "signsgd") for word in ("--fedmpi", name)]


MODULES = "torch._dynamo"  # which DistributedDataParallel imports
NAMESPACE = ["--net"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--net"]


@functools.cache
def namespaces() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    probe = ["unshare", *NAMESPACE, "ip", "link", "set", "lo", "up"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@functools.cache
def answers(launch: str, folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """All checks in one launch; where it is of two ranks, then what each training of a script reports that is not
    ours, in a network namespace, if there can be one: its counters count nobody else's bytes."""
    library, ranks = LAUNCHES[launch]
    answer = folder / "answer.json"
    script = str(JOBS / "ddp_checks.py")
    if library:
        few = [] if FULL else ["cpu", *ddp_checks.COMM_CHECKS]
        done = find_mpi(library)(ranks, script, str(answer), "mpi", *few)
    elif "torchrun" in launch:
        done = torchrun(ranks, script, str(answer))
    else:
        inside = 'ip link set lo up && exec "$@"'
        within = ["unshare", *NAMESPACE, "sh", "-c", inside, "sh"] if namespaces() else []
        done = gloo_ranks(ranks, script, str(answer), "+", *PLAIN, modules=MODULES, within=within)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, str] = json.loads(answer.read_text())
    return result, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {launch: tmp_path_factory.mktemp("ddp") for launch in LAUNCHES}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_hook_with_gradients_on_a_gpu(tmp_path: Path) -> None:
    """Two processes share the device; messages are made there, and staged for Gloo."""
    answer = tmp_path / "answer.json"
    done = torchrun(2, str(JOBS / "ddp_checks.py"), str(answer), "group", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [text for text in json.loads(answer.read_text()).values() if text]


# One launch stays on one worker of pytest-xdist, whoever steals: it answers for all checks.
@pytest.mark.parametrize(
    "launch", ["2 ranks", pytest.param("torchrun 4", marks=pytest.mark.slow), "mpirun 2"]
)
def test_the_hook(launch: str, folders: dict[str, Path]) -> None:
    found, _ = answers(launch, folders[launch])
    wrong = {name: text for name, text in found.items() if text}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    few = LAUNCHES[launch][0] and not FULL
    assert list(found) == list(ddp_checks.COMM_CHECKS if few else ddp_checks.CHECKS), "every check ran"


def test_two_lines_in_a_job_that_we_did_not_write(folders: dict[str, Path]) -> None:
    """bf16 ends within 2 % of the plain test loss; signs are 25 times smaller, and the interface confirms what
    fedmpi says it sent."""
    unchanged, bf16, signs = answers("2 ranks", folders["2 ranks"])[1]
    assert bf16["test_loss"] == pytest.approx(unchanged["test_loss"], rel=0.02)
    stats = signs["stats"]
    assert stats["ratio"] >= 25
    assert stats["uncompressed_bytes"] == 4 * signs["parameters"] * 60
    assert signs["accuracy"] > 0.8
    # Two ranks send as much each; the payload is all that they send but for a flag a group.
    assert stats["wire_sent_bytes"] == pytest.approx(stats["payload_bytes"], rel=0.001)
    if not namespaces():
        pytest.skip(
            "no network namespaces here (unshare --net): the interface counters count other programs, too"
        )
    assert signs["interface_bytes"] == pytest.approx(2 * stats["wire_sent_bytes"], rel=0.1)


def test_collectives_and_hooks_over_a_part_of_the_jobs_ranks() -> None:
    done = gloo_ranks(4, str(JOBS / "part_checks.py"), modules=MODULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "gloo" in line] == [
        f"gloo: {rank} of 4, {rank} of 4 here" for rank in range(4)
    ]
    assert done.stdout.count("ok") == 4, "one a rank; their ends of line may come later"


@pytest.mark.slow
def test_the_same_job_under_mpirun(openmpi: Any) -> None:
    done = openmpi(2, str(JOBS / "plain_ddp.py"), "--fedmpi", "--comm", "mpi", "--steps", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ranks"] == 2
    assert report["stats"]["method"] == "signsgd"
    assert report["accuracy"] > 0.8


@pytest.mark.slow
@one_mpi
@pytest.mark.parametrize("who", ["one", "all"])
def test_an_error_on_one_rank_of_mpi_ends_all_and_one_on_all_is_each_ones(mpi: Any, who: str) -> None:
    done = mpi(2, str(JOBS / "one_fails.py"), who)
    said = "parameter weight has sparse gradients, expected dense ones"
    if who == "one":
        assert done.returncode
        assert done.stderr.count(f"rank 1 failed: ConfigError: model: {said}") == 1, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(said) == 2
