"""The round loop on a make-believe device: ``rounds_on_a_device.py``, in a process of its own.

torch's autograd counts the devices when it first runs; a process that has trained on the CPU cannot take another.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch


@pytest.mark.timeout(1800)
def test_the_round_loop_on_a_device(device: torch.device, request: pytest.FixtureRequest) -> None:
    full = ["--full"] if request.config.getoption("--full") else []
    arguments = ["-q", "-p", "no:cacheprovider", "tests/rounds_on_a_device.py", *full]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) > 30, done.stdout[-2000:]
