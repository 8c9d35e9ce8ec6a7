"""Signum, the scaled mean and the majority vote with ties and zeros, against plain transcriptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmpi import config, methods, random
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.meet.sums import Sum
from fedmpi.method import Context, Round
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .codecs import codec, context, sent
from .conftest import SMALL
from .softmax import assert_close, parameters, simulate


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize(("vote", "feedback"), [("majority", False), ("mean", False), ("mean", True)])
def test_twenty_rounds(beta: float, vote: str, feedback: bool) -> None:
    method = {"name": "signsgd", "momentum": beta, "vote": vote, "feedback": feedback}
    values = {**SMALL, "clients": 5, "cohort": None, "method": method, "server": {"lr": 0.01}}
    simulation = Simulation(config.parse(values), solo())
    calls = sent(simulation)
    theta = simulation.replica.parameters().double().numpy()
    m, e = np.zeros((5, 650)), np.zeros((5, 650))
    omega = (simulation.partition.sizes / simulation.partition.sizes.sum()).double().numpy()
    for t in range(20):
        simulation.round(t)
        bits = np.unpackbits(calls[t].message.arrays["signs"].numpy(), axis=1, bitorder="little")
        signs = 2.0 * bits[:, :650] - 1
        p = calls[t].g_CD.double().numpy() + e
        m = beta * m + (1 - beta) * p if beta else p
        # Zeros are coins, and float32 may round to the other side of one: those signs are taken as sent.
        chosen = np.where(np.abs(m) > 1e-8, np.sign(m), signs)
        assert np.array_equal(chosen, signs)
        if vote == "majority":  # five voters: no ties
            theta = theta - 0.01 * np.sign(chosen.sum(0))
        else:
            v = np.abs(m).mean(1, keepdims=True) * chosen
            theta = theta - 0.01 * omega @ v
            e = p - v if feedback else e
        assert np.allclose(simulation.replica.parameters().double().numpy(), theta, rtol=1e-4, atol=1e-5)
    assert simulation.bytes["upload"] == 20 * 5 * (82 + 4 * (vote == "mean"))


def test_feedback_needs_a_magnitude() -> None:
    method = {"name": "signsgd", "vote": "majority", "feedback": True}
    with pytest.raises(ConfigError, match=r"method\.feedback: expected a method whose message decodes"):
        Simulation(config.parse({**SMALL, "method": method}), solo())


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
    ids, ties, zeros = 3 * torch.arange(clients) + 1, 0, 0
    for t in range(3):
        ctx = Context(Round(5, t, lr=0.25), ids, torch.ones_like(ids))
        keys = random.keys(9, t, torch.arange(clients), "gradients")
        g_CD = (random.integers(keys, size, 3) - 1).float() * random.uniform(keys, size).add(0.5)
        g_CD[:, 0], g_CD[:, 1], g_CD[:, 2], g_CD[0, 3] = 1, -1, 0, -0.0  # all voices alike: no overflow
        message, _ = method.up.compress(g_CD, {}, ctx)
        assert message.nbytes().tolist() == [27] * clients
        votes_CD, _ = method.up.decompress(message, {}, ctx)
        total = Sum(method.up.size, integer=True, exact=False, terms=clients)
        for rows in torch.arange(clients).split(3):
            total.add(votes_CD[rows], torch.ones(len(rows)).double())
        assert total.value()[:2].tolist() == [clients, -clients]
        assert total.value()[size:].tolist() == [clients] * 4, (
            "everybody has a gradient in each row of 64 entries"
        )
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
            simulation.replica.parameters(), simulation.data.train, simulation.partition, ids, t
        )
        theta = theta - 0.01 * np.array(plain_vote(update.g_CD.tolist(), ids.tolist(), 7, t))
        simulation.round(t)
        assert_close(parameters(simulation), theta, 1e-6)


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_with_coins_a_sign_vector_of_zeros_is_coins(vote: str) -> None:
    up = codec("signsgd", 4096, vote=vote, zeros="coin")
    message, _ = up.compress(torch.zeros(2, 4096), {}, context(2))
    again, _ = up.compress(torch.zeros(2, 4096), {}, context(2))
    v, _ = up.decompress(message, {}, context(2))
    if vote == "mean":
        assert not bool(v.any()), "their scale is zero, too"
        return
    assert torch.equal(message.arrays["signs"], again.arrays["signs"])
    assert v.abs().unique().tolist() == [1]
    assert bool((v.float().mean(1).abs() < 0.08).all())
    assert not torch.equal(v[0], v[1]), "each client has its own"


def test_a_majority_vote_takes_no_optimizer() -> None:
    values = {**SMALL, "method": {"name": "signsgd"}, "server": {"optimizer": "adam", "lr": 0.1}}
    with pytest.raises(ConfigError, match=r"server\.optimizer: expected sgd with a majority vote, got adam"):
        Simulation(config.parse(values), solo())
