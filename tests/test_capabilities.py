"""The numerics hold under each set of vector instructions that the processor has, and whatever order its library adds
a matrix product up in: what passes on one machine passes on another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .jobs import deletable

HERE = Path(__file__).parent
CAPABILITIES = [
    "default",
    *(["avx2"] if torch.cpu._is_avx2_supported() else []),
    *(["avx512"] if torch.cpu._is_avx512_supported() else []),
]
# Each method's own tests, and those of what else computes.
METHODS = [name for name in deletable.methods(HERE.parent) if (HERE / f"test_{name}.py").exists()]
REST = [
    "bad_updates",
    "conformance",
    "huge",
    "kernels",
    "layout",
    "local_sgd",
    "models",
    "objectives",
    "ops",
    "optim",
    "optimizers",
    "ordered",
    "parts",
    "probe",
    "prune_clients",
    "reducer",
    "rules",
    "sums",
    "trainer",
    "ways",
]
# A fused product beside a sum of vectors: the two orders that differed on another processor.
FEW = (
    "test_lookback.py::test_lbgm_with_threshold_0_is_fedavg",
    "test_atomo.py::test_a_budget_beyond_the_rank_is_dense",
)


def run(tests: list[str], capability: str, **order: str) -> None:
    """The tests in a process that has only these instructions."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": capability, **order}
    done = subprocess.run(
        command, cwd=HERE, env=env, capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_sums_in_another_order_pass() -> None:
    """Without vector instructions, and with the matrix products that any processor can compute."""
    there = [test for test in FEW if (HERE / test.partition("::")[0]).exists()]
    run(there, "default", MKL_CBWR="COMPATIBLE")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a suite of its own
@pytest.mark.parametrize("order", ["AUTO", "COMPATIBLE"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_numerics_pass_under_each_capability(capability: str, order: str) -> None:
    run([f"test_{name}.py" for name in (*METHODS, *REST)], capability, MKL_CBWR=order)


def test_every_file_of_numerics_is_there() -> None:
    assert [name for name in REST if not (HERE / f"test_{name}.py").exists()] == []
