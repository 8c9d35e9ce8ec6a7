"""Methods through the real engine against plain numpy (or torch) transcriptions of their algorithms.

The references share with fedmpi only what is not under test: the initial values, the data, the partition
and the draw of the cohort. Their gradients are written by hand, in float64. Where a decision hangs on a
comparison (LBGM's threshold, top-k's cut), the test also asserts that no comparison was closer than
rounding could turn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config, methods, random
from fedmpi.comm import run_ranks, solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.sums import Sum
from fedmpi.errors import NumericalError
from fedmpi.method import Context, Round
from fedmpi.methods.base import Setup
from fedmpi.ops.subspace import Dense, Fastfood
from fedmpi.spec import Spec
from fedmpi.tasks import models

Array = np.ndarray[Any, np.dtype[Any]]


def simulate(**changes: Any) -> Simulation:
    """Softmax regression on digits (650 parameters), five clients of different sizes, full batches."""
    values = {
        "data": {"name": "digits"},
        "model": {"name": "linear"},
        "clients": 5,
        "partition": {"name": "dirichlet", "alpha": 1.0},
        "rounds": 30,
        "local": {"lr": 0.2, "steps": 2},
        "method": {"name": "dense"},
        "evaluate_every": 1000,
        "seed": 7,
    }
    return Simulation(config.parse({**values, **changes}), solo())


class Softmax:
    """The engine's task in numpy: θ = (W row by row, then b) in float64."""

    def __init__(self, simulation: Simulation) -> None:
        data, clients = simulation.data.train, simulation.config.clients
        self.parts = [simulation.partition.of(k) for k in range(clients)]
        self.x = [data.x[i].reshape(len(i), -1).double().numpy() for i in self.parts]
        self.y = [np.eye(10)[data.y[i].numpy()] for i in self.parts]
        self.sizes = np.array([len(y) for y in self.y], np.float64)
        self.theta = simulation.topology.parameters().double().numpy()
        assert simulation.spec.names == ("out.weight", "out.bias")
        assert len(set(self.sizes)) == clients, "clients of equal size hide wrong weights"

    def gradient(self, theta: Array, k: int) -> Array:
        """The gradient of the mean cross entropy over client ``k``'s samples."""
        x, y = self.x[k], self.y[k]
        logits = x @ theta[:640].reshape(10, 64).T + theta[640:]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = (p - y) / len(x)
        return np.concatenate([(error.T @ x).ravel(), error.sum(0)])

    def accumulated(self, theta: Array, k: int, steps: int, lr: float) -> Array:
        """The sum of the gradients of ``steps`` local steps."""
        total = np.zeros_like(theta)
        for _ in range(steps):
            g = self.gradient(theta, k)
            theta = theta - lr * g
            total += g
        return total


def parameters(simulation: Simulation) -> Array:
    return simulation.topology.parameters().double().numpy()


def drawn(simulation: Simulation, t: int) -> list[int]:
    """The cohort of round t, sampled uniformly."""
    run = simulation.config
    chosen = random.sample(random.key(run.seed, t, -1, "cohort"), run.clients, run.cohort_size)
    return sorted(chosen.tolist())


def assert_close(got: Array, expected: Array, tolerance: float = 2e-5) -> None:
    """Within ``tolerance`` of the largest entry: float32 against float64 over all rounds."""
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


# --- (a) LBGM ---------------------------------------------------------------------------------------


