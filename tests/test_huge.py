"""Finite gradients of any size come to finite and right numbers, or to one sentence, whatever the method: a new row
needs no edit here."""

from __future__ import annotations

import functools
import math
import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi import config, methods
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine import updates
from fedmpi.engine.clients import cohort
from fedmpi.engine.replica import Replica
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.store import ClientStore
from fedmpi.engine.trainer import Update
from fedmpi.errors import FedMPIError, NumericalError
from fedmpi.integrations.reducer import Reducer
from fedmpi.meet.sums import Sums
from fedmpi.message import from_bytes, to_bytes
from fedmpi.method import Context, Method, Round
from fedmpi.methods.base import Setup
from fedmpi.ops.sums import finite, finite_rows

from .conftest import SMALL
from .test_conformance import CASES, SPEC

CLIENTS, ROUNDS, LR = 2, 2, 0.125
HALVES = {torch.float16, torch.bfloat16}


def draw() -> Tensor:
    return torch.randn(CLIENTS, SPEC.size, generator=torch.Generator().manual_seed(5))


def one_huge(value: float) -> Tensor:
    g_CD = draw()
    g_CD[:, 7] = value
    return g_CD


ONES = 1.75 * torch.ones(CLIENTS, SPEC.size)
TURNS = ONES * (1 - 2 * (torch.arange(SPEC.size) % 2))
# Gradients, and how often they hold ordinary numbers: a power of two, so that ties stay ties.
LARGEST, LARGE, SMALL_ONE = 2.0**127, 2.0**83, 2.0**-133
INPUTS: dict[str, tuple[Tensor, float]] = {
    "all 3e38": (LARGEST * ONES, LARGEST),
    "any 1e25": (LARGE * draw(), LARGE),
    "any denormal": (SMALL_ONE * draw(), SMALL_ONE),
    "one 3e38": (one_huge(3e38), 2.0**100),
}
if "FEDMPI_FULL" in os.environ:
    INPUTS |= {
        "all 1e25": (LARGE * ONES, LARGE),
        "all denormal": (SMALL_ONE * ONES, SMALL_ONE),
        "alternating": (LARGEST * TURNS, LARGEST),
    }


def play(method: Method, g_CD: Tensor) -> Tensor:
    """How far parameters are moved after each of two rounds of the same gradients: each client's message as a run
    makes, checks and sends it, their mean, the server's step, a client's download.

    Raises:
      NumericalError: that names what overflows.
    """
    up, server, ids = method.up, method.server, torch.arange(CLIENTS)
    replica = Replica(solo(), method, torch.zeros(SPEC.size), Sums(), ClientStore(up.init_peer), "allreduce")
    senders, view = ClientStore(up.init), server.view(torch.zeros(SPEC.size))
    moved = []
    for t in range(ROUNDS):
        before, now = senders.get(ids), Round(1, t, LR, rounds_per_epoch=2)
        for codec in method.passes:
            way = replica.open(codec, ids, torch.full((CLIENTS,), 1 / CLIENTS).double(), {0: ids}, now)
            ctx = Context(now, ids, torch.ones_like(ids), replica.shared())
            message, after = codec.compress(g_CD, before, ctx)
            updates.check_fits_float32(message, after, t)
            received = from_bytes(to_bytes(message), codec.layout(), CLIENTS)
            way.take(way.roster.weights, received, before, ctx)
            if codec is not up:
                replica.between()
        replica.finish()
        senders.put(ids, after)
        for name, value in {**after, **replica.state}.items():
            assert bool(value.isfinite().all()), name
        view = server.reconcile(view, server.download(replica.state, int(view["version"])), t + 1)
        assert torch.equal(server.parameters(view), replica.parameters())
        moved.append(replica.parameters())
    return torch.stack(moved).double()


