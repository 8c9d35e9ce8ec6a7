"""Softmax regression through the real engine, and the same task in plain numpy: for tests against transcriptions.

The reference shares with fedmpi only what is not under test: the initial values, the data, the partition
and the draw of the cohort. Its gradients are written by hand, in float64. Where a decision hangs on a
comparison (LBGM's threshold, top-k's cut), a test also asserts that no comparison was closer than
rounding could turn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpi import config, random
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation

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
        self.theta = simulation.replica.parameters().double().numpy()
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
    return simulation.replica.parameters().double().numpy()


def drawn(simulation: Simulation, t: int) -> list[int]:
    """The cohort of round t, sampled uniformly."""
    run = simulation.config
    chosen = random.sample(random.key(run.seed, t, -1, "cohort"), run.clients, run.cohort_size)
    return sorted(chosen.tolist())


def assert_close(got: Array, expected: Array, tolerance: float = 2e-5) -> None:
    """Within ``tolerance`` of the largest entry: float32 against float64 over all rounds."""
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def assert_same_sums(got: Tensor, expected: Tensor, terms: int) -> None:
    """Equal but for the order in which ``terms`` float32 of the largest entry's size were added up.

    Equal bits are promised with ``reproducible: true`` only: elsewhere one fused product may stand beside a sum of
    vectors, and a library adds up in another order on another processor.
    """
    scale = float(expected.abs().max())
    bound = 4 * torch.finfo(torch.float32).eps * math.sqrt(terms) * scale
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)
