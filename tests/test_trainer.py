"""Clients trained at once, or as one batch, compute what they compute one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmpi import config, plan, random
from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.engine.batches import Batches, padded
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.trainer import Trainer, Update
from fedmpi.errors import FedMPIError, NumericalError
from fedmpi.local import Local
from fedmpi.methods import METHODS
from fedmpi.tasks import models
from fedmpi.tasks.data import Data, Split
from fedmpi.tasks.dataset import IGNORE
from fedmpi.tasks.metrics import measures
from fedmpi.tasks.objectives import OBJECTIVES
from fedmpi.tasks.partitions import Partition

from .conftest import SMALL
from .softmax import simulate

SIZES = (9, 4, 1, 7, 9, 12, 3)
IDS = torch.arange(len(SIZES))


def partition(sizes: tuple[int, ...] = SIZES) -> Partition:
    offset = torch.tensor([0, *sizes]).cumsum(0)
    return Partition(random.permutation(5, int(offset[-1])), offset)


def images(samples: int, shape: tuple[int, ...] = (1, 8, 8)) -> Split:
    x = random.normal(random.key(1, stream="x"), samples * shape[-1] ** 2).view(samples, *shape)
    return Split(x, random.integers(random.key(2, stream="y"), samples, 10))


def trainer(name: str = "fcn", loss: str = "cross_entropy", **options: Any) -> Trainer:
    torch.set_num_threads(1)
    extra = {"hidden": 16} if name == "fcn" else {}
    model = models.build(name, (1, 8, 8), 10, random.key(0, stream="model"), **extra)
    together = options.pop("together", True)
    local = Local.model_validate({"lr": 0.1, **options})
    made = Trainer(model, plan.make(plan.Tensors.of(model)), OBJECTIVES[loss], local, seed=3)
    made.together = together
    return made


def theta(of: Trainer) -> torch.Tensor:
    return 0.1 * random.normal(random.key(4, stream="theta"), of.spec.size)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    batch=st.none() | st.integers(1, 12),
    steps=st.integers(1, 9),
    round=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_batches_are_those_of_each_client(
    sizes: list[int], batch: int | None, steps: int, round: int
) -> None:
    one, parts = trainer("linear", batch=batch), partition(tuple(sizes))
    ids = torch.arange(len(sizes))
    batches = Batches(3, parts, ids, round, batch)
    taken = [batches.step(step, len(ids)) for step in range(steps)]
    for client, size in enumerate(sizes):
        for step in range(steps):
            index = parts.of(client)
            expected = one._orders.batch(index, min(batch or size, size), client, round, step)
            count = int(taken[step].count_C[client])
            assert torch.equal(taken[step].index_CB[client, :count], expected)
            assert set(taken[step].index_CB[client].tolist()) <= set(index.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"epochs": 2, "batch": 4},
        {"steps": 5, "batch": 4, "momentum": 0.9, "weight_decay": 0.1},
        {"epochs": 1, "batch": 3, "frozen": True},
    ],
)
@pytest.mark.parametrize("model", ["linear", "fcn"])
def test_at_once_is_one_after_the_other(model: str, options: dict[str, Any]) -> None:
    frozen = options.pop("frozen", False) if (options := dict(options)) else False
    many, single = trainer(model, **options), trainer(model, together=False, **options)
    data, start = images(sum(SIZES)), theta(many)
    mask = random.coins(7, many.spec.size) if frozen else None
    calls: list[int] = []
    stacked = many._stacked
    assert stacked is not None
    many._stacked = _Counted(stacked, calls)  # type: ignore[assignment]
    got = many.train(start, data, partition(), IDS, 2, mask)
    assert calls  # it was trained so
    expected = single.train(start, data, partition(), IDS, 2, mask)
    assert torch.equal(got.steps_C, expected.steps_C)
    torch.testing.assert_close(got.g_CD, expected.g_CD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss_C, expected.loss_C, rtol=1e-5, atol=1e-6)
    assert mask is None or not got.g_CD[:, mask].any()


class _Counted:
    def __init__(self, stacked: Any, calls: list[int]) -> None:
        self.worth, self._stacked, self._calls = stacked.worth, stacked, calls

    def __call__(self, theta_CD: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        self._calls.append(len(theta_CD))
        loss_C: torch.Tensor = self._stacked(theta_CD, *rest)
        return loss_C


@pytest.mark.parametrize("epochs", [1, 3])
def test_shuffled_at_once_or_one_by_one(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def updates() -> Update:
        one, data = trainer(together=False, epochs=epochs, batch=4), images(sum(SIZES))
        return one.train(theta(one), data, partition(), IDS, round=2)

    shuffled = updates()
    monkeypatch.setattr("fedmpi.engine.batches._ORDERED", 0)
    assert all(torch.equal(a, b) for a, b in zip(shuffled[:3], updates()[:3], strict=True))


def test_a_loss_that_leaves_no_sample_out_takes_equal_clients_only() -> None:
    many, single = (trainer("linear", "squared_hinge", steps=2, together=on) for on in (True, False))
    data, start = images(sum(SIZES)), theta(many)
    unequal = (t.train(start, data, partition(), IDS, 0).g_CD for t in (many, single))
    assert torch.equal(*unequal)  # to the bit: one after the other
    equal = partition((6,) * 7)
    got, expected = (t.train(start, data, equal, IDS, 0).g_CD for t in (many, single))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class _Branches(nn.Module):
    """What it does depends on the sample, which cannot be mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.flatten(1))
        return -out if float(x.sum()) > 0 else out


