"""``mode: data_parallel``: one client a rank, one step a round or local updates, messages exchanged among peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fedmpi
from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.config import parse
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.engine.summary import summary
from fedmpi.errors import ConfigError
from fedmpi.local import Schedule
from fedmpi.methods import METHODS

PLAIN: dict[str, Any] = {
    "mode": "data_parallel",
    "data": {"name": "digits"},
    "model": {"name": "linear"},
    "rounds": 6,
    "local": {"lr": 0.1},
    "method": "dense",
    "evaluate_every": 6,
    "seed": 3,
}


def finish(values: dict[str, Any], ranks: int) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Every rank's parameters and summary."""

    def one(comm: Comm) -> tuple[torch.Tensor, dict[str, Any]]:
        config = parse(values).for_ranks(comm.size)
        simulation = Simulation(config, comm)
        for t in range(config.rounds):
            simulation.round(t)
        return simulation.replica.parameters(), summary(simulation)

    return run_ranks(ranks, one)


@pytest.mark.parametrize("name", METHODS)
def test_three_ranks_are_three_federated_clients_of_one_step(name: str) -> None:
    """Digits' 1437 training samples are 3 · 479: equal shares. The same shards, whole batches: the same model."""
    method = {"name": name, **METHODS[name].example}
    server = {"lr": 0.003} if name == "signsgd" else {}
    parallel = finish({**PLAIN, "method": method, "server": server}, 3)
    federated = {**PLAIN, "mode": "federated", "clients": 3, "method": method, "server": server}
    ((expected, whole),) = finish(federated, 1)
    for theta, found in parallel:
        assert torch.equal(theta, parallel[0][0]), "replicas stay equal to the bit"
        # These are rounded again on their way back; blockwise to 1/127 of a block's largest.
        loose = {"fp16": 2e-3, "bf16": 2e-3, "blockwise": 1 / 127}.get(name, 1e-6)
        assert torch.allclose(theta, expected, rtol=0, atol=loose * float(expected.abs().max()))
        assert found["upload_bytes"] == whole["upload_bytes"]
        assert found["clients"] == 3