class Lbgm:
    """Azam et al., Algorithm 1; with a sampled cohort its lines 15 to 17 become those of Algorithm 3."""

    def __init__(self, task: Softmax, delta: float, steps: int, eta: float) -> None:
        self.task, self.delta, self.steps, self.eta = task, delta, steps, eta
        self.theta = task.theta
        self.lbg_worker: dict[int, Array] = {}
        self.lbg_server: dict[int, Array] = {}
        self.closest = math.inf  # to the threshold

    def round(self, chosen: list[int]) -> list[bool]:
        """One global aggregation; returns s_k, True for a scalar, of each chosen worker."""
        messages: list[tuple[bool, Any]] = []
        for k in chosen:
            g = self.task.accumulated(self.theta, k, self.steps, self.eta)
            scalar = False
            if k in self.lbg_worker:
                lbg = self.lbg_worker[k]
                cosine = (g @ lbg) / (np.sqrt(g @ g) * np.sqrt(lbg @ lbg))
                sin2 = 1 - cosine**2
                self.closest = min(self.closest, abs(sin2 - self.delta))
                scalar = bool(sin2 <= self.delta)
            if scalar:
                messages.append((True, (g @ lbg) / (lbg @ lbg)))
            else:
                messages.append((False, g))
                self.lbg_worker[k] = g
        omega = self.task.sizes[chosen] / self.task.sizes[chosen].sum()
        update = np.zeros_like(self.theta)
        for k, weight, (scalar, mu) in zip(chosen, omega, messages, strict=True):
            if not scalar:
                self.lbg_server[k] = mu
            update += weight * (mu * self.lbg_server[k] if scalar else mu)
        self.theta = self.theta - self.eta * update
        return [scalar for scalar, _ in messages]


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(
    ("clients", "sampled", "steps", "delta"), [(5, None, 1, 0.013), (5, None, 2, 0.1), (8, 3, 2, 0.1)]
)
def test_lbgm_is_algorithm_1_and_3(clients, sampled, steps, delta, topology):
    method = {"name": "lookback", "threshold": delta}
    simulation = simulate(
        clients=clients,
        cohort=sampled,
        local={"lr": 0.2, "steps": steps},
        method=method,
        topology=topology,
    )
    reference = Lbgm(Softmax(simulation), delta, steps, 0.2)
    scalars = 0
    for t in range(30):
        chosen = drawn(simulation, t)
        before = simulation.clients.get(torch.arange(clients))["lookback"]
        line = simulation.round(t)
        after = simulation.clients.get(torch.arange(clients))["lookback"]
        decisions = reference.round(chosen)
        kept = [torch.equal(before[k], after[k]) for k in chosen]
        assert kept == decisions, f"round {t}"
        assert line["scalars"] == sum(decisions)
        scalars += sum(decisions)
        for k, lbg in reference.lbg_worker.items():
            assert_close(after[k].double().numpy(), lbg)
        assert_close(parameters(simulation), reference.theta)
    assert reference.closest > 1e-4, "a decision that rounding could turn: choose another seed"
    messages = 30 * (sampled or clients)
    assert 0.2 * messages < scalars < 0.9 * messages, "both kinds of message are needed"
    assert simulation.upload_bytes == messages * 1 + scalars * 4 + (messages - scalars) * 4 * 650


def test_lbgm_with_threshold_0_is_fedavg():
    """Every message is sent in full, and the bits are those of dense."""
    lookback, dense = simulate(method={"name": "lookback", "threshold": 0.0}), simulate()
    for t in range(5):
        assert lookback.round(t)["scalars"] == 0
        dense.round(t)
    assert torch.equal(lookback.topology.parameters(), dense.topology.parameters())