@pytest.mark.parametrize("model", ["cnn", "wide", "branches"])
def test_other_models_train_one_after_the_other(model: str) -> None:
    """Convolutions, steps with much to compute, and what cannot be mapped: to the bit the same."""

    def build(together: bool) -> Trainer:
        if model == "cnn":
            return trainer("cnn", steps=1, together=together)
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 10))
        module = wide if model == "wide" else _Branches()
        local = Local(lr=0.1, steps=1)
        made = Trainer(module, plan.make(plan.Tensors.of(module)), OBJECTIVES["cross_entropy"], local, seed=3)
        made.together = together
        return made

    many, single = build(True), build(False)
    data, start = images(sum(SIZES)), theta(many)
    got, expected = (t.train(start, data, partition(), IDS, 0).g_CD for t in (many, single))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("model", "loss"), [("linear", "cross_entropy"), ("cnn", "cross_entropy"), ("linear", "squared_hinge")]
)
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("samples", [1, 10, 1000])
def test_one_batch_for_all_is_their_weighted_sum(
    model: str, loss: str, batch: int | None, samples: int
) -> None:
    pools = trainer(model, loss, batch=batch, weight_decay=0.1)
    data, start = images(sum(SIZES)), theta(pools)
    mask = random.coins(7, pools.spec.size)
    weights = torch.linspace(0.1, 0.7, len(SIZES), dtype=torch.float64)
    assert pools.pools
    g_D, loss_C = pools.pool(start, data, partition(), IDS, weights, 1, mask, samples)
    single = trainer(model, loss, batch=batch, weight_decay=0.1, together=False)
    expected = single.train(start, data, partition(), IDS, 1, mask)
    torch.testing.assert_close(g_D, weights.float() @ expected.g_CD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss_C, expected.loss_C, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"steps": 2}, {"epochs": 1}, {"accumulate": 2}])
def test_several_steps_are_no_pool(options: dict[str, int]) -> None:
    assert not trainer(**options).pools


def additive() -> list[str]:
    """Names of the shipped methods whose messages are made as one."""
    names = []
    for name in METHODS:
        simulation = Simulation(config.parse(run(name)), solo())
        if simulation.passes.fuses:
            names.append(name)
    return names


def run(name: str, **changes: Any) -> dict[str, Any]:
    method = {"name": name, **METHODS[name].example}
    return {**SMALL, "clients": 9, "cohort": 6, "rounds": 3, "method": method, **changes}


