"""The long ones (``./launch/test.sh --full``): the demo over seeds, every shipped method under mpirun, memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi import config

from .conftest import JOBS, Mpi, run_jobs

pytestmark = [pytest.mark.slow, pytest.mark.mpi]
ROOT = Path(__file__).parent.parent
LEAST = {"signsgd": 25, "topk": 5, "intrinsic": 5, "lookback": 2}


@pytest.mark.timeout(1800)
def test_the_demo_compresses_and_learns() -> None:
    """Three seeds, one after the other: they write into the same folder."""
    for seed in (0, 1, 2):
        check_demo(seed)


def check_demo(seed: int) -> None:
    """Each method within 3 points of dense, at the promised ratios; the table shows summary.json's."""
    demo = subprocess.run(
        [ROOT / "launch" / "demo.sh", f"seed={seed}"], capture_output=True, text=True, check=False, cwd="/"
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    runs = ROOT / "runs" / "demo"
    summaries = {name: json.loads((runs / name / "summary.json").read_text()) for name in ("dense", *LEAST)}
    for name, least in LEAST.items():
        summary = summaries[name]
        assert summary["upload_ratio"] >= least, name
        assert summary["accuracy"] >= summaries["dense"]["accuracy"] - 0.03, name
        row = next(line.split() for line in demo.stdout.splitlines() if line.startswith(f"{name} "))
        ratio = summary["upload_ratio"]
        assert (f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.1f}x") in row
    for summary in summaries.values():
        assert summary["seed"] == seed
        assert summary["ranks"] == len(summary["clients_by_rank"]) == 4
        assert all(summary["clients_by_rank"])


def test_every_shipped_method_trains_under_mpirun(openmpi: Mpi, tmp_path: Path) -> None:
    """20 rounds of each of configs/methods on two ranks, both topologies: finite, and the loss goes down. That both
    ranks hold the same parameters is asserted by the job itself."""
    paths = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
    assert len(paths) >= 18
    jobs = [
        {**config.load(path, ["rounds=20"]).plain(), "topology": topology}
        for path in paths
        for topology in ("allreduce", "aggregator")
    ]
    for job, answer in zip(jobs, run_jobs(openmpi, 2, jobs, tmp_path)[0], strict=True):
        losses = answer["losses"]
        assert all(map(math.isfinite, losses)), job["method"]
        assert losses[-1] < losses[0], job["method"]
        assert answer["upload_bytes"] > 0


def peak(folder: Path, images: int, path: Path, *overrides: str) -> dict[str, Any]:
    """What tests/jobs/memory.py measures of two rounds."""
    command = [sys.executable, str(JOBS / "memory.py"), str(path), str(images), *overrides]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


@pytest.mark.timeout(900)
def test_ten_thousand_clients_with_residuals_of_a_large_model(tmp_path: Path) -> None:
    """10,000 clients, ResNet-9 (6.6 M parameters), error feedback, cohort 100, store: mmap, two rounds: the residuals
    would be 263 GB; the process keeps anonymous and shared memory under 3 GB."""
    values = {
        "model": "resnet9",
        "clients": 10_000,
        "cohort": 100,
        "local": {"lr": 0.01, "batch": 1},
        "method": {"name": "topk", "ratio": 0.001, "feedback": True},
        "store": "mmap",
        "store_folder": str(tmp_path),
    }
    (tmp_path / "residuals.yaml").write_text(yaml.safe_dump(values))
    measured = peak(tmp_path, 10_000, tmp_path / "residuals.yaml")
    assert measured["clients"] >= 190
    assert measured["peak_anonymous_and_shared"] < 3e9, measured


@pytest.mark.timeout(900)
@pytest.mark.parametrize("schedule", ["static", "time-varying"])
def test_ten_thousand_clients_of_one_class(tmp_path: Path, schedule: str) -> None:
    """The intrinsic paper's CIFAR-10 configurations: 10,000 clients of one class and 5 images, ResNet-9, d = 64,000: 2
    rounds of 100 clients within 4 GB a rank, each of which sends d numbers."""
    path = ROOT / "configs" / "intrinsic" / f"figure-1-cifar10-{schedule}.yaml"
    measured = peak(tmp_path, 50_000, path)
    assert measured["parameters"] == 6_570_880
    assert measured["clients"] == 200
    assert measured["upload_bytes"] == 200 * 4 * 64_000
    assert measured["peak_anonymous_and_shared"] < 4e9, measured