def test_momentum_schedule_and_accumulation_are_those_of_torch() -> None:
    """Against a bare loop with torch.optim.SGD and CosineAnnealingLR over the union of the ranks' batches."""
    values = {
        **PLAIN,
        "rounds": 10,
        "local": {"lr": 0.2, "accumulate": 3, "weight_decay": 0.01},
        "server": {"optimizer": "momentum", "beta1": 0.9, "schedule": {"name": "cosine"}},
    }
    simulation = Simulation(parse({**values, "clients": 1}), solo())
    data, model = simulation.data.train, simulation.trainer.model
    plain = nn.Linear(64, 10)
    plain.load_state_dict(
        {k: v.clone() for k, v in zip(("weight", "bias"), _parameters(simulation), strict=True)}
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(data.x.flatten(1)), data.y).backward()
        optimizer.step()
        scheduler.step()
    for theta, _ in finish(values, 3):
        expected = torch.cat([plain.weight.flatten(), plain.bias]).detach()
        assert torch.allclose(theta, expected, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == 650


def _parameters(simulation: Simulation) -> list[torch.Tensor]:
    return [v.detach() for v in simulation.spec.views(simulation.replica.parameters()).values()]


def test_an_epoch_shows_each_sample_once() -> None:
    simulation = Simulation(parse({**PLAIN, "clients": 1, "local": {"lr": 0.1, "batch": 100}}), solo())
    index = simulation.partition.of(0)
    turns = -(-len(index) // 100)
    assert simulation.rounds_per_epoch == turns
    batch = simulation.trainer._orders.batch
    first = torch.cat([batch(index, 100, 0, t, 0) for t in range(turns)])
    second = torch.cat([batch(index, 100, 0, turns + t, 0) for t in range(turns)])
    assert torch.equal(first.sort().values, index.sort().values)
    assert torch.equal(second.sort().values, index.sort().values)
    assert not torch.equal(first, second)


def test_mixed_precision_trains_and_keeps_float32_parameters() -> None:
    ((theta, _),) = finish({**PLAIN, "local": {"lr": 0.1, "precision": "bfloat16"}}, 1)
    ((exact, _),) = finish(PLAIN, 1)
    assert theta.dtype == torch.float32
    assert not torch.equal(theta, exact), "something was rounded"
    assert torch.allclose(theta, exact, atol=0.02 * float(exact.abs().max()))


def test_signs_are_exchanged_packed() -> None:
    """What leaves a rank in a step is bits: no all-reduce of 650 numbers."""
    values = {**PLAIN, "model": "fcn", "method": "signsgd", "server": {"lr": 0.003}}
    (_, summary), *_ = finish({**values, "evaluate_every": 100}, 4)
    dense = 2 * 3 / 4 * 4 * summary["params"] * 6
    assert summary["wire_bytes_by_rank"][0] < dense / 25


INNER: dict[str, tuple[dict[str, Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "sgd": ({"lr": 0.1}, lambda net: torch.optim.SGD(net.parameters(), lr=0.1)),
    "nesterov": (
        {"lr": 0.1, "optimizer": "nesterov", "momentum": 0.9},
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adamw": (
        {"lr": 0.01, "optimizer": "adamw", "beta2": 0.95, "weight_decay": 0.1, "keep": True},
        lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    ),
    "adamw, forgotten": (
        {"lr": 0.01, "optimizer": "adamw", "keep": False},
        lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0),
    ),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("method", "server", "outer"),
    [
        ("dense", {}, {"outer": "sgd"}),
        ("dense", {"optimizer": "nesterov", "lr": 0.7}, {"outer": "nesterov", "lr": 0.7}),
        (
            {"name": "topk", "ratio": 0.1, "feedback": True},
            {"optimizer": "adam", "lr": 0.05},
            {"outer": "adam", "lr": 0.05},
        ),
    ],
)
def test_local_updates_are_those_of_the_drop_in(
    inner: str, method: Any, server: dict[str, Any], outer: dict[str, Any]
) -> None:
    """Three rounds of four steps on the same batches, at rates that change from step to step: fedmpi.local_sgd around
    torch's own optimizer ends where a configuration does. (Rates of a linear rule are multiplied by the clients'.)"""
    options, make = INNER[inner]
    if server.get("optimizer") == "nesterov":
        server = {**server, "lr": server["lr"] * options["lr"]}
    schedule = Schedule.model_validate({"name": "cosine", "warmup": 1, "final": 0.1})
    local = {**options, "steps": 4, "batch": 100, "schedule": schedule.model_dump()}
    values = {**PLAIN, "rounds": 3, "local": local, "method": method, "server": server, "evaluate_every": 3}

    def job(comm: Comm) -> torch.Tensor:
        simulation = Simulation(parse(values).for_ranks(comm.size), comm)
        net, data = nn.Linear(64, 10), simulation.data.train
        net.load_state_dict(dict(zip(("weight", "bias"), _parameters(simulation), strict=True)))
        optimizer, index = make(net), simulation.partition.of(comm.rank)
        memory = "reset" if inner.endswith("forgotten") else "keep"
        fedmpi.local_sgd(net, optimizer, method, every=4, comm=comm, exact_below=0, inner=memory, **outer)
        share = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: schedule.factor(n // 4, 3, n % 4, 4))
        for n in range(12):
            batch = simulation.trainer._orders.batch(index, 100, comm.rank, *divmod(n, 4))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x[batch].flatten(1)), data.y[batch]).backward()
            optimizer.step()
            share.step()
        return torch.cat([net.weight.flatten(), net.bias]).detach()

    expected, *_ = run_ranks(2, job)
    got = finish(values, 2)
    assert torch.equal(got[0][0], got[1][0])
    assert torch.allclose(got[0][0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_local_updates_go_through_their_samples_and_send_once_a_round() -> None:
    local = {"lr": 0.01, "optimizer": "adamw", "steps": 3, "batch": 100}
    simulation = Simulation(parse({**PLAIN, "clients": 1, "local": local}), solo())
    index = simulation.partition.of(0)
    assert simulation.rounds_per_epoch == 5, "15 batches"
    batch = simulation.trainer._orders.batch
    seen = torch.cat([batch(index, 100, 0, t, step) for t in range(5) for step in range(3)])
    assert torch.equal(seen.sort().values, index.sort().values)
    (_, once), *_ = finish({**PLAIN, "local": local}, 2)
    (_, each), *_ = finish({**PLAIN, "local": {"lr": 0.01, "batch": 100}}, 2)
    assert once["upload_bytes"] == each["upload_bytes"] == 6 * 2 * 4 * 650


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("linear", {"final": 0.1, "warmup": 4}), ("cosine", {}), ("step", {"milestones": [3, 7], "gamma": 0.5})],
)
def test_schedules(name: str, arguments: dict[str, Any]) -> None:
    schedule = Schedule.model_validate({"name": name, **arguments})
    got = [schedule.factor(t, 12) for t in range(12)]
    expected = {
        "linear": [0.25, 0.5, 0.75, 1.0] + [1 - 0.9 * t / 8 for t in range(8)],
        "cosine": [(1 + float(torch.cos(torch.tensor(torch.pi * t / 12)))) / 2 for t in range(12)],
        "step": [1.0] * 3 + [0.5] * 4 + [0.25] * 5,
    }[name]
    assert got == pytest.approx(expected, abs=1e-6)


def test_a_schedule_that_goes_on_within_rounds_is_that_of_all_steps() -> None:
    for name in ("linear", "cosine"):
        rounds = Schedule.model_validate({"name": name, "warmup": 2, "final": 0.1})
        steps = Schedule.model_validate({"name": name, "warmup": 8, "final": 0.1})
        got = [rounds.factor(t, 6, step, 4) for t in range(6) for step in range(4)]
        assert got == pytest.approx([steps.factor(n, 24) for n in range(24)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cohort": 2, "clients": 4}, "cohort: expected none"),
        ({"dropout": 0.1}, "dropout: expected 0"),
        ({"topology": "aggregator"}, "topology: expected allreduce"),
        ({"local": {"lr": 0.1, "epochs": 2}}, "local.epochs: expected none .use local.steps: H"),
        (
            {"local": {"lr": 0.1, "momentum": 0.5}},
            "local.momentum: expected none .* or local.steps from 2.*got 0.5",
        ),
        (
            {"local": {"lr": 0.1, "optimizer": "adamw", "steps": 1}},
            "local.optimizer: expected sgd .*got adamw",
        ),
        (
            {"local": {"lr": 0.1, "steps": 2, "fednova": True}},
            "local.fednova: expected .* equally many steps",
        ),
        ({"clients": 5}, "clients: expected 2, the ranks"),
    ],
)
def test_what_does_not_fit_the_mode_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_ranks(2, lambda comm: run(parse({**PLAIN, **wrong}), comm, quiet=True))


def test_federated_needs_its_clients() -> None:
    with pytest.raises(ConfigError, match=r"^clients: required, not given$"):
        parse({**PLAIN, "mode": "federated"})