def error(moved: Tensor, g_CD: Tensor) -> float:
    """How far that is from federated averaging, relatively."""
    right = -LR * torch.arange(1, ROUNDS + 1)[:, None] * g_CD.double().mean(0)
    return float((moved - right).norm() / right.norm())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (" over " in n or "=" in n)) for n in CASES]
)
def test_two_rounds_of_any_finite_gradients_are_right_or_refused(name: str) -> None:
    """Right: no further from federated averaging than the same method is with ordinary numbers, or, of votes, the very
    same step. What is half a float32's size by design has a half's range."""
    method = methods.build(CASES[name], SPEC, Setup(seed=1))
    kept = {value.dtype for value in method.up.init().values()}
    half = HALVES & (kept | {field.dtype for field in method.up.layout().values()})
    for label, (g_CD, times) in INPUTS.items():
        try:
            moved = play(method, g_CD)
        except NumericalError as found:
            assert float(g_CD.abs().max()) > 1e38, label
            said = re.compile(
                r"round [01]: [^;]* is beyond the largest float32, though the [a-z]* are finite; expected .*"
            )
            assert said.fullmatch(str(found))  # noqa: PT017
            continue
        small_CD = (g_CD.double() / times).float()
        expected = play(method, small_CD)
        if not (half or torch.equal(moved, expected)):
            assert error(moved, g_CD) <= error(expected, small_CD) * 1.001 + 1e-4, label


def test_the_mean_of_large_vectors_is_no_larger() -> None:
    for name in ("dense", "bf16"):
        moved = play(methods.build(name, SPEC, Setup()), 3e38 * ONES.sign())
        torch.testing.assert_close(moved[0], -LR * 3e38 * ONES[0].sign().double(), rtol=2.0**-8, atol=0)
    up = methods.build("bf16", SPEC, Setup()).up
    rows_WN = torch.full((3, 8), 3e38, dtype=torch.bfloat16)
    assert up.merge is not None
    assert torch.equal(up.merge(rows_WN, 0, Round(1, 0, LR)), rows_WN[0])


def drop_ins() -> list[str]:
    """Those whose server only averages."""
    return [name for name in CASES if methods.build(CASES[name], SPEC, Setup()).decoder is not None]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (" over " in n or ("=" in n and "fp16" not in n)))
        for n in drop_ins()
    ],
)
def test_a_drop_in_leaves_a_step_that_overflows_out_on_all_ranks(name: str) -> None:
    """In every way to meet: gradients are finite or NaN on all, what is kept is finite, and the next step counts."""
    shapes = dict(zip(SPEC.names, SPEC.shapes, strict=True))

    def main(comm: Comm, way: str) -> list[Any]:
        reducer, found = Reducer(shapes, CASES[name], comm, exact_below=30, exchange=way), []
        for step, g_CD in enumerate((LARGEST * ONES, LARGEST * ONES, one_huge(3e38), draw())):
            skipped, g_D = reducer.skipped, g_CD[comm.rank] if comm.rank < CLIENTS else g_CD[0]
            parameters = {n: torch.nn.Parameter(torch.zeros(shape)) for n, shape in shapes.items()}
            for parameter, g in zip(parameters.values(), g_D.split(SPEC.sizes), strict=True):
                parameter.grad = g.view(parameter.shape).clone()
            reducer.average(parameters)
            means = torch.cat([p.grad.reshape(-1) for p in parameters.values() if p.grad is not None])
            assert (reducer.skipped == skipped) == bool(means.isfinite().all()), step
            for group in reducer.groups:
                for value in (*group.state.values(), *group.memory.values(), *group.peers.state.values()):
                    assert bool(value.isfinite().all()), step
            found.append(means.nan_to_num(nan=7e7).tolist())
        assert bool(means.isfinite().all())
        return found

    for ranks, way in ((2, "auto"), (2, "sum"), (3, "auto"))[: 3 if "FEDMPI_FULL" in os.environ else 1]:
        first, *others = run_ranks(ranks, functools.partial(main, way=way), timeout=60)
        assert all(other == first for other in others), way


def huge(simulation: Simulation, client: int, value: float) -> None:
    """From now on this client's gradient is ``value`` everywhere."""
    train = simulation.trainer.train

    def one(*arguments: Any) -> Update:
        update = train(*arguments)
        update.g_CD[arguments[3] == client] = value
        return update

    simulation.trainer.train = one  # type: ignore[method-assign]


