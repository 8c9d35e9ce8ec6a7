"""QSGD: against a transcription, its mean and variance, corner values, what it refuses, its bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmpi import config, random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message
from fedmpi.method import Compressor

from .codecs import codec, context, sent
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, parameters, simulate


def decoded(up: Compressor, g_CD: Tensor) -> Tensor:
    ctx = context(len(g_CD))
    return up.decompress(up.compress(g_CD, {}, ctx)[0], {}, ctx)[0]


def quantise(v: Array, norm: str, s: int, u: Array) -> tuple[float, Array]:
    """Q_s of one bucket: its norm, and the signed level of every entry, drawn with the uniforms ``u``.

    The comparison is made in float32, as both ends of it are: no decision hangs on this test's precision.
    """
    size = np.linalg.norm(v.astype(np.float64)) if norm == "l2" else np.abs(v).max()
    scaled = np.abs(v) / np.float32(size) * np.float32(s) if size else np.zeros_like(v)
    below = np.floor(scaled)
    above = u < scaled - below  # with that probability
    return float(size), (np.sign(v) * (below + above)).astype(int)


def read(message: Message, client: int, size: int) -> tuple[Array, Array]:
    """Norms and signed levels, read from the bytes by numpy."""
    bits = np.unpackbits(message.arrays["planes"][client].numpy(), axis=1, bitorder="little")
    assert not bits[:, size:].any()
    negative, *levels = bits[:, :size].astype(int)
    level = sum(plane << i for i, plane in enumerate(levels))
    return message.arrays["norms"][client].numpy(), np.where(negative, -level, level)


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(("bits", "bucket", "norm"), [(4, 100, "l2"), (2, None, "l2"), (8, 512, "max")])
def test_against_a_transcription(bits: int, bucket: int | None, norm: str, topology: str) -> None:
    """The paper's Algorithm 1 with Q_s; 650 parameters in buckets of 100 leave a short one."""
    simulation = simulate(
        method={"name": "qsgd", "bits": bits, "bucket": bucket, "norm": norm},
        local={"lr": 0.1, "steps": 2},
        topology=topology,
    )
    task, calls, s = Softmax(simulation), sent(simulation), 2 ** (bits - 1) - 1
    theta, omega = task.theta, task.sizes / task.sizes.sum()
    seen: set[int] = set()
    for t in range(20):
        simulation.round(t)
        (g_CD, message, _), mean = calls[t], np.zeros(650)
        for k in range(5):
            assert_close(g_CD[k].numpy(), task.accumulated(theta, k, 2, 0.1))
            u = random.uniform(random.key(7, t, k, "rounding"), 650).numpy()
            norms, levels = read(message, k, 650)
            starts = range(0, 650, bucket or 650)
            for b, start in enumerate(starts):
                part = slice(start, start + (bucket or 650))
                size, expected = quantise(g_CD[k, part].numpy(), norm, s, u[part])
                assert norms[b] == pytest.approx(size, rel=1e-7)
                assert np.array_equal(levels[part], expected), f"round {t}, client {k}, bucket {b}"
                mean[part] += omega[k] * size * expected / s
            assert len(norms) == len(starts)
            seen |= set(np.abs(levels).tolist())
        theta = theta - 0.1 * mean
        assert_close(parameters(simulation), theta)
    assert {0, 1} <= seen
    assert (max(seen) == s) == (bits == 2 or norm == "max")
    nbytes = bits * math.ceil(650 / 8) + 4 * math.ceil(650 / (bucket or 650))
    assert simulation.bytes["upload"] == 20 * 5 * nbytes


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_unbiased_with_the_variance_of_independent_roundings(bits: int, norm: str) -> None:
    """Mean and total squared error of 4000 draws within 5 standard errors, and within the paper's bound."""
    draws, size, bucket, s = 4000, 40, 16, 2 ** (bits - 1) - 1
    v_D = random.normal(random.key(1), size)
    v_CD = decoded(codec("qsgd", size, bits=bits, bucket=bucket, norm=norm), v_D.expand(draws, -1)).double()
    v_D = v_D.double()
    order = 2 if norm == "l2" else math.inf
    norm_D = torch.cat([b.norm(order).expand(len(b)) for b in v_D.split(bucket)])
    x_D = v_D.abs() / norm_D * s
    p_D = x_D - x_D.floor()
    variance_D = p_D * (1 - p_D) * (norm_D / s) ** 2
    error_D = (v_CD.mean(0) - v_D).abs()
    assert (error_D <= 5 * (variance_D / draws).sqrt() + 1e-6).all()
    squares = ((v_CD - v_D) ** 2).sum(1)
    assert abs(squares.mean() - variance_D.sum()) < 5 * squares.std() / draws**0.5
    total = (v_CD - v_D).sum(1)  # adds up covariances, too: entries are rounded independently
    assert total.var() == pytest.approx(float(variance_D.sum()), rel=5 * math.sqrt(2 / draws) + 0.05)
    bound = sum(min(len(b) / s**2, len(b) ** 0.5 / s) * float(b @ b) for b in v_D.split(bucket))
    assert squares.mean() < bound


