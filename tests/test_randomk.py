"""Random-k: against a transcription, its mean and variance, what it refuses, its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmpi import config, random
from fedmpi.engine.store import ClientStore
from fedmpi.errors import ConfigError
from fedmpi.method import Compressor
from fedmpi.methods.feedback import Feedback
from fedmpi.methods.randomk import RandomK
from fedmpi.spec import Spec

from .codecs import codec, context, sent
from .conftest import SMALL
from .softmax import Softmax, assert_close, parameters, simulate

K = 30


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 650 / K), ({"scale": "unbiased"}, 650 / K), ({"scale": "none"}, 1), ({"feedback": True}, 1)],
    ids=str,
)
def test_against_a_transcription(options: dict[str, Any], factor: float, topology: str) -> None:
    """θ ← θ − η Σ ω_k c·(p_k restricted to k's own coordinates of the round), p_k = g_k (+ e_k)."""
    eta = 0.2 if factor == 1 else 0.02
    simulation = simulate(
        method={"name": "randomk", "k": K, **options},
        local={"lr": 0.2, "steps": 2},
        server={"lr": eta},
        topology=topology,
    )
    task, calls = Softmax(simulation), sent(simulation)
    theta, residual = task.theta, np.zeros((5, 650))
    omega = task.sizes / task.sizes.sum()
    patterns, download = set(), 0
    for t in range(20):
        before = simulation.replica.parameters()
        line = simulation.round(t)
        changed = int((simulation.replica.parameters() != before).sum())
        mean = np.zeros(650)
        for k in range(5):
            p = task.accumulated(theta, k, 2, 0.2) + residual[k] * bool(options.get("feedback"))
            chosen = random.sample(random.key(7, t, k, "coordinates"), 650, K).numpy()
            assert_close(calls[t].message.arrays["values"][k].double().numpy(), p[chosen])
            v = np.zeros(650)
            v[chosen] = factor * p[chosen]
            residual[k] = p - v
            mean += omega[k] * v
            patterns.add(frozenset(chosen.tolist()))
        theta = theta - eta * mean
        assert_close(parameters(simulation), theta)
        if "feedback" in options:
            kept = simulation.clients.get(torch.arange(5))["residual"]
            assert_close(kept.double().numpy(), residual)
        assert line["upload_bytes"] == 5 * 4 * K, "no index travels"
        assert line["download_bytes"] == 5 * download
        assert 50 < changed < 5 * K
        download = 4 * changed + min(-(-changed * 10 // 8), 82)  # in the next round: indices or a map
    assert len(patterns) == 100, "each client and round draws afresh"


@pytest.mark.parametrize(("size", "k", "block", "draws"), [(37, 5, 1, 2000), (70_000, 700, 700, 80)])
def test_unbiased(size: int, k: int, block: int, draws: int) -> None:
    """Within 5 standard errors (of sampling without repetition) for every block of coordinates."""
    g_D = random.normal(random.key(1), size)
    up, ctx = codec("randomk", size, k=k), context(draws)
    message, _ = up.compress(g_D.expand(draws, -1), {}, ctx)
    v_CD, _ = up.decompress(message, {}, ctx)
    assert ((v_CD != 0).sum(1) == k).all()
    h = torch.zeros(size // block, size).double()
    for b in range(size // block):
        h[b, b * block : (b + 1) * block] = g_D[b * block : (b + 1) * block].double()
    error = (v_CD.double().mean(0).view(-1, block).sum(1) - h.sum(1)).abs()
    standard = (size**2 / k * (1 - k / size) * h.var(1) / draws).sqrt()
    assert (error < 5 * standard).all()


def test_variance_is_that_of_the_docstring() -> None:
    """E‖v − g‖² = (D/k − 1)‖g‖², within 5 standard errors of 2000 draws."""
    g_D, up, ctx = random.normal(random.key(2), 37), codec("randomk", 37, k=5), context(2000)
    v_CD, _ = up.decompress(up.compress(g_D.expand(2000, -1), {}, ctx)[0], {}, ctx)
    squares = ((v_CD - g_D) ** 2).sum(1).double()
    assert abs(squares.mean() - (37 / 5 - 1) * (g_D**2).sum()) < 5 * squares.std() / 2000**0.5


def residual_after(up: Compressor, rounds: int) -> Tensor:
    store, ids = ClientStore(Feedback(up).init), torch.arange(3)
    for t in range(rounds):
        _, state = Feedback(up).compress(torch.ones(3, up.size), store.get(ids), context(3, t))
        store.put(ids, state)
    return store.get(ids)["residual"].norm(dim=1)


def test_why_feedback_forbids_the_scale() -> None:
    """The error that the option's message speaks of: with D/k = 10 the residual explodes, without it stays."""
    spec = Spec(("w",), ((40,),))
    assert (residual_after(RandomK(spec, 4, 10.0), 60) > 1e6).all()
    plain = residual_after(RandomK(spec, 4, 1.0), 60)
    assert (plain < 4 * 10 * 40**0.5).all(), "an entry waits D/k = 10 rounds on average"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "method.k: expected 1 to 650 .*, got 0"),
        ({"k": 651}, "method.k: expected 1 to 650 .*, got 651"),
        ({"scale": "unbiased", "feedback": True}, "method.scale: expected none with feedback, got unbiased"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        codec("randomk", 650, **options)


def test_a_message_of_one_round_cannot_stand_for_a_later_one() -> None:
    """Its coordinates are drawn afresh, so look-back must not keep it in place of what it decoded to."""
    with pytest.raises(ConfigError, match=r"method\.keep"):
        codec("lookback", 650, inner={"name": "randomk"}, keep="message")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "method.ratio: expected greater than 0, got 0"),
        ({"scale": "isometry"}, "method.scale: expected 'unbiased' or 'none', got 'isometry'"),
        ({"r": 40}, "method.r: unknown key"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse({**SMALL, "method": {"name": "randomk", **options}})
