"""Intrinsic gradient compression: its three algorithms against explicit matrices, and what they cost."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config, methods, random
from fedmpi.comm import solo
from fedmpi.engine.clients import cohort
from fedmpi.engine.ledger import ratios
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError, MessageError
from fedmpi.method import Context, Round
from fedmpi.methods.base import Setup
from fedmpi.methods.intrinsic import Coordinates, Subspaces
from fedmpi.ops.subspace import MATRICES, Dense, Fastfood
from fedmpi.spec import Spec

from .codecs import sent
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, parameters, simulate

D = 650  # softmax regression on digits
SCHEDULES = ("static", "time_varying", "k_varying")


def values(clients: int = 6, cohort: int = 2, epochs: int = 4, **method: Any) -> dict[str, Any]:
    return {
        **SMALL,
        "clients": clients,
        "cohort": cohort,
        "sampling": "epoch_shuffle",
        "rounds": epochs * clients // cohort,
        "local": {"lr": 0.05, "steps": 1},
        "method": {"name": "intrinsic", "dim": 16, "matrix": "dense", **method},
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("matrix", ["fastfood", "dense", "hashed"])
def test_against_the_algorithm_with_explicit_matrices(schedule: str, matrix: str) -> None:
    """θ ← θ − η/W Σ_w A^(k_w) A^(k_w)ᵀ g_w in float64, 20 rounds; the gradients are the simulation's own."""
    extra = {"subspaces": 3} if schedule == "k_varying" else {}
    # reproducible: each client is compressed by itself
    run = config.parse(
        {**values(schedule=schedule, matrix=matrix, **extra), "rounds": 20, "reproducible": True}
    )
    simulation = Simulation(run, solo())
    theta = simulation.replica.parameters().double()
    calls = sent(simulation)
    count = extra.get("subspaces", 1)

    def explicit(epoch: int, k: int) -> torch.Tensor:
        key = random.key(run.seed, 0 if schedule == "static" else epoch, k, "subspace")
        return MATRICES[matrix](D, 16, key).lift(torch.eye(16)).T.double()

    samples = simulation.partition.sizes.double()
    for t in range(20):
        calls.clear()
        simulation.round(t)
        clients = cohort(run, simulation.partition, t)
        weights = dict(
            zip(clients.tolist(), (samples[clients] / samples[clients].sum()).tolist(), strict=True)
        )
        for g_CD, _, ctx in calls:
            drawn = (
                random.integers(ctx.keys("subspace"), 1, count)[:, 0] if count > 1 else torch.zeros(len(g_CD))
            )
            for client, k, g in zip(
                ctx.clients_C.tolist(), drawn.long().tolist(), g_CD.double(), strict=True
            ):
                a = explicit(t // 3, k)
                theta = theta - 0.05 * weights[client] * (a @ (a.T @ g))
        assert torch.allclose(simulation.replica.parameters().double(), theta, rtol=1e-4, atol=1e-5)


def explicit_matrix(matrix: str, size: int, dim: int, seed: int) -> Array:
    """A in float64, column by column; tests/test_ops.py compares it with the product of its parts."""
    made = {"fastfood": Fastfood, "dense": Dense}[matrix]
    return made(size, dim, random.key(seed, stream="subspace")).lift(torch.eye(dim)).T.double().numpy()


@pytest.mark.parametrize("matrix", ["fastfood", "dense"])
@pytest.mark.parametrize("scale", ["unbiased", "isometry"])
def test_intrinsic_static_is_algorithm_1(matrix, scale):
    """θ = θ₀ + AΣ, Σ ← Σ − η Σ_k ω_k Aᵀ g_k, for 20 rounds."""
    dim, server_lr = 24, 0.3
    simulation = simulate(
        method={"name": "intrinsic", "dim": dim, "matrix": matrix, "scale": scale}, server={"lr": server_lr}
    )
    task = Softmax(simulation)
    A = explicit_matrix(matrix, 650, dim, simulation.config.seed)
    A = A * math.sqrt(dim / 650) if scale == "isometry" else A
    omega, sigma = task.sizes / task.sizes.sum(), np.zeros(dim)
    for t in range(20):
        theta = task.theta + A @ sigma
        sketches = [A.T @ task.accumulated(theta, k, 2, 0.2) for k in range(5)]
        sigma = sigma - server_lr * sum(w * s for w, s in zip(omega, sketches, strict=True))
        simulation.round(t)
        assert_close(simulation.replica.state["sigma"].double().numpy(), sigma)
        assert_close(parameters(simulation), task.theta + A @ sigma)
    assert simulation.bytes["upload"] == simulation.bytes["download"] == 20 * 5 * 4 * dim


@pytest.mark.parametrize(
    ("schedule", "extra", "download"),
    [
        ("static", {}, lambda e, d, k: e * d),
        ("time_varying", {}, lambda e, d, k: (2 * e - 1) * d),
        ("k_varying", {"subspaces": 4}, lambda e, d, k: (2 * e - 1) * d * k),
        ("k_varying", {"subspaces": 4, "redraw": False}, lambda e, d, k: e * d * k),
    ],
)
def test_what_a_client_sends_and_receives_over_e_epochs(schedule: str, extra: Any, download: Any) -> None:
    """Each client comes once an epoch: Table 1's dE up, and down dE, (2E − 1)d, (2E − 1)dK (its 2dE, 2dEK are
    bounds), in numbers of 4 bytes; the number k is one byte more."""
    epochs, d = 5, 16
    simulation = Simulation(config.parse(values(epochs=epochs, schedule=schedule, **extra)), solo())
    for t in range(simulation.config.rounds):
        simulation.round(t)
    tag = 1 if "subspaces" in extra else 0
    assert simulation.ledger.upload.tolist() == [epochs * (4 * d + tag)] * 6
    assert simulation.ledger.download.tolist() == [4 * download(epochs, d, extra.get("subspaces", 1))] * 6


@pytest.mark.parametrize(("schedule", "k"), [("time_varying", 1), ("k_varying", 4)])
def test_what_missed_epochs_cost(schedule: str, k: int) -> None:
    """A return within the epoch costs d·K; after m missed epochs (m + 2)·d·K, and never more than D + d·K."""
    d, per_epoch, spec = 8, 3, Spec(("p",), ((500,),))
    options = {"name": "intrinsic", "dim": d, "schedule": schedule} | ({"subspaces": k} if k > 1 else {})
    method = methods.build(options, spec, Setup(seed=1))
    server = method.server
    states = [server.init(torch.linspace(-1, 1, 500))]
    generator = torch.Generator().manual_seed(0)
    for t in range(60):
        mean = torch.randn(method.up.size, generator=generator)
        states.append(server.finish(states[-1], mean, Round(1, t, 0.1, per_epoch)))
    for seen, now in itertools.combinations(range(0, 60, 4), 2):
        missed = now // per_epoch - seen // per_epoch - 1
        numbers = d * k * (1 if missed < 0 else missed + 2)
        if numbers - d * k > 500:
            numbers, extra = 500 + d * k, 4  # θ at the epoch's start, and the epoch's number
        else:
            extra = 0
        assert int(server.download(states[now], seen).nbytes()[0]) == 4 * numbers + extra, (seen, now)


def test_momentum_on_coordinates_starts_afresh_each_epoch_and_stays_in_the_subspace() -> None:
    run = config.parse({**values(schedule="time_varying", epochs=2), "server": {"optimizer": "momentum"}})
    simulation = Simulation(run, solo())
    start = simulation.replica.parameters()
    for t in range(3):
        simulation.round(t)
    a = MATRICES["dense"](D, 16, random.key(run.seed, 0, 0, "subspace")).lift(torch.eye(16)).T.double()
    moved = (simulation.replica.parameters() - start).double()
    inside = a @ torch.linalg.lstsq(a, moved[:, None]).solution
    assert torch.allclose(inside[:, 0], moved, atol=1e-6)
    assert not simulation.replica.state["optimizer.momentum"].any()
    simulation.round(3)
    assert simulation.replica.state["optimizer.momentum"].any()


def test_orthonormal_at_full_dimension_is_lossless() -> None:
    """d = D, A orthonormal: the run equals the dense one within float32 rounding."""
    theta = {}
    for method in ("dense", {"name": "intrinsic", "dim": D, "matrix": "dense", "orthonormal": True}):
        simulation = Simulation(config.parse({**SMALL, "method": method}), solo())
        for t in range(5):
            simulation.round(t)
        theta[str(method)] = simulation.replica.parameters()
    dense, lossless = theta.values()
    assert torch.allclose(dense, lossless, atol=2e-5)


def test_isometry_needs_the_larger_rate() -> None:
    """A·√(d/D) shortens coordinates by √(d/D), so that a step at rate η·D/d is the unbiased one at η."""
    up = {}
    for scale in ("unbiased", "isometry"):
        options = methods.parse({"name": "intrinsic", "dim": 16, "scale": scale})
        up[scale] = Coordinates(Spec(("p",), ((D,),)), Subspaces(Spec(("p",), ((D,),)), options, 1))  # type: ignore[arg-type]
    g, ctx = torch.randn(1, D), Context(Round(1, 0, 0.1), torch.tensor([0]), torch.tensor([1]))
    step = {
        scale: c.lift(c.decompress(c.compress(g, {}, ctx)[0], {}, ctx)[0], ctx) for scale, c in up.items()
    }
    assert torch.allclose(step["isometry"] * D / 16, step["unbiased"], rtol=1e-4, atol=1e-4)


def test_a_drawn_subspace_is_uniform() -> None:
    spec = Spec(("p",), ((40,),))
    method = methods.build(
        {"name": "intrinsic", "dim": 2, "schedule": "k_varying", "subspaces": 5}, spec, Setup()
    )
    clients = torch.arange(5000)
    ctx = Context(Round(0, 3, 0.1), clients, torch.ones_like(clients))
    message, _ = method.up.compress(torch.ones(5000, 40), {}, ctx)
    counts = np.bincount(message.arrays["subspace"].numpy(), minlength=5)
    assert (abs(counts - 1000) < 5 * np.sqrt(5000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize("count", [5, 300])  # a byte's tag, an int32's
def test_a_subspace_that_there_is_not_is_refused(count: int) -> None:
    spec, ctx = Spec(("p",), ((40,),)), Context(Round(0, 3, 0.1), torch.arange(2), torch.ones(2).long())
    options = {"name": "intrinsic", "dim": 2, "schedule": "k_varying", "subspaces": count}
    up = methods.build(options, spec, Setup()).up
    message, _ = up.compress(torch.ones(2, 40), {}, ctx)
    tag = message.arrays["subspace"]
    for wrong in (count, -1)[: 1 + tag.dtype.is_signed]:
        arrays = {**message.arrays, "subspace": torch.tensor([0, wrong], dtype=tag.dtype)}
        with pytest.raises(MessageError, match=f"subspace .*, expected 0 to {count - 1}"):
            up.decompress(message._replace(arrays=arrays), {}, ctx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "method.dim: expected greater than or equal to 1, got 0"),
        ({"dim": D + 1}, f"method.dim: expected at most D = {D}"),
        ({"subspaces": 0, "schedule": "k_varying"}, "method.subspaces: expected greater than or equal to 1"),
        ({"subspaces": 3}, "method.subspaces: expected schedule: k_varying, got static"),
        ({"orthonormal": True, "matrix": "hashed"}, "method.orthonormal: expected matrix: dense, got hashed"),
        ({"matrix": "sparse"}, "method.matrix: expected 'fastfood', 'dense' or 'hashed'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulation(config.parse({**SMALL, "method": {"name": "intrinsic", "dim": 8, **options}}), solo())


def test_table_2_follows_from_its_own_dimensions() -> None:
    """GPT-2's rows (D = 124,439,808, two epochs) from d and K: ratios of numbers, total of the sums.

    K-subspace rows: the download counts dK an epoch, that is, K subspaces that are not redrawn.
    """
    size = 124_439_808
    table = {  # d: up and down of static, then down and total of K = 8
        16384: (7595, 949, 1688),
        65536: (1900, 237, 422),
        262144: (475, 59.3, 105),
        1048576: (119, 14.8, 26.3),
    }
    for dim, (up, down, total) in table.items():
        static = ratios(size, size, dim, dim)
        assert static["upload_ratio"] == static["download_ratio"] == static["total_ratio"]
        assert static["upload_ratio"] == pytest.approx(up, rel=0.005)
        varying = ratios(size, size, dim, 8 * dim)
        assert varying["download_ratio"] == pytest.approx(down, rel=0.005)
        assert varying["total_ratio"] == pytest.approx(total, rel=0.005)
    # Local top-k, k = 50,000, values only: 4D/4k is the column that the paper calls download.
    assert ratios(size, size, 50_000, 1)["upload_ratio"] == pytest.approx(2490, rel=0.005)
    assert ratios(size, size, 500_000, 1)["upload_ratio"] == pytest.approx(248, rel=0.005)
