"""Jobs as people have them, with at most three lines of fedmpi in each (tests/jobs)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import JOBS, torchrun


@pytest.mark.slow
@pytest.mark.parametrize("job", ["gan", "compiled", "lora"])
def test_under_torchrun(job: str) -> None:
    done = torchrun(2, str(JOBS / f"{job}.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 2, "one a rank"


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    """``--multi_gpu`` is its word for several processes of one machine; the job itself asks for the CPU."""
    plain = [
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--main_process_port",
        "0",
        *plain,
    ]
    done = subprocess.run(
        [*command, str(JOBS / "accelerated.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 2, "one a rank"