@pytest.mark.parametrize("local", [{"lr": 0.1}, {"lr": 0.1, "epochs": 1, "batch": 16}])
@pytest.mark.parametrize("name", additive())
def test_one_message_for_all_counts_as_one_of_each(name: str, local: dict[str, Any]) -> None:
    one, each = (Simulation(config.parse(run(name, local=local)), solo()) for _ in range(2))
    sent: list[int] = []
    each.passes.observe = lambda message: sent.append(message.message.clients)
    assert one.passes.fuses
    assert not each.passes.fuses
    encoded: list[int] = []
    compress = one.method.up.compress

    def spy(g_CD: torch.Tensor, *rest: Any) -> Any:
        encoded.append(len(g_CD))
        return compress(g_CD, *rest)

    one.method.up.compress = spy  # type: ignore[method-assign]
    lines = [(one.round(t), each.round(t)) for t in range(3)]
    assert encoded == [1, 1, 1]
    assert sum(sent) == 18
    for got, expected in lines:
        for key in ("upload_bytes", "download_bytes", "clients"):
            assert got[key] == expected[key]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert torch.equal(one.ledger.upload, each.ledger.upload)
    parameters = (s.replica.parameters() for s in (one, each))
    torch.testing.assert_close(*parameters, rtol=1e-4, atol=1e-5)


def test_what_asks_for_single_clients_is_not_fused() -> None:
    assert {"dense", "intrinsic"} <= set(additive())
    for changes in ({"reproducible": True}, {"clip": {"norm": 1.0}}, {"on_bad_update": "reject"}):
        assert not Simulation(config.parse(run("dense", **changes)), solo()).passes.fuses
    for changes in ({"topology": "aggregator"}, {"method": {"name": "topk", "k": 9}}):
        assert not Simulation(config.parse(run("dense", **changes)), solo()).passes.fuses


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_pool_that_is_no_number_names_the_client(value: float) -> None:
    simulation = Simulation(config.parse(run("dense", local={"lr": 0.1})), solo())
    assert simulation.passes.pools
    bad = int(simulation.call(0).clients[2])
    x = simulation.data.train.x.clone()
    x[simulation.partition.of(bad)] = value
    simulation.data = simulation.data._replace(train=simulation.data.train._replace(x=x))
    with pytest.raises(NumericalError, match=f"client {bad}, round 0"):
        simulation.round(0)


