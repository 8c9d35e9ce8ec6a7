"""Top-k with error feedback against numpy: through the engine, and to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedmpi import methods, random
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .codecs import context
from .softmax import Softmax, assert_close, parameters, simulate


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
    assert simulation.bytes["upload"] == 20 * 5 * (30 * 4 + math.ceil(30 * 10 / 8))


def test_top_k_with_error_feedback_to_the_bit():
    """20 rounds of gradients full of ties, in float32 as the codec does it, residuals and messages compared."""
    size, k, clients = 90, 7, 4
    method = methods.build({"name": "topk", "k": k, "feedback": True}, Spec(("w",), ((size,),)), Setup())
    state = {name: torch.stack([value] * clients) for name, value in method.up.init().items()}
    residual = np.zeros((clients, size), np.float32)
    for t in range(20):
        keys = random.keys(2, t, torch.arange(clients), "gradients")
        g_CD = (random.integers(keys, size, 9) - 4).float() / 4
        message, state = method.up.compress(g_CD, state, context(clients, t))
        decoded, _ = method.up.decompress(message, {}, context(clients, t))
        for c in range(clients):
            p = g_CD[c].numpy() + residual[c]
            chosen = np.argsort(-np.abs(p), kind="stable")[:k]
            sent = np.zeros(size, np.float32)
            sent[chosen] = p[chosen]
            residual[c] = p - sent
            assert np.array_equal(decoded[c].numpy(), sent)
        assert np.array_equal(state["residual"].numpy(), residual)