def test_lbgm_sends_zero_gradients_in_full_and_negative_coefficients():
    method = methods.build({"name": "lookback", "threshold": 0.5}, Spec(("w",), ((4,),)), Setup())
    ctx, peer = context(0, 3), {"lookback": torch.zeros(3, 4)}
    first = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [1, 1, 1, 1]])
    second = torch.tensor([[-2.0, -4, -6, -8], [1, 0, 0, 0], [0, 0, 0, 0]])
    message, state = method.up.compress(first, {"lookback": torch.zeros(3, 4)}, ctx)
    assert message.arrays["scalar"].tolist() == [0, 0, 0]
    _, peer = method.up.decompress(message, peer, ctx)
    message, state = method.up.compress(second, state, context(1, 3))
    assert message.arrays["scalar"].tolist() == [1, 0, 0]
    assert message.arrays["rho"].tolist() == [-2]
    decoded, peer = method.up.decompress(message, peer, context(1, 3))
    assert torch.equal(decoded, second)
    assert torch.equal(peer["lookback"], torch.tensor([[1.0, 2, 3, 4], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert torch.equal(state["lookback"], peer["lookback"])


# --- (b) majority vote ------------------------------------------------------------------------------


def context(t: int, clients: int, seed: int = 5) -> Context:
    ids = 3 * torch.arange(clients) + 1
    return Context(Round(seed, t, lr=0.25), ids, torch.ones_like(ids))


def plain_vote(gradients: list[list[float]], ids: list[int], seed: int, t: int) -> list[int]:
    """What a majority vote is: sign(0) is a coin of the client's key, a tie one of the round's."""
    size = len(gradients[0])
    votes = [0] * size
    for client, row in zip(ids, gradients, strict=True):
        coins = random.coins(random.key(seed, t, client, "sign of zero"), size).tolist()
        for i, value in enumerate(row):
            votes[i] += 1 if value > 0 or (value == 0 and coins[i]) else -1
    tie = random.coins(random.key(seed, t, -1, "tie"), size).tolist()
    return [1 if vote > 0 or (vote == 0 and tie[i]) else -1 for i, vote in enumerate(votes)]


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 8, 127, 128, 200])
def test_majority_vote_with_ties_and_zeros(clients):
    size = 211
    method = methods.build("signsgd", Spec(("w",), ((size,),)), Setup())
    theta = random.normal(random.key(0), size)
    state = method.server.init(theta)
    ties = zeros = 0
    for t in range(3):
        ctx = context(t, clients)
        keys = random.keys(9, t, torch.arange(clients), "gradients")
        g_CD = (random.integers(keys, size, 3) - 1).float() * random.uniform(keys, size).add(0.5)
        g_CD[:, 0], g_CD[:, 1], g_CD[:, 2], g_CD[0, 3] = 1, -1, 0, -0.0  # all voices alike: no overflow
        message, _ = method.up.compress(g_CD, {}, ctx)
        assert message.nbytes().tolist() == [27] * clients
        votes_CD, _ = method.up.decompress(message, {}, ctx)
        total = Sum(size, integer=True, exact=False, terms=clients)
        for rows in torch.arange(clients).split(3):
            total.add(votes_CD[rows], torch.ones(len(rows)).double())
        assert total.value()[:2].tolist() == [clients, -clients]
        ties += int((total.value() == 0).sum())
        zeros += int((g_CD == 0).sum())
        expected = plain_vote(g_CD.tolist(), ctx.clients_C.tolist(), 5, t)
        before = state["theta"]
        state = method.server.finish(state, total.value(), ctx.round)
        assert torch.equal(state["theta"], before - 0.25 * torch.tensor(expected, dtype=torch.float32))
    assert zeros > 0
    assert (ties > 0) == (clients % 2 == 0)


@pytest.mark.parametrize("clients", [4, 5])
@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
def test_majority_vote_through_the_engine(clients, topology):
    """One client, one vote, whatever its samples; the coins are those of the round."""
    simulation = simulate(clients=clients, method="signsgd", server={"lr": 0.01}, topology=topology)
    theta = parameters(simulation)
    ids = torch.arange(clients)
    for t in range(4):
        update = simulation.trainer.train(
            simulation.topology.parameters(), simulation.data.train, simulation.partition, ids, t
        )
        theta = theta - 0.01 * np.array(plain_vote(update.g_CD.tolist(), ids.tolist(), 7, t))
        simulation.round(t)
        assert_close(parameters(simulation), theta, 1e-6)


# --- (c) top-k with error feedback ------------------------------------------------------------------


@pytest.mark.parametrize("local_steps", [1, 2])
def test_top_k_with_error_feedback_through_the_engine(local_steps):
    simulation = simulate(
        method={"name": "topk", "k": 30, "feedback": True}, local={"lr": 0.2, "steps": local_steps}
    )
    train = simulation.data.train  # some pixels are white in all digits: noise, or their gradients tie
    noise = random.normal(random.key(1, stream="noise"), train.x.numel()).view(train.x.shape)
    simulation.data = simulation.data._replace(train=train._replace(x=train.x + 0.1 * noise))
    task = Softmax(simulation)
    theta, residual = task.theta, np.zeros((5, 650))
    omega = task.sizes / task.sizes.sum()
    closest = math.inf
    for t in range(20):
        mean = np.zeros(650)
        for k in range(5):
            p = residual[k] + task.accumulated(theta, k, local_steps, 0.2)
            order = np.argsort(-np.abs(p), kind="stable")
            closest = min(closest, np.abs(p[order[29]]) / np.abs(p[order[30]]) - 1)
            sent = np.zeros(650)
            sent[order[:30]] = p[order[:30]]
            residual[k] = p - sent
            mean += omega[k] * sent
        theta = theta - 0.2 * mean
        simulation.round(t)
        assert_close(parameters(simulation), theta)
        assert_close(simulation.clients.get(torch.arange(5))["residual"].double().numpy(), residual)
    assert closest > 5e-5, "a choice that rounding could turn: choose another seed"
    assert simulation.upload_bytes == 20 * 5 * (30 * 4 + math.ceil(30 * 10 / 8))


def test_top_k_with_error_feedback_to_the_bit():
    """20 rounds of gradients full of ties, in float32 as the codec does it, residuals and messages compared."""
    size, k, clients = 90, 7, 4
    method = methods.build({"name": "topk", "k": k, "feedback": True}, Spec(("w",), ((size,),)), Setup())
    state = {name: torch.stack([value] * clients) for name, value in method.up.init().items()}
    residual = np.zeros((clients, size), np.float32)
    for t in range(20):
        keys = random.keys(2, t, torch.arange(clients), "gradients")
        g_CD = (random.integers(keys, size, 9) - 4).float() / 4
        message, state = method.up.compress(g_CD, state, context(t, clients))
        decoded, _ = method.up.decompress(message, {}, context(t, clients))
        for c in range(clients):
            p = g_CD[c].numpy() + residual[c]
            chosen = np.argsort(-np.abs(p), kind="stable")[:k]
            sent = np.zeros(size, np.float32)
            sent[chosen] = p[chosen]
            residual[c] = p - sent
            assert np.array_equal(decoded[c].numpy(), sent)
        assert np.array_equal(state["residual"].numpy(), residual)


# --- (d) intrinsic ----------------------------------------------------------------------------------


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
        assert_close(simulation.topology.state["sigma"].double().numpy(), sigma)
        assert_close(parameters(simulation), task.theta + A @ sigma)
    assert simulation.upload_bytes == simulation.download_bytes == 20 * 5 * 4 * dim


# --- (e) plain SGD ----------------------------------------------------------------------------------


def alone(model: str, **local: Any) -> tuple[Simulation, torch.nn.Module]:
    """One client with all data, and the same model beside it."""
    simulation = simulate(model={"name": model}, clients=1, partition="iid", local=local, seed=3)
    key = random.key(3, stream="model")
    return simulation, models.build(model, simulation.data.shape, 10, key)


def reference_steps(
    simulation: Simulation, module: torch.nn.Module, optimizer: torch.optim.Optimizer, t: int, steps: int
) -> None:
    """``steps`` of a plain loop over the client's batches of round ``t``."""
    data, batch = simulation.data.train, simulation.config.local.batch
    index = simulation.partition.of(0)
    if batch:
        index = index[random.permutation(random.key(3, t, 0, "batches 0"), len(index))]
    for step in range(steps):
        chosen = index[step * batch : (step + 1) * batch] if batch else index
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(data.x[chosen]), data.y[chosen]).backward()
        optimizer.step()


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("model", ["linear", "fcn", "cnn"])
@pytest.mark.parametrize("local", [{"batch": 32}, {"batch": 31, "weight_decay": 0.01}, {}])
def test_one_client_one_step_is_torch_sgd_to_the_bit(model, local, topology):
    if model == "cnn" and not local:
        local = {"batch": 128}  # all of digits through a CNN takes seconds
    simulation, module = alone(model, lr=0.1, steps=1, **local)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=local.get("weight_decay", 0))
    for t in range(6):
        simulation.round(t)
        reference_steps(simulation, module, optimizer, t, 1)
        got = simulation.spec.views(simulation.topology.parameters())
        for name, parameter in module.named_parameters():
            assert torch.equal(got[name], parameter), f"{name}, round {t}"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("batch", [None, 50])
