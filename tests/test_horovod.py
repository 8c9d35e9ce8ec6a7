"""fedmpi.horovod with the real Horovod: launched ranks, and what one process can tell."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from typing import Any

import pytest
import torch

import fedmpi
from fedmpi import methods
from fedmpi.errors import CommError, ConfigError
from fedmpi.methods.base import Setup

from .conftest import JOBS, Mpi
from .test_conformance import CASES, SPEC

CHECKS = (
    "collectives",
    "lossless_compression",
    "lossless_optimizer",
    "as_horovod_users_know_it",
    "mixed_precision",
    "resume",
    "learning",
    "mistakes",
)
ON_FOUR_RANKS = ("collectives", "lossless_compression", "lossless_optimizer")


@pytest.fixture(scope="module")
def horovod() -> Any:
    """``fedmpi.horovod``; in CI Horovod has to be there."""
    if importlib.util.find_spec("horovod") is None:
        missing = "Horovod is not installed: ./launch/install-horovod.sh builds it"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return fedmpi.horovod


def test_everything_else_works_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fedmpi.integrations.horovod", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "horovod", None)  # an import of it fails
    with pytest.raises(
        CommError,
        match=r"expected Horovod with torch, got: .*install-horovod\.sh of the repository builds it",
    ):
        _ = fedmpi.horovod
    assert fedmpi.ddp.attach


@pytest.mark.horovod
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "checks"),
    [(1, ("one_rank",)), (2, CHECKS), pytest.param(4, ON_FOUR_RANKS, marks=pytest.mark.slow)],
)
def test_real_ranks(horovod: Any, openmpi: Mpi, ranks: int, checks: tuple[str, ...]) -> None:
    mpi = copy.copy(openmpi)
    path = os.pathsep.join([str(JOBS.parent.parent), os.environ.get("PYTHONPATH", "")])
    mpi.env = mpi.env | {
        "PYTHONPATH": path,
        "HOROVOD_CYCLE_TIME": "0.2",
    }  # ms that each small collective waits
    done = mpi(ranks, str(JOBS / "with_horovod.py"), *checks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"held on {ranks} ranks: {name}" for name in checks]


@pytest.mark.horovod
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_what_an_all_reduce_can_average(horovod: Any, options: dict[str, Any]) -> None:
    """Of all methods, exactly those whose codec sums, keeps nothing and sends one array are taken."""
    method = methods.build(options, SPEC, Setup())
    parameters = [torch.zeros(shape, requires_grad=True) for shape in SPEC.shapes]
    try:
        keeps = {**method.up.init(), **method.directions().memory()}
    except ConfigError:
        keeps = {"parameters": torch.zeros(0)}
    drawn = options["name"] == "randomk" and "values" not in options
    alike = method.up.additive or drawn  # with one key then
    if alike and not keeps and len(method.passes) == 1:
        assert len(method.up.layout()) == 1
        compression = horovod.Compression(options, parameters, exact_below=0)
        wire, ctx = compression.compress(torch.randn(11, 20))
        assert wire.numel() < 220 or options["name"] == "dense"
        assert compression.decompress(wire, ctx).shape == (11, 20)
    else:
        with pytest.raises(ConfigError, match=r"fedmpi\.horovod\.DistributedOptimizer takes the others"):
            horovod.Compression(options, parameters)


@pytest.mark.horovod
@pytest.mark.parametrize(
    "options",
    [{"name": "intrinsic", "dim": 500, "schedule": "time_varying"}, {"name": "randomk", "ratio": 0.2}],
)
def test_a_step_draws_alike_in_any_order(horovod: Any, options: dict[str, Any]) -> None:
    """Steps are told apart by Horovod's order of calls, tensors by their size alone: ranks whose gradients come in
    another order send the same coordinates, the next step others, and the mean over steps is the gradient."""
    shapes = ((40, 30), (1, 9), (50, 20), (7,))
    tensors = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    ours, theirs = (
        horovod.Compression(options, [t.requires_grad_() for t in tensors], exact_below=8) for _ in range(2)
    )
    wires, totals, steps = [], [torch.zeros(s) for s in shapes], 100
    for step in range(steps):
        sent = [ours.compress(t) for t in tensors]
        other = [theirs.compress(t) for t in reversed(tensors)]
        for (a, _), (b, _) in zip(sent, reversed(other), strict=True):
            assert torch.equal(a, b)
        wires.append(sent[0][0].clone())
        for total, (wire, ctx) in zip(totals, sent, strict=True):
            total += ours.decompress(wire, ctx)
        theirs.decompress(*other[0])
        assert ours.step == theirs.step == step
    assert not torch.equal(wires[0], wires[1])
    # dim or ratio of what is not exact, and all of what is one-dimensional
    assert [wire.numel() for wire, _ in sent] == (
        [240, 2, 200, 7] if options["name"] == "randomk" else [272, 2, 226, 7]
    )
    for total, tensor in zip(totals[:3:2], tensors[:3:2], strict=True):
        error = (total / steps - tensor.detach()).norm() / tensor.detach().norm()
        one = (
            (1 / 0.2 - 1) ** 0.5 if options["name"] == "randomk" else (2209 / 500) ** 0.5
        )  # of a single step
        assert 0.8 * one < float(error) * steps**0.5 < 1.2 * one
    torch.testing.assert_close(totals[3] / steps, tensors[3].detach())


@pytest.mark.horovod
def test_types_that_travel(horovod: Any) -> None:
    compression = horovod.Compression({"name": "randomk", "ratio": 0.5})
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for shape in ((64, 32), (5,)):
            tensor = torch.ones(shape, dtype=dtype)
            wire, ctx = compression.compress(tensor)
            assert wire.dtype in (torch.float32, torch.float64)  # never summed in half precision
            back = compression.decompress(wire, ctx)
            assert (back.dtype, back.shape) == (dtype, tensor.shape)
    counts = torch.arange(5000).view(50, 100)
    wire, ctx = compression.compress(counts)
    assert torch.equal(compression.decompress(wire, ctx), counts)  # numbers that are no gradient


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"name": "intrinsic", "dim": 10},), r"parameters: expected the model's.*method\.dim"),
        (({"name": "intrinsic", "dim": 10}, [torch.zeros(2000)]), "two dimensions and 1024 numbers or more"),
        (({"name": "randomk", "k": 10},), r"method\.k: expected ratio"),
        (({"name": "randomk", "ratio": 0.1, "feedback": True},), "keeps nothing between steps"),
        (("no such method",), "no such method"),
    ],
)
def test_mistakes_are_named(horovod: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        horovod.Compression(*arguments)
    with pytest.raises(ConfigError, match="exact_below"):
        horovod.Compression("dense", exact_below=-1)
