"""Uncompressed: one client is plain SGD to the bit, several are federated averaging."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import random
from fedmpi.engine.rounds import Simulation
from fedmpi.tasks import models

from .softmax import Softmax, assert_close, drawn, parameters, simulate


def alone(model: str, **local: Any) -> tuple[Simulation, torch.nn.Module]:
    """One client with all data, and the same model beside it, whose kernels lie as the engine's (test_layout.py)."""
    simulation = simulate(model={"name": model}, clients=1, partition="iid", local=local, seed=3)
    module = models.build(model, simulation.data.shape, 10, random.key(3, stream="model"))
    return simulation, module.to(memory_format=torch.channels_last)


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
        got = simulation.spec.views(simulation.replica.parameters())
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
        torch.testing.assert_close(simulation.replica.parameters(), flat, rtol=1e-6, atol=1e-7)


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
    torch.testing.assert_close(simulation.replica.parameters(), flat, rtol=1e-5, atol=1e-6)


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
