"""PowerSGD: both passes against transcriptions, catching up, corner matrices, its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmpi import config, methods, random
from fedmpi.engine.store import ClientStore
from fedmpi.errors import ConfigError
from fedmpi.message import equal, from_bytes, to_bytes
from fedmpi.method import Context, Method, Round, State
from fedmpi.methods.base import Setup
from fedmpi.methods.lowrank import column_sums, orthonormal
from fedmpi.methods.play import play
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec

from .codecs import LAYERS, context
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, drawn, parameters, simulate

MATRICES = {"conv": (4, 18), "wide": (11, 20), "tall": (25, 7)}
D, P, Q, DENSE = 477, 4 + 11 + 25, 18 + 20 + 7, 10  # P and Q: numbers of rank 1


def build(seed: int = 1, spec: Spec = LAYERS, optimizer: str = "sgd", **options: Any) -> Method:
    return methods.build({"name": "powersgd", **options}, spec, Setup(seed, optimizer=Optimizer(optimizer)))


def gram_schmidt(matrix: Array) -> Array:
    """As in the paper's appendix: each column minus its parts along the earlier ones, normalised."""
    matrix = matrix.copy()
    for i in range(matrix.shape[1]):
        for j in range(i):
            matrix[:, i] -= (matrix[:, j] @ matrix[:, i]) * matrix[:, j]
        matrix[:, i] /= np.linalg.norm(matrix[:, i])
    return matrix


class Reference:
    """Algorithms 1 and 2 on softmax regression; the bias is averaged as it is."""

    def __init__(self, task: Softmax, rank: int, seed: int, feedback: bool, against: str = "own") -> None:
        self.task, self.feedback, self.against = task, feedback, against
        self.theta = task.theta
        normals = random.normal(random.key(seed, stream="powersgd Q"), 64 * rank)
        self.q = normals.view(64, rank).double().numpy()
        self.error = np.zeros((len(task.sizes), 640))

    def round(self, chosen: list[int], eta: float) -> Array:
        """Returns Δ', the decoded mean."""
        omega = self.task.sizes[chosen] / self.task.sizes[chosen].sum()
        g = [self.task.accumulated(self.theta, k, 2, 0.2) for k in chosen]
        M = [g_k[:640].reshape(10, 64) for g_k in g]
        if self.feedback:
            M = [M_k + self.error[k].reshape(10, 64) for k, M_k in zip(chosen, M, strict=True)]
        P = gram_schmidt(sum(w * (M_k @ self.q) for w, M_k in zip(omega, M, strict=True)))
        Q = [M_k.T @ P for M_k in M]
        self.q = sum(w * Q_k for w, Q_k in zip(omega, Q, strict=True))
        for k, M_k, Q_k in zip(chosen, M, Q, strict=True):
            self.error[k] = (M_k - P @ (Q_k if self.against == "own" else self.q).T).ravel()
        bias = sum(w * g_k[640:] for w, g_k in zip(omega, g, strict=True))
        mean = np.concatenate([(P @ self.q.T).ravel(), bias])
        self.theta = self.theta - eta * mean
        return mean