BAD = 4
RUNS: dict[str, dict[str, Any]] = {
    "randomk": {"name": "randomk", "ratio": 0.05},
    "fp16": {"name": "fp16", "feedback": True},
    "powersgd": {"name": "powersgd", "rank": 2, "feedback": True},
    "fetchsgd": {"name": "fetchsgd", "rows": 3, "columns": 40, "k": 20},
}


# In two rounds. fp16 sends what it can, and its residual overflows in the second; powersgd's step is finite, and after
# it nobody's loss is.
REJECTED = {"randomk": [1, 1], "fp16": [0, 1], "powersgd": [0, 6], "fetchsgd": [1, 1]}


def simulation(name: str, comm: Comm, **more: Any) -> Simulation:
    torch.set_num_threads(1)
    values = {**SMALL, "method": RUNS[name], "reproducible": False, "cohort": None, **more}
    return Simulation(config.parse(values), comm)


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        pytest.param(name, topology, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, name in enumerate(RUNS)
        for j, topology in enumerate(("allreduce", "aggregator"))
    ],
)
def test_a_run_is_refused_on_all_ranks_or_goes_on_without_the_client(name: str, topology: str) -> None:
    def main(comm: Comm, **more: Any) -> Any:
        run = simulation(name, comm, topology=topology, **more)
        huge(run, BAD, 3e38)
        try:
            lines = [run.round(t) for t in range(2)]
        except FedMPIError as found:
            assert bool(run.replica.parameters().isfinite().all())
            return str(found)
        kept = run.clients.get(torch.tensor([BAD])) if not run.clients.empty else {}
        assert all(bool(value.isfinite().all()) for value in (*run.replica.state.values(), *kept.values()))
        return [line["rejected"] for line in lines]

    for said in (main(solo()), *run_ranks(2, main, timeout=60)):
        assert "is beyond the largest float32, though the" in said
        assert said.count("\n") == 0
    rejects = functools.partial(main, on_bad_update="reject")
    assert [rejects(solo()), *run_ranks(2, rejects, timeout=60)] == [REJECTED[name]] * 3


def test_the_pooled_gradient_is_judged_by_its_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum, and any product with it, overflows: the messages', too, and that is said."""
    values = {
        **SMALL,
        "method": "dense",
        "reproducible": False,
        "cohort": None,
        "local": {"lr": 0.1, "batch": 20},
    }
    run = Simulation(config.parse({**values, "server": {"lr": 0.125}}), solo())
    assert run.passes.pools
    pool = run.trainer.pool
    monkeypatch.setattr(run.trainer, "pool", lambda *a: (torch.full_like(pool(*a)[0], 3e38), pool(*a)[1]))
    run.round(0)
    theta_D = run.replica.parameters()
    assert bool(((theta_D / -3.75e37 - 1).abs() < 1e-3).all())
    monkeypatch.setattr(run.trainer, "pool", lambda *a: (torch.full_like(pool(*a)[0], math.inf), pool(*a)[1]))
    with pytest.raises(NumericalError, match="is not finite"):
        run.round(1)


def test_a_huge_gradient_is_clipped_to_its_norm() -> None:
    run = simulation("powersgd", solo())
    called = cohort(run.config, run.partition, 0)
    update = run.trainer.train(run.replica.parameters(), run.data.train, run.partition, called, 0)
    update.g_CD[0] = 3e38
    clipped, _ = updates.clip(update, 1e-3)
    assert float(clipped.g_CD[0].double().norm()) == pytest.approx(1e-3, rel=1e-6)


def test_finite_looks_at_entries() -> None:
    large, x_CN = torch.full((3, 1000), 3e38), torch.zeros(3, 1000)
    assert all(map(finite, (large, torch.zeros(0), torch.tensor([1, 2]))))
    assert finite_rows(large).all()
    for bad in (math.nan, math.inf, -math.inf):
        for other in (x_CN, large):
            odd = other.clone()
            odd[1, 999] = bad
            assert not finite(odd)
            assert finite_rows(odd).tolist() == [True, False, True]
    assert finite_rows(torch.tensor([1.0, math.inf])).tolist() == [True, False]
    for shape in ((0,), (0, 3), (2, 0), (2, 0, 3)):
        assert finite_rows(torch.zeros(shape)).tolist() == [True] * shape[0]
