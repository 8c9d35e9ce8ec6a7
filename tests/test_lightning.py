"""The drop-in for Lightning, in its own Trainer on two processes (the job: tests/jobs/lightning_fit.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import fedmpi
from fedmpi.errors import ConfigError

from .conftest import JOBS, torchrun


@pytest.mark.slow  # importing Lightning takes eight seconds of a core, in each process
def test_fit_twice_and_after_a_resume(tmp_path: Path) -> None:
    done = torchrun(2, str(JOBS / "lightning_fit.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == 2, "one a rank"


def trainer(processes: int) -> Any:
    return SimpleNamespace(world_size=processes, strategy=SimpleNamespace(model=nn.Linear(2, 2)))


def test_other_strategies_are_refused_and_one_process_needs_no_hook() -> None:
    callback = fedmpi.lightning.CompressionCallback("bf16")
    callback.on_fit_start(trainer(1), nn.Linear(2, 2))
    assert callback.state is None
    with pytest.raises(ConfigError, match=r"expected strategy='ddp' for 2 processes, got SimpleNamespace"):
        callback.on_fit_start(trainer(2), nn.Linear(2, 2))
