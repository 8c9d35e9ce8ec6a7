"""rTop-k: against a transcription, between its two extremes, its draw, what it refuses, its bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config, random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.methods.rtopk import RTopK

from .codecs import codec, context, indices, sent
from .conftest import SMALL
from .softmax import Softmax, assert_close, parameters, simulate

K, R = 30, 120


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("feedback", [False, True])
def test_against_a_transcription(feedback: bool, topology: str) -> None:
    """p = g + e; U uniform among the k-subsets of the r largest |p|; p_U is sent; e ← p − p_U."""
    simulation = simulate(method={"name": "rtopk", "k": K, "r": R, "feedback": feedback}, topology=topology)
    task, calls = Softmax(simulation), sent(simulation)
    theta, residual = task.theta, np.zeros((5, 650), np.float32)
    omega = task.sizes / task.sizes.sum()
    for t in range(20):
        simulation.round(t)
        mean = np.zeros(650)
        for k in range(5):
            g = calls[t].g_CD[k].numpy()  # its own float32: no choice hangs on this test's precision
            assert_close(g, task.accumulated(theta, k, 2, 0.2))
            p = g + residual[k] * feedback
            order = np.argsort(-np.abs(p), kind="stable")
            drawn = random.sample(random.key(7, t, k, "candidates"), R, K).numpy()
            chosen = np.sort(order[:R])[drawn]
            assert np.array_equal(indices(calls[t].message, "index", k, K, 10), chosen), (
                f"round {t}, client {k}"
            )
            v = np.zeros(650, np.float32)
            v[chosen] = p[chosen]
            residual[k] = p - v
            mean += omega[k] * v.astype(np.float64)
        theta = theta - 0.2 * mean
        assert_close(parameters(simulation), theta)
        if feedback:
            assert np.array_equal(simulation.clients.get(torch.arange(5))["residual"].numpy(), residual)
    assert simulation.bytes["upload"] == 20 * 5 * (4 * K + math.ceil(K * 10 / 8))


def test_r_equal_k_is_top_k_and_r_equal_d_is_random_k() -> None:
    g_CD, ctx = random.normal(random.keys(3, 0, torch.arange(6), "g"), 90), context(6)
    top, exploit, explore = (
        codec("topk", 90, k=7),
        codec("rtopk", 90, k=7, r=7),
        codec("rtopk", 90, k=7, r=90),
    )
    expected, _ = top.decompress(top.compress(g_CD, {}, ctx)[0], {}, ctx)
    got, _ = exploit.decompress(exploit.compress(g_CD, {}, ctx)[0], {}, ctx)
    assert torch.equal(got, expected)
    message, _ = explore.compress(g_CD, {}, ctx)
    for c, key in enumerate(ctx.keys("candidates").tolist()):
        assert indices(message, "index", c, 7, 7).tolist() == random.sample(key, 90, 7).tolist()


def test_every_candidate_is_drawn_equally_often_and_nothing_else() -> None:
    """4000 clients with one gradient: each of the r within 5 standard errors of k/r."""
    draws, size, k, r = 4000, 60, 4, 11
    g_D, up, ctx = random.normal(random.key(5), size), codec("rtopk", size, k=k, r=r), context(draws)
    v_CD, _ = up.decompress(up.compress(g_D.expand(draws, -1), {}, ctx)[0], {}, ctx)
    assert ((v_CD != 0).sum(1) == k).all()
    assert ((v_CD == 0) | (v_CD == g_D)).all(), "sent as they are: biased"
    counts = (v_CD != 0).sum(0)
    candidates = g_D.abs().argsort(descending=True)[:r]
    share = k / r
    error = (counts[candidates] - draws * share).abs()
    assert (error < 5 * math.sqrt(draws * share * (1 - share))).all()
    assert counts.sum() == counts[candidates].sum()


@pytest.mark.parametrize(
    ("options", "r"), [({"k": 7}, 70), ({"ratio": 0.01}, 60), ({"k": 100}, 650), ({"k": 7, "r": 9}, 9)]
)
def test_default_number_of_candidates(options: dict[str, Any], r: int) -> None:
    up = codec("rtopk", 650, **options)
    assert isinstance(up, RTopK)
    assert up.r == r


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 30, "r": 29}, r"method.r: expected k = 30 to D = 650 \(the model's parameters\), got 29"),
        ({"k": 30, "r": 651}, r"method.r: expected k = 30 to D = 650 \(the model's parameters\), got 651"),
        ({"k": 0, "r": 5}, "method.k: expected 1 to 650 .*, got 0"),
        ({"k": 651}, "method.k: expected 1 to 650 .*, got 651"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        codec("rtopk", 650, **options)


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match=r"method\.r: expected a valid integer"):
        config.parse({**SMALL, "method": {"name": "rtopk", "r": 2.5}})


def test_an_index_beyond_the_model_is_refused() -> None:
    up, ctx = codec("rtopk", 650, k=3, r=5), context(1)
    message, _ = up.compress(random.normal(random.key(6), 650)[None], {}, ctx)
    message.arrays["index"].fill_(255)  # 1023 in 10 bits
    with pytest.raises(MessageError, match="index 1023, expected less than 650"):
        up.decompress(message, {}, ctx)
