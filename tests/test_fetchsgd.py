"""FetchSGD and its Count-Sketch: against explicit matrices and a transcription, its options, its bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config, methods, random
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.summary import summary
from fedmpi.errors import ConfigError, NumericalError
from fedmpi.method import Round
from fedmpi.methods.base import Setup
from fedmpi.methods.fetchsgd import FetchServer
from fedmpi.ops.sketch import CountSketch
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec

from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, parameters, simulate

SPEC = Spec(("w",), ((650,),))


def build(**options: Any) -> methods.Method:
    return methods.build({"name": "fetchsgd", "columns": 100, "k": 10, **options}, SPEC, Setup(seed=7))


# --- the sketch -------------------------------------------------------------------------------------


def hashes(size: int, rows: int, columns: int, key: int) -> tuple[Array, Array]:
    """h and s, ``(R, D)``, from their definition."""
    h = [random.integers(random.key(key, client=r, stream="buckets"), size, columns) for r in range(rows)]
    s = [random.signs(random.key(key, client=r, stream="signs"), size) for r in range(rows)]
    return torch.stack(h).numpy(), torch.stack(s).double().numpy()


def plain_sketch(g: Array, h: Array, s: Array, columns: int) -> Array:
    table = np.zeros((len(h), columns))
    for r in range(len(h)):
        for i in range(len(g)):
            table[r, h[r, i]] += s[r, i] * g[i]
    return table


def plain_estimate(table: Array, h: Array, s: Array) -> Array:
    return np.median([s[r] * table[r, h[r]] for r in range(len(h))], axis=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("size", "columns"), [(200, 30), (37, 64), (70_000, 1000), (5, 1)])
def test_sketch_is_its_definition(rows: int, size: int, columns: int) -> None:
    sketch, key = CountSketch(size, rows, columns, 11), random.key(1, stream="g")
    g_CD = (random.integers(random.keys(1, 0, torch.arange(3), "g"), size, 2001) - 1000).float()  # exact sums
    v_CS, (h, s) = sketch.encode(g_CD), hashes(size, rows, columns, 11)
    assert v_CS.shape == (3, sketch.length) == (3, rows * columns)
    table = np.stack(
        [plain_sketch(g.double().numpy(), h, s, columns) for g in g_CD[: 1 if size > 999 else 3]]
    )
    assert np.array_equal(v_CS[: len(table)].numpy(), table.reshape(len(table), -1))
    estimate = np.stack([plain_estimate(t, h, s) for t in table])
    assert np.array_equal(sketch.estimate(v_CS)[: len(table)].numpy(), estimate)
    if size < 1000:
        assert torch.equal(v_CS, g_CD @ sketch.matrix().T)
    index = random.sample(key, size, min(size, 9))
    sparse = torch.zeros_like(g_CD).index_copy(1, index, g_CD[:, index])
    assert torch.equal(sketch.encode(g_CD[:, index], index), sketch.encode(sparse))


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    sketch = CountSketch(5000, 5, 60, 3)
    g_CD = random.normal(random.keys(2, 0, torch.arange(7), "g"), 5000)
    v_CS, u_CD = sketch.encode(g_CD), sketch.estimate(sketch.encode(g_CD))
    for c in range(7):
        assert torch.equal(sketch.encode(g_CD[c : c + 1])[0], v_CS[c])
        assert torch.equal(sketch.estimate(v_CS[c : c + 1])[0], u_CD[c])


def test_matrix_is_what_seed_and_key_say() -> None:
    """Golden: the same sketch in every version and on every machine."""
    matrix = CountSketch(8, 2, 3, 5).matrix().int().view(2, 3, 8)
    assert (matrix.abs().sum(1) == 1).all(), "one bucket a row"
    assert matrix.abs().argmax(1).tolist() == [[1, 2, 2, 2, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2, 2, 1]]
    assert matrix.sum(1).tolist() == [[-1, -1, -1, -1, -1, 1, -1, 1], [1, 1, -1, 1, 1, -1, 1, -1]]


def test_buckets_signs_and_rows_are_independent() -> None:
    """Loads of buckets, signs, and agreement between rows, each within 5 standard errors."""
    size, columns = 40_000, 16
    h, s = hashes(size, 3, columns, 9)
    load, share = np.stack([np.bincount(row, minlength=columns) for row in h]), 1 / columns
    assert (abs(load - size * share) < 5 * math.sqrt(size * share * (1 - share))).all()
    assert (abs(s.sum(1)) < 5 * math.sqrt(size)).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((h[a] == h[b]).sum() - size * share) < 5 * math.sqrt(size * share * (1 - share))
        assert abs((s[a] * s[b]).sum()) < 5 * math.sqrt(size)


def test_estimates_are_unbiased() -> None:
    """Over 700 keys: the mean within 5 standard errors, one row's variance (‖g‖² − g_i²)/K within 25 %."""
    size, columns, draws = 40, 8, 700
    g_1D = random.normal(random.key(4), size)[None]
    for rows in (1, 3):
        sketches = (CountSketch(size, rows, columns, key) for key in range(draws))
        u = torch.cat([sketch.estimate(sketch.encode(g_1D)) for sketch in sketches]).double()
        assert ((u.mean(0) - g_1D[0]).abs() < 5 * u.std(0) / math.sqrt(draws)).all()
        if rows == 1:
            variance = (g_1D.square().sum() - g_1D[0].square()) / columns
            assert (u.var(0) / variance - 1).abs().max() < 0.25