def test_one_client_many_steps_is_torch_sgd(momentum, weight_decay, batch):
    """rtol 10^-6; a client's momentum starts afresh in each round."""
    simulation, module = alone(
        "fcn", lr=0.1, steps=4, batch=batch, momentum=momentum, weight_decay=weight_decay
    )
    for t in range(3):
        simulation.round(t)
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)
        reference_steps(simulation, module, optimizer, t, 4)
        flat = simulation.spec.flatten(dict(module.named_parameters()))
        torch.testing.assert_close(simulation.topology.parameters(), flat, rtol=1e-6, atol=1e-7)


def test_epochs_visit_every_sample_once_each():
    """Two local epochs of ragged batches, against torch."""
    simulation, module = alone("linear", lr=0.1, epochs=2, batch=100)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    index, visited = simulation.partition.of(0), []
    for epoch in range(2):
        order = index[random.permutation(random.key(3, 0, 0, f"batches {epoch}"), len(index))]
        for chosen in order.split(100):
            visited += chosen.tolist()
            optimizer.zero_grad()
            data = simulation.data.train
            torch.nn.functional.cross_entropy(module(data.x[chosen]), data.y[chosen]).backward()
            optimizer.step()
    assert sorted(visited) == sorted([*range(1437), *range(1437)])
    simulation.round(0)
    flat = simulation.spec.flatten(dict(module.named_parameters()))
    torch.testing.assert_close(simulation.topology.parameters(), flat, rtol=1e-5, atol=1e-6)