@pytest.mark.parametrize(
    ("rank", "feedback", "clients", "cohort", "topology"),
    [
        (1, True, 5, None, "allreduce"),
        (2, False, 5, None, "aggregator"),
        (2, False, 8, 3, "allreduce"),
        (2, True, 5, None, "allreduce"),
        (2, True, 8, 3, "aggregator"),
        (3, True, 8, 3, "allreduce"),
    ],
)
def test_against_a_transcription(
    rank: int, feedback: bool, clients: int, cohort: int | None, topology: str
) -> None:
    """θ, Q and every client's error, for 25 rounds, also when only some clients come.

    ``free`` starts from θ₀ and follows; ``guided`` starts every round from what the run holds. Feedback sends
    the large directions first, so that P's columns come to be nearly dependent and each round multiplies the
    difference between float32 and float64: here by less than two.
    """
    simulation = simulate(
        method={"name": "powersgd", "rank": rank, "feedback": feedback},
        clients=clients,
        cohort=cohort,
        topology=topology,
    )
    task = Softmax(simulation)
    free, guided = (Reference(task, rank, simulation.config.seed, feedback) for _ in range(2))

    def held() -> tuple[Array, Array, Array]:
        q = simulation.replica.state["q"].view(64, rank).double().numpy()
        residual = (
            simulation.clients.get(torch.arange(clients))["residual"]
            if feedback
            else torch.zeros(clients, 650)
        )
        assert not residual[:, 640:].any(), "what is dense leaves no error"
        return parameters(simulation), q, residual[:, :640].double().numpy()

    for t in range(25):
        chosen = drawn(simulation, t) if cohort else list(range(5))
        guided.theta, guided.q, guided.error = held()
        simulation.round(t)
        for reference, factor in ((guided, 1), (free, 2**t)):
            reference.round(chosen, 0.2)
            theta, q, error = held()
            assert_close(theta, reference.theta, min(1e-3, 2e-6 * factor))
            assert_close(q, reference.q, min(1e-2, 2e-5 * factor))
            if feedback:
                assert_close(error, reference.error, min(1e-2, 2e-5 * factor))
    messages = 25 * (cohort or 5)
    assert int(simulation.ledger.upload.sum()) == messages * 4 * (10 * rank + 64 * rank + 10)


def test_errors_against_the_mean_lead_to_the_same_parameters() -> None:
    """The authors' code subtracts the decoded mean from each client's gradient: with all clients in all rounds
    only the mean of the errors enters the parameters, and it is the same."""
    simulation = simulate(method={"name": "powersgd", "rank": 2, "feedback": True})
    reference = Reference(Softmax(simulation), 2, simulation.config.seed, feedback=True, against="mean")
    for t in range(15):
        simulation.round(t)
        reference.round(list(range(5)), 0.2)
        assert_close(parameters(simulation), reference.theta, 1e-5)
    residual = simulation.clients.get(torch.arange(5))["residual"].double().numpy()[:, :640]
    omega = reference.task.sizes / reference.task.sizes.sum()
    assert_close(omega @ residual, omega @ reference.error, 1e-4)
    assert np.abs(residual - reference.error).max() > 0.1 * np.abs(residual).max()


def test_momentum_is_on_the_decoded_mean() -> None:
    simulation = simulate(
        method={"name": "powersgd", "rank": 2, "feedback": True},
        server={"optimizer": "momentum", "beta1": 0.8, "lr": 0.05},
    )
    reference = Reference(Softmax(simulation), 2, simulation.config.seed, feedback=True)
    theta, m = reference.theta, np.zeros(650)
    for t in range(20):
        simulation.round(t)
        m = 0.8 * m + reference.round(list(range(5)), 0.0)
        theta = theta - 0.05 * m
        reference.theta = theta
        assert_close(parameters(simulation), theta, 1e-4)
    # θ does not follow from the factors: it comes with Q, and the mean of P.
    assert int(simulation.ledger.download.sum()) == 5 * 4 * (20 * 2 * 10 + 19 * (650 + 2 * 64))


def test_bytes_both_ways() -> None:
    """Up P and Q; down the mean of P in the round, and P̂, Q, η of each missed round before the next."""
    clients, cohort = 6, 2
    simulation = simulate(
        method={"name": "powersgd", "rank": 1}, clients=clients, cohort=cohort, sampling="round_robin"
    )
    p, s, up, down = 10, 64 + 10, 0, 0
    for t in range(9):
        line = simulation.round(t)
        missed = t if t < 3 else 3
        assert line["upload_bytes"] == 2 * 4 * (p + s)
        assert line["download_bytes"] == 2 * 4 * (p + missed * (p + s + 1))
        up, down = up + line["upload_bytes"], down + line["download_bytes"]
    assert [int(simulation.ledger.upload.sum()), int(simulation.ledger.download.sum())] == [up, down]


# --- by itself --------------------------------------------------------------------------------------