def test_zero_buckets_single_entries_and_extreme_values() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    g_CD = torch.zeros(4, 10)
    g_CD[0, 5] = -3.7  # alone in its bucket
    g_CD[1] = largest  # its norm lies beyond float32
    g_CD[2] = smallest
    v_CD = decoded(codec("qsgd", 10, bits=4, bucket=4), g_CD)
    assert torch.equal(v_CD[0], g_CD[0])
    assert torch.equal(v_CD[1], g_CD[1])
    assert set(v_CD[2].tolist()) <= {i * smallest for i in range(3)}
    assert torch.equal(v_CD[3], torch.zeros(10))
    g_CD = random.normal(random.keys(1, 0, torch.arange(3), "g"), 10)
    assert torch.equal(decoded(codec("qsgd", 10, bucket=1), g_CD), g_CD), "a bucket of one is exact"


def test_a_row_does_not_depend_on_the_others() -> None:
    up, ctx = codec("qsgd", 3001), context(9)
    g_CD = random.normal(random.keys(2, 0, ctx.clients_C, "g"), 3001)
    together, _ = up.compress(g_CD, {}, ctx)
    for c in range(9):
        alone, _ = up.compress(g_CD[c : c + 1], {}, ctx.select(torch.tensor([c])))
        assert torch.equal(alone.arrays["norms"][0], together.arrays["norms"][c])
        assert torch.equal(alone.arrays["planes"][0], together.arrays["planes"][c])


def test_why_there_is_no_feedback() -> None:
    """A dense vector's squared error exceeds its square at the defaults: no contraction."""
    g_CD = random.normal(random.keys(3, 0, torch.arange(40), "g"), 5120)
    ratio_C = ((decoded(codec("qsgd", 5120), g_CD) - g_CD) ** 2).sum(1) / (g_CD**2).sum(1)
    assert (ratio_C > 1.4).all()
    assert (ratio_C < 1.7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "method.bits: expected greater than or equal to 2, got 1"),
        ({"bits": 9}, "method.bits: expected less than or equal to 8, got 9"),
        ({"bucket": 0}, "method.bucket: expected greater than or equal to 1, got 0"),
        ({"norm": "l1"}, "method.norm: expected 'l2' or 'max', got 'l1'"),
        ({"feedback": True}, "method.feedback: unknown key; valid: name, bits, bucket, norm"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse({**SMALL, "method": {"name": "qsgd", **options}})


@pytest.mark.parametrize("norm", [-1.0, math.nan, math.inf, -math.inf])
def test_impossible_norms_are_refused(norm: float) -> None:
    up, ctx = codec("qsgd", 20, bucket=8), context(2)
    message, _ = up.compress(torch.ones(2, 20), {}, ctx)
    message.arrays["norms"][1, 2] = norm
    with pytest.raises(MessageError, match="expected finite norms"):
        up.decompress(message, {}, ctx)


def test_bytes_of_the_default_on_a_large_model() -> None:
    """4 bits an entry and 4 bytes for every 512: 7.9 times less than float32."""
    size = 100_003
    message, _ = codec("qsgd", size).compress(torch.ones(1, size), {}, context(1))
    assert message.nbytes().tolist() == [4 * 12_501 + 4 * 196]
    assert 4 * size / message.nbytes()[0] > 7.8