# --- (f) federated averaging ------------------------------------------------------------------------


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize(("sampled", "server_lr"), [(None, None), (3, None), (0.4, 0.5)])
def test_fedavg_weighs_by_samples(sampled, server_lr, reproducible):
    """θ ← Σ n_k/N θ_k over the cohort; with another server rate, that part of the way."""
    simulation = simulate(
        cohort=sampled,
        local={"lr": 0.2, "steps": 3},
        server={"lr": server_lr} if server_lr else {},
        reproducible=reproducible,
    )
    task, cohorts = Softmax(simulation), set()
    theta = task.theta
    for t in range(6):
        chosen = drawn(simulation, t)
        cohorts.add(tuple(chosen))
        locals_ = [theta - 0.2 * task.accumulated(theta, k, 3, 0.2) for k in chosen]
        average = np.average(locals_, axis=0, weights=task.sizes[chosen])
        theta = theta + (server_lr or 0.2) / 0.2 * (average - theta)
        losses = simulation.round(t)
        assert losses["clients"] == len(chosen) == {None: 5, 3: 3, 0.4: 2}[sampled]
        assert_close(parameters(simulation), theta)
    assert len(cohorts) == 1 if sampled is None else len(cohorts) > 1


def test_fedsgd_is_the_gradient_of_the_pooled_data():
    """One full-batch step each: Σ n_k/N ∇f_k = ∇f, so five clients walk as one."""
    five = simulate(local={"lr": 0.2, "steps": 1})
    one = simulate(clients=1, partition="iid", local={"lr": 0.2, "steps": 1})
    for t in range(5):
        assert five.round(t)["loss"] == pytest.approx(one.round(t)["loss"], rel=1e-5)
        assert_close(parameters(five), parameters(one))


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
@pytest.mark.parametrize("method", [{"name": "dense"}, {"name": "intrinsic", "dim": 24}], ids=str)
def test_server_optimizers_are_the_papers(optimizer, method):
    """Reddi et al. 2021, Algorithm 2, on what the method sums, for 15 rounds."""
    beta1, beta2, tau, eta = 0.8, 0.95, 0.01, 0.05
    rule = {"optimizer": optimizer, "beta1": beta1, "beta2": beta2, "epsilon": tau, "lr": eta}
    simulation = simulate(method=method, server=rule)
    task = Softmax(simulation)
    subspace = method["name"] == "intrinsic"
    A = explicit_matrix("fastfood", 650, 24, simulation.config.seed) if subspace else np.eye(650)
    omega = task.sizes / task.sizes.sum()
    x, m, v = (np.full(A.shape[1], value) for value in (0, 0, tau**2))
    for t in range(15):
        theta = task.theta + A @ x
        delta = -sum(omega[k] * (A.T @ task.accumulated(theta, k, 2, 0.2)) for k in range(5))
        if optimizer == "momentum":
            m = beta1 * m + delta
            x = x + eta * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            if optimizer == "adam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            x = x + eta * m / (np.sqrt(v) + tau)
        simulation.round(t)
        assert_close(parameters(simulation), task.theta + A @ x, 1e-4)


def test_test_loss_of_a_diverged_model():
    """A large loss is shown as it is, not wrapped around in fixed point."""
    simulation = simulate()
    theta = simulation.topology.parameters() * 1e6
    simulation.topology.state["theta"] = theta
    W, b = theta[:640].view(10, 64).double(), theta[640:].double()
    test = simulation.data.test
    logits = test.x.flatten(1).double() @ W.T + b
    expected = float(torch.nn.functional.cross_entropy(logits, test.y))
    accuracy, loss = simulation.trainer.evaluate(theta, test, 1000, solo())
    assert accuracy == pytest.approx(float((logits.argmax(1) == test.y).double().mean()), abs=0.01)
    assert expected * len(test.y) > 2**23, "not beyond the fixed point: a test of nothing"
    assert loss == pytest.approx(expected, rel=1e-4)


def test_training_loss_of_a_diverged_model():
    """The clients' mean loss by samples, or an error, never a wrapped number."""
    simulation = simulate(local={"lr": 0.2, "steps": 1})
    simulation.topology.state["theta"] = simulation.topology.parameters() * 1e8
    theta, data = simulation.topology.parameters().double(), simulation.data.train
    chosen = torch.cat([simulation.partition.of(k) for k in range(5)])
    logits = data.x[chosen].flatten(1).double() @ theta[:640].view(10, 64).T + theta[640:]
    first = float(torch.nn.functional.cross_entropy(logits, data.y[chosen]))
    assert first > 2**23, "not beyond the fixed point: a test of nothing"
    try:
        loss = simulation.round(0)["loss"]
    except NumericalError:
        return
    assert loss == pytest.approx(first, rel=1e-4)