def gradients(t: int, clients: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(clients, D, generator=torch.Generator().manual_seed(100 * seed + t))


def played(method: Method, t: int, state: State, senders: ClientStore, g_CD: Tensor) -> State:
    """One round of all clients."""
    assert len(method.passes) == 2
    ids, round = torch.arange(len(g_CD)), Round(seed=4, t=t, lr=0.1)
    last = play(method, g_CD, senders.get(ids), state, round)[-1]
    senders.put(ids, last.after)
    return method.server.finish(last.state, last.mean_S, round)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_who_missed_rounds_rebuilds_parameters_and_q(optimizer: str) -> None:
    """With the first pass in every round: to the bit, and at most for θ and Q."""
    method = build(rank=2, optimizer=optimizer, feedback=True)
    server, senders = method.server, ClientStore(method.up.init)
    theta = torch.linspace(-1, 1, D)
    states = [server.init(theta)]
    for t in range(12):
        states.append(played(method, t, states[-1], senders, gradients(t)))
    factors = 2 * P + 2 * Q + DENSE + 1
    sizes = set()
    for seen in range(13):
        for now in range(seen, 13):
            view = server.view(theta) | {"theta": states[seen]["theta"], "q": states[seen]["q"]}
            download = server.download(states[now], seen)
            view = server.reconcile(view, from_bytes(to_bytes(download)), now)
            assert torch.equal(view["theta"], states[now]["theta"])
            shared, expected = server.shared(view), server.shared(states[now])
            assert all(torch.equal(shared[name], expected[name]) for name in expected)
            assert int(view["version"]) == now
            whole, missed = D + 2 * Q, now - seen
            history = min(missed * factors, whole) if optimizer == "sgd" else whole * (missed > 0)
            assert int(download.nbytes()[0]) == 4 * history
            sizes.add(history)
    assert whole in sizes


def test_a_mean_of_low_rank_arrives_exactly() -> None:
    """Clients' matrices A B_c with a common A of two columns: P̂ spans them in the first round, whatever Q."""
    method, theta = build(rank=2), torch.zeros(D)
    generator = torch.Generator().manual_seed(0)
    g_CD = gradients(0)
    for name, (rows, columns) in MATRICES.items():
        a = torch.randn(rows, 2, generator=generator)
        b = torch.randn(4, 2, columns, generator=generator)
        LAYERS.views(g_CD)[name].copy_((a @ b).view(4, *LAYERS.shapes[LAYERS.names.index(name)]))
    state = played(method, 0, method.server.init(theta), ClientStore(method.up.init), g_CD)
    assert torch.allclose(state["theta"], -0.1 * g_CD.mean(0), atol=1e-6)


def test_a_rank_that_was_missing_comes_back() -> None:
    """While the mean has rank one, P̂'s second column is zero; Q then starts from the initial one."""
    method, senders = build(rank=2), ClientStore(dict)
    server = method.server
    one, two = gradients(0, 1), gradients(0, 1)
    generator = torch.Generator().manual_seed(7)
    for name, (rows, columns) in MATRICES.items():
        a = torch.randn(2, rows, 1, generator=generator)
        b = torch.randn(2, 1, columns, generator=generator)
        LAYERS.views(one)[name].copy_((a @ b)[0].view(1, *LAYERS.shapes[LAYERS.names.index(name)]))
        LAYERS.views(two)[name].copy_((a @ b).sum(0).view(1, *LAYERS.shapes[LAYERS.names.index(name)]))
    start = server.init(torch.zeros(D))
    state = played(method, 0, start, senders, one)
    assert torch.allclose(state["theta"], -0.1 * one[0], atol=1e-6)
    sent, initial = state["q"].view(Q, 2), start["q"].view(Q, 2)
    assert torch.equal(sent[:, 1], initial[:, 1])
    assert not torch.equal(sent[:, 0], initial[:, 0])
    state = played(method, 1, state, senders, two)
    assert torch.allclose(state["theta"], -0.1 * (one + two)[0], atol=1e-5)
    zero = played(method, 2, state, senders, torch.zeros(1, D))
    assert torch.equal(zero["theta"], state["theta"])
    assert torch.equal(zero["q"], start["q"])


@pytest.mark.parametrize("feedback", [False, True])
def test_both_passes_are_linear_pure_and_row_by_row(feedback: bool) -> None:
    method = build(rank=2, feedback=feedback)
    shared = method.server.shared(method.server.init(torch.zeros(D)))
    ctx = context(4)
    ctx = Context(ctx.round, ctx.clients_C, ctx.steps_C, shared)
    a, b = gradients(0), gradients(1)
    zero = ClientStore(method.up.init).get(ctx.clients_C)
    errors = {"residual": gradients(2)} if feedback else {}
    for up in method.passes:
        assert up is not None
        assert up.additive
        assert up.init_peer() == {}

        def v(g_CD: Tensor, state: State, up: Any = up, ctx: Context = ctx) -> Tensor:
            return up.decompress(up.compress(g_CD, state, ctx)[0], {}, ctx)[0]

        assert torch.allclose(v(a, zero) + v(b, zero), v(a + b, zero), atol=1e-4)
        if feedback:
            assert torch.allclose(v(a, errors), v(a + errors["residual"], zero))
        kept = a.clone(), {name: value.clone() for name, value in errors.items()}
        message, _ = up.compress(a, errors, ctx)
        assert equal(message, up.compress(a, errors, ctx)[0])
        assert equal(from_bytes(to_bytes(message), up.layout(), 4), message)
        assert torch.equal(a, kept[0])
        assert all(torch.equal(errors[name], kept[1][name]) for name in errors)
        for c in range(4):
            alone = {name: value[c : c + 1] for name, value in errors.items()}
            single = v(a[c : c + 1], alone, ctx=ctx.select(torch.tensor([c])))
            assert torch.allclose(single[0], v(a, errors)[c], rtol=1e-5, atol=1e-6)
    assert torch.equal(method.up.lift(v(a, zero), ctx)[:, 72:76], a[:, 72:76])


def test_a_model_without_matrices_is_dense_in_one_pass() -> None:
    method = build(spec=Spec(("w", "small"), ((50,), (2, 3))), rank=2)
    assert len(method.passes) == 1
    dense, power = simulate(), simulate(method={"name": "powersgd", "rank": 64})
    for t in range(3):
        assert power.round(t)["upload_bytes"] == dense.round(t)["upload_bytes"]
        assert_close(parameters(power), parameters(dense), 1e-6)


# --- orthonormal columns ----------------------------------------------------------------------------


def test_orthonormal_columns() -> None:
    matrix = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    got = orthonormal(matrix).double().numpy()
    assert np.abs(got.T @ got - np.eye(5)).max() < 1e-6
    assert np.abs(got - gram_schmidt(matrix.double().numpy())).max() < 1e-6


def test_dependent_columns_are_zero() -> None:
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    matrix[:, 1] = -3 * matrix[:, 0]
    matrix[:, 3] = 0
    matrix[:, 4] = matrix[:, 0] + 1e-7 * matrix[:, 2]
    got = orthonormal(matrix)
    assert (got != 0).any(0).tolist() == [True, False, True, False, False]
    assert not orthonormal(torch.zeros(3, 2)).any()
    assert orthonormal(torch.full((1, 2), -1e-30)).tolist() == [[-1, 0]]


def test_orthonormal_columns_are_exact_arithmetic() -> None:
    """To the bit what Python's floats give in the stated order: no library's sum or product."""

    def total(values: list[float]) -> float:
        values = values + [0.0] * ((1 << (len(values) - 1).bit_length()) - len(values))
        while len(values) > 1:
            half = len(values) // 2
            values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
        return values[0]

    matrix = torch.randn(21, 4, generator=torch.Generator().manual_seed(3))
    thirds = matrix.double() / 3  # all 53 bits, which show the order
    assert column_sums(thirds).tolist() == [total(column.tolist()) for column in thirds.T]
    columns, done = [column.tolist() for column in matrix.T], []
    while columns:
        column = columns.pop(0)
        length = total([x * x for x in column]) ** 0.5
        unit = [x / length for x in column]
        done.append(unit)
        along = [total([u * x for u, x in zip(unit, rest, strict=True)]) for rest in columns]
        columns = [
            [x - u * a for x, u in zip(rest, unit, strict=True)]
            for a, rest in zip(along, columns, strict=True)
        ]
    assert torch.equal(orthonormal(matrix), torch.tensor(done, dtype=torch.float64).T.float())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rank": 0}, "method.rank"), ({"ranks": 3}, "method.ranks"), ({"rank": 1.5}, "rank")],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.parse({**SMALL, "method": {"name": "powersgd", **options}})
