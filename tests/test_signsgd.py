"""Signum and the scaled mean against numpy, 20 rounds through the engine. The majority vote with ties and zeros is
in tests/test_numerics.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.method import Context

from .conftest import SMALL


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize(("vote", "feedback"), [("majority", False), ("mean", False), ("mean", True)])
def test_twenty_rounds(beta: float, vote: str, feedback: bool) -> None:
    method = {"name": "signsgd", "momentum": beta, "vote": vote, "feedback": feedback}
    values = {**SMALL, "clients": 5, "cohort": None, "method": method, "server": {"lr": 0.01}}
    simulation = Simulation(config.parse(values), solo())
    inputs: list[np.ndarray] = []
    signs: list[np.ndarray] = []
    compress = simulation.method.up.compress

    def spy(g_CD: torch.Tensor, state: Any, ctx: Context) -> Any:
        message, after = compress(g_CD, state, ctx)
        inputs.append(g_CD.double().numpy())
        bits = np.unpackbits(message.arrays["signs"].numpy(), axis=1, bitorder="little")[:, :650]
        signs.append(2.0 * bits - 1)
        return message, after

    simulation.method.up.compress = spy  # type: ignore[method-assign]
    theta = simulation.topology.parameters().double().numpy()
    m, e = np.zeros((5, 650)), np.zeros((5, 650))
    omega = (simulation.partition.sizes / simulation.partition.sizes.sum()).double().numpy()
    for t in range(20):
        simulation.round(t)
        p = inputs[t] + e
        m = beta * m + (1 - beta) * p if beta else p
        # Zeros are coins, and float32 may round to the other side of one: those signs are taken as sent.
        sent = np.where(np.abs(m) > 1e-8, np.sign(m), signs[t])
        assert np.array_equal(sent, signs[t])
        if vote == "majority":  # five voters: no ties
            theta = theta - 0.01 * np.sign(sent.sum(0))
        else:
            v = np.abs(m).mean(1, keepdims=True) * sent
            theta = theta - 0.01 * omega @ v
            e = p - v if feedback else e
        assert np.allclose(simulation.topology.parameters().double().numpy(), theta, rtol=1e-4, atol=1e-5)
    assert simulation.upload_bytes == 20 * 5 * (82 + 4 * (vote == "mean"))


def test_feedback_needs_a_magnitude() -> None:
    method = {"name": "signsgd", "vote": "majority", "feedback": True}
    with pytest.raises(ConfigError, match=r"method\.feedback: expected a method whose message decodes"):
        Simulation(config.parse({**SMALL, "method": method}), solo())


def test_a_majority_vote_takes_no_optimizer() -> None:
    values = {**SMALL, "method": {"name": "signsgd"}, "server": {"optimizer": "adam"}}
    with pytest.raises(ConfigError, match=r"server\.optimizer: expected sgd with a majority vote, got adam"):
        Simulation(config.parse(values), solo())
