"""fp16 and bf16: to the bit against numpy, the ends of their ranges, what they refuse, their bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedmpi import config
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message

from .codecs import codec, context, sent
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, parameters, simulate

BF16_LARGEST = 0x7F7F << 16


def fp16(x: Array) -> Array:
    """float32 → the nearest binary16, saturating; as float32."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float16).astype(np.float32)
    return np.where(np.isinf(near), np.copysign(np.float32(65504), x), near)


def bf16(x: Array) -> Array:
    """float32 → the nearest bfloat16 (ties to even) by its bits, saturating; as float32."""
    bits = x.view(np.uint32)
    sign, size = bits & 0x80000000, (bits & 0x7FFFFFFF).astype(np.uint64)
    size = (size + 0x7FFF + ((size >> 16) & 1)) >> 16 << 16
    return (np.minimum(size, BF16_LARGEST).astype(np.uint32) | sign).view(np.float32)


ROUND = {"fp16": fp16, "bf16": bf16}


def through(name: str, values: list[float]) -> list[float]:
    up = codec(name, len(values))
    message, _ = up.compress(torch.tensor([values]), {}, context(1))
    v_CD, _ = up.decompress(message, {}, context(1))
    assert v_CD.dtype == torch.float32
    return v_CD[0].tolist()


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", ROUND)
def test_against_a_transcription(name: str, feedback: bool, topology: str) -> None:
    """p = g (+ e) rounded, summed in full precision; messages and residuals equal to the bit."""
    simulation = simulate(method={"name": name, "feedback": feedback}, topology=topology)
    task, calls = Softmax(simulation), sent(simulation)
    theta, omega = task.theta, task.sizes / task.sizes.sum()
    residual = np.zeros((5, 650), np.float32)
    for t in range(20):
        simulation.round(t)
        g_CD, message, _ = calls[t]
        for k in range(5):
            assert_close(g_CD[k].numpy(), task.accumulated(theta, k, 2, 0.2))
        p = g_CD.numpy() + residual * feedback
        v = ROUND[name](p)
        assert np.array_equal(message.arrays["gradient"].float().numpy(), v)
        residual = p - v
        if feedback:
            assert np.array_equal(simulation.clients.get(torch.arange(5))["residual"].numpy(), residual)
        theta = theta - 0.2 * omega @ v.astype(np.float64)
        assert_close(parameters(simulation), theta)
    assert np.abs(residual).max() > 0
    assert simulation.bytes["upload"] == 20 * 5 * 2 * 650


@pytest.mark.parametrize("name", ROUND)
def test_rounds_to_nearest_over_the_whole_range(name: str) -> None:
    """Every exponent of float32, both signs, ties included."""
    mantissas = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x1000, 0x1FFF, 0x7FFFFF], np.uint32)
    exponents = np.arange(255, dtype=np.uint32) << 23
    x = (exponents[:, None] | mantissas).ravel()
    x = np.concatenate([x, x | np.uint32(0x80000000)]).view(np.float32)
    got = np.array(through(name, x.tolist()), np.float32)
    assert np.array_equal(got.view(np.uint32), ROUND[name](x).view(np.uint32))
    significant, least = {"fp16": (11, 2.0**-14), "bf16": (8, 2.0**-126)}[name]
    inside = (np.abs(x) >= least) & (np.abs(x) <= torch.finfo(torch.float16).max if name == "fp16" else True)
    relative = np.abs(got.astype(np.float64) - x)[inside] / np.abs(x[inside].astype(np.float64))
    assert relative.max() <= 2.0**-significant


def test_what_does_not_fit_saturates_or_vanishes() -> None:
    largest = torch.finfo(torch.float32).max
    assert through("fp16", [65504, 65519, 65520, 1e6, -largest]) == [65504] * 4 + [-65504]
    assert through("bf16", [1e6, largest, -largest]) == [999424, 255 * 2.0**120, -255 * 2.0**120]
    assert through("fp16", [2.0**-24, 2.0**-25, 2.0**-25 * 1.001]) == [2.0**-24, 0, 2.0**-24]


@pytest.mark.parametrize("name", ROUND)
def test_feedback_sends_what_did_not_fit_later(name: str) -> None:
    """Ten times a value too fine or too large for the type: all of it arrives, up to one residual."""
    up = codec(name, 2, feedback=True)
    g_CD = torch.tensor([[1.001, 2.0**-26], [100_000.0, 1.0]])
    state = {n: torch.stack([v, v]) for n, v in up.init().items()}
    total = torch.zeros(2, 2)
    for t in range(20):
        message, state = up.compress(g_CD if t < 10 else torch.zeros(2, 2), state, context(2, t))
        total += up.decompress(message, {}, context(2, t))[0]
    assert torch.allclose(total, 10 * g_CD, rtol=1e-5, atol=2.0**-25)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ROUND)
def test_values_that_no_sender_sends_are_refused(name: str, value: float) -> None:
    up = codec(name, 3)
    message, _ = up.compress(torch.ones(1, 3), {}, context(1))
    message.arrays["gradient"][0, 1] = value
    with pytest.raises(MessageError, match="expected finite values"):
        up.decompress(Message(message.arrays), {}, context(1))


@pytest.mark.parametrize("name", ROUND)
def test_wrong_options(name: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.bits: unknown key; valid: name, feedback"):
        config.parse({**SMALL, "method": {"name": name, "bits": 8}})