def test_heavy_entries_are_found() -> None:
    size, heavy = 20_000, torch.tensor([3, 777, 9_001, 19_999])
    g_D = random.normal(random.key(6), size)
    g_D[heavy] = torch.tensor([90.0, -80, 100, -85])
    sketch = CountSketch(size, 7, 500, 1)
    u_D = sketch.estimate(sketch.encode(g_D[None]))[0]
    assert u_D.abs().topk(4).indices.sort().values.tolist() == heavy.tolist()
    assert (u_D[heavy] - g_D[heavy]).abs().max() < 20


# --- the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(("removal", "rows"), [("subtract", 5), ("subtract", 4), ("clear", 3)])
def test_against_a_transcription(removal: str, rows: int, topology: str) -> None:
    """Algorithm 1 in float64 for 25 rounds: the sketches, the choice of coordinates, the parameters."""
    columns, k, rho, eta, rounds = 90, 8, 0.6, 0.1, 25
    method = {"name": "fetchsgd", "rows": rows, "columns": columns, "k": k, "momentum": rho}
    simulation = simulate(method={**method, "removal": removal}, server={"lr": eta}, topology=topology)
    task = Softmax(simulation)
    h, s = hashes(650, rows, columns, random.key(7, stream="sketch"))
    w, omega = task.theta, task.sizes / task.sizes.sum()
    S_u, S_e, closest = np.zeros((rows, columns)), np.zeros((rows, columns)), math.inf
    for t in range(rounds):
        sketches = [plain_sketch(task.accumulated(w, c, 2, 0.2), h, s, columns) for c in range(5)]
        S_u = rho * S_u + sum(a * S for a, S in zip(omega, sketches, strict=True))
        S_e = S_e + eta * S_u
        U = plain_estimate(S_e, h, s)
        # Coordinates whose medians stand in one bucket are equal: the lowest index wins.
        order = np.argsort(-abs(U), kind="stable")
        cut, beyond = abs(U[order[k - 1]]), abs(U[order[k]])
        closest = min(closest, cut / beyond - 1 if cut != beyond else math.inf)
        delta = np.zeros(650)
        delta[order[:k]] = U[order[:k]]
        S_delta = plain_sketch(delta, h, s, columns)
        if removal == "subtract":
            S_e = S_e - S_delta
        else:
            S_u, S_e = np.where(S_delta == 0, S_u, 0), np.where(S_delta == 0, S_e, 0)
        w = w - delta
        simulation.round(t)
        state = simulation.replica.state
        changed = (state["changed"] == t + 1).nonzero()[:, 0]
        assert changed.tolist() == sorted(order[:k].tolist()), f"round {t}"
        assert_close(parameters(simulation), w)
        assert_close(state["momentum"].double().numpy().reshape(rows, columns), S_u)
        assert_close(state["error"].double().numpy().reshape(rows, columns), S_e)
    assert closest > 2e-5, "a choice that rounding could turn: choose another seed"
    found = summary(simulation)
    assert found["upload_bytes"] == rounds * 5 * 4 * rows * columns
    # Every client comes in every round: k values and as many indices of 10 bits, from the second on.
    assert found["download_bytes"] == (rounds - 1) * 5 * (4 * k + math.ceil(10 * k / 8))


