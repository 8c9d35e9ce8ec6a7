"""SparseLoCo against a transcription of its published algorithm, and the two bits of its values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedmpi
from fedmpi import config, random
from fedmpi.comm import solo
from fedmpi.engine.parts import load
from fedmpi.errors import ConfigError, MessageError
from fedmpi.methods.two_bits import TwoBits

from .codecs import codec, context
from .conftest import SMALL


def test_as_the_algorithm_says() -> None:
    """e ← β e + Δ, the k largest of each chunk of e are sent, and e ← e − what was sent; the last chunk is shorter."""
    size, chunk, ratio, beta = 90, 20, 0.1, 0.75
    up = codec("sparseloco", size, chunk=chunk, ratio=ratio, beta=beta, values="float32")
    state = {"residual": torch.zeros(3, size)}
    residual = np.zeros((3, size), np.float32)
    for t in range(6):
        delta_CD = random.normal(random.keys(5, t, torch.arange(3), "updates"), size)
        message, state = up.compress(delta_CD, state, context(3, t))
        sent_CD, _ = up.decompress(message, {}, context(3, t))
        for c in range(3):
            e = np.float32(beta) * residual[c] + delta_CD[c].numpy()
            sent = np.zeros_like(e)
            for start in range(0, size, chunk):
                part = e[start : start + chunk]
                for i in np.argsort(-np.abs(part), kind="stable")[: max(1, round(ratio * len(part)))]:
                    sent[start + i] = part[i]
            assert np.array_equal(np.flatnonzero(sent), sent_CD[c].numpy().nonzero()[0])
            np.testing.assert_allclose(sent_CD[c].numpy(), sent, rtol=1e-6)
            residual[c] = e - sent
        np.testing.assert_allclose(state["residual"].numpy(), residual, atol=1e-6)


def test_two_bits_are_a_sign_and_the_mean_of_what_is_below_or_above_the_mean() -> None:
    blocks = TwoBits(8)
    x = torch.tensor([1.0, -1.0, 2.0, -4.0, 8.0, 0.5, -0.5, -9.0])[None]
    records = blocks.encode(x)
    assert records.shape == (1, 1, 4 + 1 + 1)  # two scales, 8 signs, which of the two
    low, high = (1 + 1 + 2 + 0.5 + 0.5) / 5, (4 + 8 + 9) / 3
    expected = torch.tensor([low, -low, low, -high, high, low, -low, -high])
    assert torch.allclose(blocks.decode(records, 8)[0], expected, rtol=2**-8)
    assert torch.equal(blocks.decode(blocks.encode(torch.zeros(2, 20)), 20), torch.zeros(2, 20))


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0, 12.0])
def test_an_error_is_never_larger_than_what_was_to_be_sent(power: float) -> None:
    """Whatever the numbers' spread: a residual cannot grow."""
    blocks = TwoBits(64)
    x = random.normal(random.key(3), 100 * 64).view(100, 64)
    x = x.sign() * x.abs() ** (1 + power)
    error = blocks.decode(blocks.encode(x), 64) - x
    assert bool((error.square().sum(-1) <= x.square().sum(-1) * (1 + 2**-6)).all())


def test_two_bits_rounded_stochastically_have_no_bias() -> None:
    blocks, draws = TwoBits(16), 20_000
    x = random.normal(random.key(7), 16)
    keys = random.keys(1, 0, torch.arange(draws), "rounding")
    v = blocks.decode(blocks.encode(x.expand(draws, 16), keys), 16).double()
    error = (v.mean(0) - x.double()).abs()
    assert bool((error <= 5 * (v.var(0) / draws).sqrt() + 1e-6).all())


def test_magnitudes_that_are_none_are_refused() -> None:
    blocks = TwoBits(8)
    for low, high in ((2.0, 1.0), (-1.0, 1.0), (0.0, torch.inf), (torch.nan, 1.0)):
        record = blocks.encode(torch.ones(1, 8))
        record[..., :4] = torch.tensor([low, high]).bfloat16().view(torch.uint8)
        with pytest.raises(
            MessageError, match="expected two finite magnitudes of a block, 0 ≤ lower ≤ upper"
        ):
            blocks.decode(record, 8)


def test_bits_of_a_value_and_its_index() -> None:
    up = codec("sparseloco", 1_000_000)
    nbytes = up.nbytes()
    assert nbytes is not None
    assert 8 * nbytes / round(0.03 * 1_000_000) < 9.7  # 2.5 a value, 7 an index


def test_another_outer_rule_is_refused() -> None:
    values = {**SMALL, "method": "sparseloco", "server": {"optimizer": "nesterov", "lr": 0.7}}
    with pytest.raises(ConfigError, match=r"server\.optimizer: expected sgd with sparseloco"):
        load(config.parse(values))
    net = nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ConfigError, match="outer: expected sgd with sparseloco"):
        fedmpi.local_sgd(net, optimizer, "sparseloco", comm=solo())
    fedmpi.local_sgd(net, optimizer, "sparseloco", comm=solo(), outer="sgd")
