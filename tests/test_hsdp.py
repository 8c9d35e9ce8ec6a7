"""``fedmpi.sync`` between replicas that FSDP2 shards: real processes (the checks: tests/jobs/hsdp_checks.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import JOBS, torchrun


@pytest.mark.parametrize("which", ["", pytest.param("all", marks=pytest.mark.slow)])
def test_two_replicas_of_two_shards(tmp_path: Path, which: str) -> None:
    done = torchrun(4, str(JOBS / "hsdp_checks.py"), str(tmp_path / "states"), which)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 4, "one a rank"