def test_a_pool_that_only_together_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client's own gradient is finite, and their sum's rounding is to blame: nobody is accused."""
    simulation = Simulation(config.parse(run("dense", local={"lr": 0.1})), solo())
    assert simulation.passes.pools
    pool = simulation.trainer.pool

    def rounded(*positional: Any) -> tuple[torch.Tensor, torch.Tensor]:
        g_D, loss_C = pool(*positional)
        return g_D.fill_(torch.inf), loss_C

    monkeypatch.setattr(simulation.trainer, "pool", rounded)
    with pytest.raises(NumericalError, match="round 0: the sum of the clients' gradients is not finite"):
        simulation.round(0)


def test_a_servers_own_gradient_that_is_no_number_ends_all_ranks() -> None:
    method = {"name": "prune", "keep": 0.3, "mask_from": "auxiliary", "inner": {"name": "topk", "ratio": 0.1}}

    def main(comm: Comm) -> str:
        simulation = Simulation(config.parse(SMALL | {"method": method}), comm)
        x = torch.full_like(simulation.data.train.x, torch.nan)
        simulation.data = simulation.data._replace(train=simulation.data.train._replace(x=x))
        with pytest.raises(FedMPIError) as caught:
            simulation.round(0)
        return str(caught.value)

    own, other = run_ranks(2, main, timeout=30)
    assert own == "server: its own gradient is not finite; try a smaller local.lr than 0.1"
    assert own in other


def test_few_heights() -> None:
    assert [padded(n) for n in (1, 2, 3, 5, 8, 9, 10, 11, 60, 100, 1000)] == [
        1, 2, 3, 5, 8, 10, 10, 12, 64, 112, 1024,
    ]  # fmt: skip
    assert all(n <= padded(n) <= 1.25 * n for n in range(1, 3000))


@pytest.mark.parametrize(
    ("rounds", "changes", "together"),
    [(199, {}, False), (200, {}, True), (50, {"steps": 4}, True), (500, {"reproducible": True}, False)],
)
def test_short_and_reproducible_runs_train_one_after_the_other(
    rounds: int, changes: dict[str, Any], together: bool
) -> None:
    rest = dict(changes)
    local = {"lr": 0.1, "steps": rest.pop("steps", 1)}
    simulation = Simulation(config.parse(run("topk") | {"rounds": rounds, "local": local, **rest}), solo())
    assert simulation.trainer.together == together


def test_test_loss_of_a_diverged_model():
    """A large loss is shown as it is, not wrapped around in fixed point."""
    simulation = simulate()
    theta = simulation.replica.parameters() * 1e6
    simulation.replica.state["theta"] = theta
    W, b = theta[:640].view(10, 64).double(), theta[640:].double()
    test = simulation.data.test
    logits = test.x.flatten(1).double() @ W.T + b
    expected = float(torch.nn.functional.cross_entropy(logits, test.y))
    found = simulation.trainer.evaluate(simulation.measured, theta, test, 1000, solo())
    loss = found["test_loss"]
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == test.y).double().mean()), abs=0.01)
    assert expected * len(test.y) > 2**23, "not beyond the fixed point: a test of nothing"
    assert loss == pytest.approx(expected, rel=1e-4)


def test_training_loss_of_a_diverged_model():
    """The clients' mean loss by samples, or an error, never a wrapped number."""
    simulation = simulate(local={"lr": 0.2, "steps": 1})
    simulation.replica.state["theta"] = simulation.replica.parameters() * 1e8
    theta, data = simulation.replica.parameters().double(), simulation.data.train
    chosen = torch.cat([simulation.partition.of(k) for k in range(5)])
    logits = data.x[chosen].flatten(1).double() @ theta[:640].view(10, 64).T + theta[640:]
    first = float(torch.nn.functional.cross_entropy(logits, data.y[chosen]))
    assert first > 2**23, "not beyond the fixed point: a test of nothing"
    try:
        loss = simulation.round(0)["loss"]
    except NumericalError:
        return
    assert loss == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_hinge"])
@pytest.mark.parametrize("together", [False, True])
def test_targets_that_are_ignored_count_nowhere(loss: str, together: bool) -> None:
    """Neither in a client's loss and accuracy nor in the parts of a step: all is as without these samples."""
    data, ids = images(24), torch.arange(2)
    data.y[[3, 4, 5, 13, 22]] = IGNORE
    counts = data.y != IGNORE
    index = torch.arange(24)
    left = Partition(index, torch.tensor([0, 12, 24]))
    kept = Partition(index[counts], torch.tensor([0, 9, 19]))
    whole, measured = (
        trainer(loss=loss, together=together),
        measures(OBJECTIVES[loss], Data("", data, data, 10)),
    )
    start = theta(whole)
    got, expected = whole.train(start, data, left, ids, 0), whole.train(start, data, kept, ids, 0)
    torch.testing.assert_close(got.g_CD, expected.g_CD)
    torch.testing.assert_close(got.loss_C, expected.loss_C)
    parts = trainer(loss=loss, accumulate=3).train(start, data, left, ids, 0)
    torch.testing.assert_close(parts.g_CD, expected.g_CD)
    torch.testing.assert_close(parts.loss_C, expected.loss_C)
    test = Split(data.x[counts], data.y[counts])
    assert whole.evaluate(measured, start, data, 5, solo()) == pytest.approx(
        whole.evaluate(measured, start, test, 5, solo()), rel=1e-6
    )
    # Steps of several samples weigh in a client's loss by what counts in them; one may have nothing.
    steps = trainer(loss=loss, together=together, batch=3, epochs=1, lr=1e-9)
    several = steps.train(start, data, left, ids, 0)
    torch.testing.assert_close(several.loss_C, expected.loss_C, rtol=1e-5, atol=1e-5)
    assert bool(several.g_CD.isfinite().all())
    nothing = Split(data.x, torch.full_like(data.y, IGNORE))
    assert whole.train(start, nothing, left, ids, 0).loss_C.tolist() == [0, 0]
