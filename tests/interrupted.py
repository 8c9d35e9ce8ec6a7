"""Runs with checkpoints: interrupted as at any round, resumed, compared with those that were not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config
from fedmpi.comm import run_ranks
from fedmpi.engine.run import run

from .conftest import SMALL, metrics

SAVED = {**SMALL, "reproducible": True, "checkpoint": {"rounds": 3, "keep": 9}}
TOPK = {"name": "topk", "ratio": 0.1, "feedback": True}
LOOKBACK = {"name": "lookback", "threshold": 0.5, "inner": TOPK}
# Not a function of what is trained: times, and what depends on the number of ranks.
OWN = ("seconds", "wire_bytes", "wire_bytes_by_rank", "ranks", "clients_by_rank", "comm")


def train(
    values: dict[str, Any], out: Path, ranks: int = 1, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """The summary; whatever torch, numpy and Python think of as randomness is somewhere else each time."""
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    parsed = config.parse(values)
    how = {"resume": resume, "overwrite": overwrite}
    return run_ranks(ranks, lambda comm: run(parsed, comm, out, quiet=True, **how), timeout=60)[0]


def lines(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics(out)]


def outcome(out: Path) -> tuple[Any, ...]:
    """Everything that an interruption must not change."""
    summary = json.loads((out / "summary.json").read_text())
    trained = sum(summary["clients_by_rank"])
    kept = {name: value for name, value in summary.items() if name not in OWN}
    return lines(out), (out / "model.safetensors").read_bytes(), kept, trained


def rounds_saved(out: Path) -> list[int]:
    return sorted(int(path.name[6:]) for path in (out / "checkpoints").iterdir())


def only(out: Path, *rounds: int) -> None:
    """As if the run had been interrupted after the last of ``rounds``."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name[6:]) not in rounds:
            shutil.rmtree(path)


def check_the_same(values: dict[str, Any], folder: Path) -> None:
    """At one rank and at three, and interrupted at three after round 2 and resumed at two; in ``folder`` / 1 and 3."""
    train(values, folder / "1")
    train(values, folder / "3", ranks=3)
    whole = outcome(folder / "1")
    assert outcome(folder / "3") == whole
    only(folder / "3", 2)
    train(values, folder / "3", ranks=2, resume=True)
    assert outcome(folder / "3") == whole


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    options = ["-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(["mount", "-t", "tmpfs", *options], check=False, capture_output=True).returncode:
        pytest.skip("a small tmpfs needs root; the file-size limit stands for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the error holds the files
