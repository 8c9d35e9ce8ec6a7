"""The Trainer's callback, with real transformers jobs of two processes (tests/jobs/trainer.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import JOBS, Mpi, gloo_ranks, torchrun

MODULES = "torch._dynamo,transformers.trainer,transformers.models.bert.modeling_bert"
TRAINER = str(JOBS / "trainer.py")
TOPK = '{"name": "topk", "ratio": 0.05, "feedback": true}'


def report(folder: Path, name: str = "final") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("launch", ["gloo", pytest.param("mpirun, torchrun", marks=pytest.mark.slow)])
def test_bert_resumes_exactly(launch: str, openmpi: Mpi, tmp_path: Path) -> None:
    first = [TRAINER, "bert", str(tmp_path), "8", TOPK]
    second = [*first, "resume"]
    if launch == "gloo":
        done = gloo_ranks(2, *first, "+", *second, modules=MODULES)
    else:
        done = openmpi(2, *first)
        assert done.returncode == 0, done.stdout + done.stderr
        done = torchrun(2, *second)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, found = report(tmp_path), report(tmp_path, "resumed")
    assert whole["ranks"] == 2
    assert whole["stats"]["step"] == found["stats"]["step"] == 8
    assert (whole["stats"]["steps"], found["stats"]["steps"]) == (8, 4), "the span that its bytes are of"
    assert whole["stats"]["payload_bytes"] == 2 * found["stats"]["payload_bytes"]
    assert whole["stats"]["ratio"] > 5
    assert whole["losses"][-1] < whole["losses"][0]
    assert [entry["step"] for entry in whole["logged"]] == list(range(1, 9)), "beside each loss"
    logged = whole["logged"][-1]
    assert logged["fedmpi_payload_bytes"] == whole["stats"]["payload_bytes"]
    assert logged["fedmpi_ratio"] == whole["stats"]["ratio"]
    assert logged["fedmpi_seconds"] > 0
    assert found["moved"] == [8, True], "with the state of the checkpoint that it resumes from"
    weights, again, moved = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("final", "resumed", "moved")
    )
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(torch.equal(weights[name], moved[name]) for name in weights)
    assert found["retried"] == [5, True], "2 of the first attempt, 3 of the second, for the same parameters"
    assert found["anew"] == [2, True], "a model of its own"
    alone = found["accelerate"]
    assert alone["files"] == ["fedmpi-rank0.pt", "fedmpi-rank1.pt"]
    assert alone["apart"] == 0
    assert "expected rank 1's own state, got rank 0's" in alone["refused"]


@pytest.mark.slow
def test_gpt2_under_mpirun(openmpi: Mpi, tmp_path: Path) -> None:
    done = openmpi(2, TRAINER, "gpt2", str(tmp_path), "6", '"signsgd"')
    assert done.returncode == 0, done.stdout + done.stderr
    found = report(tmp_path)
    assert found["ranks"] == 2
    assert found["stats"]["method"] == "signsgd"
    assert found["losses"][-1] < found["losses"][0]


def test_one_process_needs_no_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .jobs import trainer

    monkeypatch.setenv("RANK", "0")  # so that the job asks no launcher
    monkeypatch.setattr("sys.argv", ["trainer.py", "bert", str(tmp_path), "2", TOPK])
    trainer.main()
    assert report(tmp_path)["stats"] is None