# --- (g) sums ---------------------------------------------------------------------------------------

values32 = st.floats(-1000, 1000, width=32)


def exact(terms: int, size: int = 3) -> Sum:
    return Sum(size, integer=False, exact=True, terms=terms)


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[list[list[int]]]]:
    """Terms, their weights, and a way to add them up: ranks of chunks of terms."""
    count = draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(values32, min_size=3, max_size=3), min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    ranks: list[list[list[int]]] = [[] for _ in range(draw(st.integers(1, 4)))]
    while order:
        size = draw(st.integers(1, len(order)))
        ranks[draw(st.integers(0, len(ranks) - 1))].append(list(order[:size]))
        order = order[size:]
    return rows, weights, ranks


@given(splits())
@settings(deadline=None, max_examples=150)
def test_exact_sum_has_the_same_bits_in_any_order(case):
    rows, weights, ranks = case
    v_CS, w_C = torch.tensor(rows, dtype=torch.float32), torch.tensor(weights, dtype=torch.float64)
    whole = exact(len(rows))
    whole.add(v_CS, w_C)
    shares = []
    for chunks in ranks:
        share = exact(len(rows))
        for chunk in chunks:
            share.add(v_CS[chunk], w_C[chunk])
        shares.append(share)
    for other in shares[1:]:
        shares[0].total_S += other.total_S
    assert torch.equal(shares[0].value(), whole.value())
    assert whole.value().dtype == torch.float32
    for column in range(3):
        true = math.fsum(row[column] * weight for row, weight in zip(rows, weights, strict=True))
        bound = len(rows) * 2.0**-41 + abs(true) * 2.0**-23
        assert abs(float(whole.value()[column]) - true) <= bound


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("integer", [False, True])
def test_sum_over_ranks(ranks, integer):
    """Equal bits on every rank and at every number of ranks."""
    clients, size = 40, 50
    v_CS = random.normal(random.keys(0, 0, torch.arange(clients), "v"), size)
    v_CS = v_CS.sign().to(torch.int8) if integer else v_CS
    w_C = random.uniform(random.key(1), clients).double() / clients

    def main(comm):
        total = Sum(size, integer=integer, exact=True, terms=clients)
        total.add(v_CS[comm.rank :: comm.size], w_C[comm.rank :: comm.size])
        total.over(comm)
        return total.value()

    sums = run_ranks(ranks, main)
    true = v_CS.long().sum(0) if integer else (v_CS.double() * w_C[:, None]).sum(0)
    alone = run_ranks(1, main)[0]
    assert all(torch.equal(value, alone) for value in sums)
    torch.testing.assert_close(alone.double(), true.double(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("terms", "dtype"), [(1, torch.int8), (127, torch.int8), (128, torch.int16), (2**15, torch.int32)]
)
def test_votes_are_counted_in_the_smallest_type_that_fits(terms, dtype):
    total = Sum(2, integer=True, exact=False, terms=terms)
    assert total.total_S.dtype == dtype
    total.add(torch.tensor([[1, -1]], dtype=torch.int8).expand(terms, 2), torch.ones(terms).double())
    assert total.value().tolist() == [terms, -terms]


@pytest.mark.parametrize("value", [2.0**23, -(2.0**23), 1e30, -1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 2])
def test_exact_sum_refuses_what_does_not_fit(value, place):
    row = torch.zeros(1, 3)
    row[0, place] = value
    with pytest.raises(NumericalError):
        exact(1).add(row, torch.ones(1).double())


@pytest.mark.parametrize("value", [2.0**22, -(2.0**22), 2.0**21])
def test_exact_sum_never_wraps(value):
    """Many terms that fit one by one: the true sum, or an error."""
    total = exact(9)
    try:
        for _ in range(9):
            total.add(torch.tensor([[value, 0.0, -value]]), torch.ones(1).double())
    except NumericalError:
        return
    assert total.value().tolist() == [9 * value, 0, -9 * value]


def test_a_sum_of_weights_one_takes_values_up_to_its_bound():
    """A mean of large values is representable, so it is no error."""
    total = exact(5)
    total.add(torch.full((5, 3), 2.0**21), torch.full((5,), 0.2, dtype=torch.float64))
    assert total.value().tolist() == pytest.approx([2.0**21] * 3)
