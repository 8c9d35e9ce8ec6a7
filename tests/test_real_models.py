"""Networks with batch norm, buffers and dropout, as users have them: the same bits at any number of ranks, in either
topology, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import SMALL, model_hash
from .interrupted import only, outcome, train

TOPK = {"name": "topk", "ratio": 0.2, "feedback": True}
METHODS: dict[str, Any] = {
    "dense": "dense",
    "signsgd": {"name": "signsgd", "vote": "majority"},
    "topk": TOPK,
    "lookback": {"name": "lookback", "threshold": 0.5},
    "powersgd": {"name": "powersgd", "rank": 2, "feedback": True},
    "intrinsic": {"name": "intrinsic", "dim": 64},
}
RUN = {
    **SMALL,
    "rounds": 4,
    "local": {"lr": 0.02, "steps": 2, "batch": 8},
    "reproducible": True,
    "checkpoint": {"rounds": 2, "keep": 9},
}


def same_everywhere(values: dict[str, Any], folder: Path) -> None:
    """1 rank, and 3 with a resume at 2, in both topologies."""
    train(values, folder / "one")
    expected = model_hash(folder / "one")
    for topology in ("allreduce", "aggregator"):
        out = folder / topology
        train({**values, "topology": topology}, out, ranks=3)
        assert model_hash(out) == expected
        whole = outcome(out)
        only(out, 2)
        train({**values, "topology": topology}, out, ranks=2, resume=True)
        assert outcome(out) == whole


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_and_dropout(method: str, tmp_path: Path) -> None:
    same_everywhere({**RUN, "model": {"name": "tests.nets:build"}, "method": METHODS[method]}, tmp_path)


@pytest.mark.parametrize("model", ["recurrent", "attention", "skipping"])
def test_dropout_within_layers(model: str, tmp_path: Path) -> None:
    train({**RUN, "model": {"name": f"tests.nets:{model}"}}, tmp_path / "1")
    train({**RUN, "model": {"name": f"tests.nets:{model}"}}, tmp_path / "2", ranks=2)
    assert model_hash(tmp_path / "1") == model_hash(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["recurrent", "attention"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_within_layers_under_every_method(model: str, method: str, tmp_path: Path) -> None:
    same_everywhere({**RUN, "model": {"name": f"tests.nets:{model}"}, "method": METHODS[method]}, tmp_path)


BIG = {
    **RUN,
    "model": {"name": "tests.nets:resnet18"},
    "clients": 3,
    "cohort": 2,
    "rounds": 2,
    "evaluate_every": 2,
}


def test_resnet_18_as_it_is(tmp_path: Path) -> None:
    """transformers' own, batch norm and all: it trains, and loads what was saved."""
    values = {**BIG, "rounds": 1, "checkpoint": {}, "test_batch": 180}
    train({**values, "local": {"lr": 0.02, "steps": 1, "batch": 4}}, tmp_path)
    from .nets import resnet18

    model = resnet18((1, 8, 8), 10)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    counters = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters == [1] * 20
    assert all(bool(b.isfinite().all()) for b in model.buffers() if b.is_floating_point())
    assert not torch.equal(
        dict(model.named_buffers())["inner.resnet.embedder.embedder.normalization.running_var"],
        torch.ones(64),
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_resnet_18_under_every_method(method: str, tmp_path: Path) -> None:
    values = {**BIG, "method": METHODS[method], "checkpoint": {"rounds": 1, "keep": 9}}
    train(values, tmp_path / "one")
    for topology in ("allreduce", "aggregator"):
        out = tmp_path / topology
        train({**values, "topology": topology}, out, ranks=3)
        assert model_hash(out) == model_hash(tmp_path / "one")
        whole = outcome(out)
        only(out, 1)
        train({**values, "topology": topology}, out, ranks=2, resume=True)
        assert outcome(out) == whole
