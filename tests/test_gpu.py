"""On a real GPU, where there is one: what test_device.py and rounds_on_a_device.py hold on a make-believe one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmpi import config
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.message import equal

from . import test_device
from .conftest import SMALL
from .rounds_on_a_device import CONFIGS, FEW, METHODS, MIXED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("name", test_device.CASES)
def test_messages_have_the_cpus_bits(name: str) -> None:
    """Up to the last bits of products of matrices, where a method takes them. From the same gradients: the first
    message, before what either end keeps can differ."""
    (there, _), (here, _) = (
        test_device.played(name, place, 1) for place in (torch.device("cuda", 0), torch.device("cpu"))
    )
    products = name.partition(" ")[0] in ("atomo", "powersgd") or any(
        p in name for p in ("atomo", "powersgd")
    )
    for (message, x), (expected, y) in zip(there, here, strict=True):
        if products:
            torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4)
        else:
            assert equal(message, expected)
            assert torch.equal(x.cpu(), y)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str) -> None:
    values = config.load(CONFIGS / "methods" / f"{name}.yaml", [*FEW, "device=cuda"])
    lines = run_ranks(2, lambda comm: Simulation(values, comm).round(0), timeout=120)
    assert lines[0]["loss"] == lines[1]["loss"] < 5


@pytest.mark.parametrize("name", MIXED)
def test_other_runs(name: str) -> None:
    values = config.parse({**SMALL, "rounds": 2, "evaluate_every": 2, **MIXED[name], "device": "cuda"})

    def main(comm: Comm) -> float:
        simulation = Simulation(values.for_ranks(comm.size), comm)
        return [simulation.round(t) for t in range(values.rounds)][-1]["test_loss"]

    assert all(loss < 20 for loss in run_ranks(2, main, timeout=120))


def test_mixed_precision() -> None:
    local = {"lr": 0.1, "steps": 2, "batch": 20, "precision": "bfloat16"}
    simulation = Simulation(
        config.parse({**SMALL, "model": {"name": "cnn"}, "local": local, "device": "cuda"}), solo()
    )
    assert simulation.round(0)["loss"] < 5
    assert simulation.replica.parameters().dtype == torch.float32


@pytest.mark.parametrize("method", ["topk", "signsgd", "intrinsic", "lookback", "fetchsgd"])
def test_reproducible_runs_repeat_themselves(method: str, tmp_path: Path) -> None:
    """At one rank and at two."""
    values = config.parse({**SMALL, "reproducible": True, "device": "cuda", "method": method})
    models = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        run_ranks(ranks, lambda comm, out=out: run(values, comm, out, quiet=True), timeout=120)
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]
