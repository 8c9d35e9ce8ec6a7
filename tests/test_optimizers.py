"""The server's optimizers against plain transcriptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError

from .codecs import means
from .conftest import SMALL
from .softmax import Softmax, assert_close, parameters, simulate
from .test_intrinsic import explicit_matrix


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam", "yogi"])
@pytest.mark.parametrize("method", [{"name": "dense"}, {"name": "intrinsic", "dim": 24}], ids=str)
def test_server_optimizers_are_the_papers(optimizer, method):
    """Reddi et al. 2021, Algorithm 2, on the model difference, for 15 rounds; momentum on the difference over η_l."""
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
        elif optimizer == "nesterov":
            m = beta1 * m + delta
            x = x + eta * (delta + beta1 * m)
        else:
            delta = 0.2 * delta  # Δ: the clients' learning rate times what they accumulated
            m = beta1 * m + (1 - beta1) * delta
            if optimizer == "adam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            x = x + eta * m / (np.sqrt(v) + tau)
        simulation.round(t)
        assert_close(parameters(simulation), task.theta + A @ x, 1e-4)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_server_optimizers_follow_their_rule(optimizer: str) -> None:
    """Against a plain transcription, fed with the means that the simulation itself computes."""
    values = {**SMALL, "server": {"optimizer": optimizer, "lr": 0.05, "beta1": 0.8, "beta2": 0.95}}
    simulation = Simulation(config.parse(values), solo())
    theta = simulation.replica.parameters().double()
    got = means(simulation)
    m, v = torch.zeros_like(theta), torch.full_like(theta, 1e-6)
    for t in range(6):
        simulation.round(t)
        g = got[-1].double() * (1 if optimizer == "momentum" else simulation.config.local.lr)
        if optimizer == "momentum":
            m = 0.8 * m + g
            theta = theta - 0.05 * m
        else:
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * g**2 if optimizer == "adam" else v - 0.05 * g**2 * (v - g**2).sign()
            theta = theta - 0.05 * m / (v.sqrt() + 1e-3)
        assert torch.allclose(simulation.replica.parameters().double(), theta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_in_data_parallel_mode_they_act_on_the_mean_gradient(optimizer: str) -> None:
    values = {
        "data": {"name": "digits"},
        "model": "linear",
        "mode": "data_parallel",
        "rounds": 6,
        "method": "dense",
        "local": {"lr": 0.3},
        "server": {"optimizer": optimizer, "lr": 0.02, "epsilon": 0.01},
    }
    simulation = Simulation(config.parse(values).for_ranks(1), solo())
    theta, got = simulation.replica.parameters().double(), means(simulation)
    m, v = torch.zeros_like(theta), torch.full_like(theta, 1e-4)
    for t in range(6):
        simulation.round(t)
        g = got[-1].double()
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g**2 if optimizer == "adam" else v - 0.01 * g**2 * (v - g**2).sign()
        theta = theta - 0.02 * m / (v.sqrt() + 0.01)
        assert torch.allclose(simulation.replica.parameters().double(), theta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_they_need_a_learning_rate(optimizer: str) -> None:
    with pytest.raises(ConfigError, match=rf"server: expected lr, .* with optimizer: {optimizer}, got none"):
        config.parse({**SMALL, "server": {"optimizer": optimizer}})