def test_a_client_downloads_what_changed_since_it_last_came() -> None:
    """Its bytes: 4 for each value, and 10 bits for each index or 650 for a map."""
    method, theta = build(), torch.zeros(650)
    state = method.server.init(theta)
    states = [state]
    for t in range(30):
        mean = random.normal(random.key(3, t), 500)
        state = method.server.finish(state, mean, Round(7, t, 0.1))
        states.append(state)
    for seen in (0, 1, 20, 29, 30):
        view = {**method.server.view(theta), "theta": states[seen]["theta"]}
        download = method.server.download(state, seen)
        changed = int((state["changed"] > seen).sum())
        assert (seen == 30) == (changed == 0)
        assert int(download.nbytes()[0]) == 4 * changed + min(math.ceil(10 * changed / 8), 82)
        assert torch.equal(method.server.reconcile(view, download, 30)["theta"], state["theta"])
    assert "map" in method.server.download(state, 0).arrays
    assert "index" in method.server.download(state, 29).arrays


def test_a_run_that_diverges_ends_with_a_named_error() -> None:
    """Far too few columns for k, so that the estimates' errors feed each other."""
    simulation = simulate(method={"name": "fetchsgd", "rows": 3, "columns": 40, "k": 40})
    with pytest.raises(NumericalError, match="not finite"):
        list(map(simulation.round, range(300)))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_what_is_no_number_reaches_the_parameters(value: float) -> None:
    method = build(momentum=0.0, rows=4)
    state = method.server.init(torch.zeros(650))
    mean = value * random.signs(random.key(8), 400)
    for t in range(3):
        state = method.server.finish(state, mean, Round(7, t, 10.0))
    assert not state["theta"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 101}, r"method.columns: expected at least k = 101, .*, got 100"),
        ({"k": 651, "columns": 1000}, r"method.k: expected 1 to 650 \(the model's parameters\), got 651"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 0}, r"method\.columns: expected greater than or equal to 1, got 0"),
        ({"k": 0}, r"method\.k: expected greater than or equal to 1, got 0"),
        ({"rows": 0}, r"method\.rows: expected greater than or equal to 1, got 0"),
        ({"momentum": 1}, r"method\.momentum: expected less than 1, got 1"),
        ({"removal": "zero"}, r"method\.removal: expected 'subtract' or 'clear', got 'zero'"),
        ({"feedback": True}, r"method\.feedback: unknown key"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse({**SMALL, "method": {"name": "fetchsgd", "columns": 50, "k": 5, **options}})


@pytest.mark.parametrize("missing", ["columns", "k"])
def test_a_sketch_needs_its_size(missing: str) -> None:
    method = {name: 9 for name in ("columns", "k") if name != missing}
    with pytest.raises(ConfigError, match=rf"method\.{missing}: required, not given"):
        config.parse({**SMALL, "method": {"name": "fetchsgd", **method}})


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_server_optimizers_are_refused(name: Any) -> None:
    options = {"name": "fetchsgd", "columns": 100, "k": 10}
    with pytest.raises(ConfigError, match=f"server.optimizer: expected sgd with fetchsgd, .* got {name}"):
        methods.build(options, SPEC, Setup(optimizer=Optimizer(name)))


def test_with_a_wide_sketch_and_k_of_all_it_is_plain_momentum() -> None:
    """No collision left: S_e is empty after each round, and w ← w − η·(momentum of g)."""
    method = {"name": "fetchsgd", "rows": 7, "columns": 20_000, "k": 650, "momentum": 0.5}
    run = {**SMALL, "method": method, "clients": 3, "cohort": None}
    fetch = Simulation(config.parse(run), solo())
    rule = {"optimizer": "momentum", "beta1": 0.5}
    plain = Simulation(config.parse({**run, "method": "dense", "server": rule}), solo())
    server = fetch.method.server
    assert isinstance(server, FetchServer)
    for t in range(5):
        fetch.round(t)
        plain.round(t)
        assert_close(parameters(fetch), parameters(plain), 1e-5)
        assert server.decoder.sketch.estimate(fetch.replica.state["error"][None]).abs().max() < 1e-6
