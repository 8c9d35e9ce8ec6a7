"""Block-wise quantisation against plain loops, and its averaging by parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedmpi import config, methods, random
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError, MessageError
from fedmpi.meet import ways
from fedmpi.meet.base import Roster
from fedmpi.method import Compressor, Round
from fedmpi.methods.base import Setup
from fedmpi.methods.blocks import _NORMAL, Blocks
from fedmpi.spec import Spec

from .codecs import codec, context
from .conftest import SMALL

KINDS = [
    {"bits": 8},
    {"bits": 8, "rounding": "nearest"},
    {"bits": 4},
    {"bits": 4, "rounding": "nearest"},
    {"bits": 4, "levels": "normal"},
    {"bits": 4, "levels": "normal", "rounding": "nearest"},
]


def decoded(up: Compressor, g_CD: torch.Tensor) -> torch.Tensor:
    ctx = context(len(g_CD))
    return up.decompress(up.compress(g_CD, {}, ctx)[0], {}, ctx)[0]


def levels_of(options: dict[str, Any]) -> list[float]:
    if options.get("levels") == "normal":
        return list(_NORMAL)
    half = 2 ** (options["bits"] - 1) - 1
    return [i / half for i in range(-half, half + 1)]


def quantise(x: np.ndarray, levels: list[float], u: np.ndarray | None) -> tuple[float, list[int]]:
    """A block's scale and codes, entry by entry."""
    scale, codes = float(np.abs(x).max()), []
    for i, value in enumerate(x.tolist()):
        ratio = value / scale if scale else 0.0
        low = max(j for j, level in enumerate(levels) if level <= ratio + 1e-9)
        high = min(low + 1, len(levels) - 1)
        gap = levels[high] - levels[low]
        part = (ratio - levels[low]) / gap if gap else 0.0
        codes.append(high if (part > 0.5 if u is None else float(u[i]) < part) else low)
    return scale, codes


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_codes_are_those_of_plain_loops(options: dict[str, Any]) -> None:
    """Three clients, blocks of 16, the last one short; a block of zeros."""
    size, block = 100, 16
    up, ctx = codec("blockwise", size, block=block, **options), context(3)
    g_CD = random.normal(random.keys(1, 0, ctx.clients_C, "g"), size)
    g_CD[1, 16:32] = 0
    message, _ = up.compress(g_CD, {}, ctx)
    record, levels = 4 + block * options["bits"] // 8, levels_of(options)
    v_CD, _ = up.decompress(message, {}, ctx)
    for c in range(3):
        u = None if "rounding" in options else random.uniform(random.key(4, 0, c, "rounding"), 112).numpy()
        raw = message.arrays["blocks"][c].numpy()
        assert len(raw) == 7 * record
        padded = np.pad(g_CD[c].numpy(), (0, 12))
        for n in range(7):
            part = slice(n * block, (n + 1) * block)
            scale, codes = quantise(padded[part], levels, None if u is None else u[part])
            bytes_ = raw[n * record : (n + 1) * record]
            got = bytes_[4:].tolist()
            if options["bits"] == 4:
                got = [code for byte in got for code in (byte & 15, byte >> 4)]
            assert bytes_[:4].view(np.float32)[0] == np.float32(scale)
            assert got == codes, (c, n)
            expected = np.array([levels[code] * scale for code in codes])[: len(v_CD[c, part])]
            assert np.allclose(v_CD[c, part].numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "levels": "normal"}], ids=str)
def test_stochastic_rounding_is_unbiased(options: dict[str, Any]) -> None:
    draws, size = 4000, 40
    v_D = random.normal(random.key(1), size)
    v_CD = decoded(codec("blockwise", size, block=20, **options), v_D.expand(draws, -1)).double()
    error_D = (v_CD.mean(0) - v_D.double()).abs()
    assert (error_D <= 5 * (v_CD.var(0) / draws).sqrt() + 1e-6).all()
    assert v_CD.var(0).max() > 0


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "levels": "normal"}, {"bits": 8}], ids=str)
def test_with_feedback_no_error_is_larger_than_its_entry(options: dict[str, Any]) -> None:
    g_CD = random.normal(random.keys(2, 0, torch.arange(4), "g"), 512) ** 5
    error_CD = (decoded(codec("blockwise", 512, rounding="nearest", **options), g_CD) - g_CD).abs()
    assert (error_CD <= g_CD.abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("ranks", "options"), [(3, {"bits": 4}), (4, {"bits": 8}), (3, {"bits": 4, "levels": "normal"})]
)
def test_ranks_share_out_the_averaging(ranks: int, options: dict[str, Any]) -> None:
    """What each rank sends, counted by its end; the mean is that of the messages, rounded once more without bias."""
    size, block = 50_000, 64
    spec, rounds = Spec(("w",), ((size,),)), 12
    g_WD = random.normal(random.keys(3, 0, torch.arange(ranks), "g"), size)

    def job(comm: Comm) -> tuple[torch.Tensor, torch.Tensor, int]:
        up = methods.build({"name": "blockwise", "block": block, **options}, spec, Setup()).up
        way, means, sent = ways.build(comm, up), [], 0
        assert way.name == "merge"
        for t in range(rounds):
            roster, here = Roster.of_ranks(comm, Round(5, t, 1.0), {}), torch.tensor([comm.rank])
            message, _ = up.compress(g_WD[comm.rank : comm.rank + 1], {}, roster.ctx(here))
            way.open(roster)
            way.take(roster.weights[here], message, {}, roster.ctx(here))
            before = comm.sent
            mean = way.send()()
            sent = comm.sent - before
            assert mean is not None
            everybody = up.compress(g_WD, {}, roster.ctx(torch.arange(ranks)))[0]
            exact = up.decompress(everybody, {}, roster.ctx(torch.arange(ranks)))[0].mean(0)
            means.append(mean - exact)
        return torch.stack(means), mean, sent

    got = run_ranks(ranks, job)
    assert all(torch.equal(mean, got[0][1]) for _, mean, _ in got)
    bits = options["bits"]
    bound = 1.05 * 2 * (ranks - 1) / ranks * size * (bits / 8 + 4 / block)
    assert all(sent <= bound for _, _, sent in got), (got[0][2], bound)
    error = got[0][0].double()
    step = 3.5 * (0.31 if "levels" in options else 1 / (2 ** (bits - 1) - 1))
    assert 0 < float(error.abs().max()) <= step
    assert float(error.mean(0).abs().mean()) < float(error.abs().mean()) / 2, "drawn anew, without bias"


def test_large_numbers_small_ones_and_zeros() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    g_CD = torch.zeros(3, 10)
    g_CD[0], g_CD[1, 3] = largest, -smallest
    for options in KINDS:
        v_CD = decoded(codec("blockwise", 10, block=4, **options), g_CD)
        assert torch.equal(v_CD, g_CD), options


def test_what_no_sender_could_have_sent_is_refused() -> None:
    up, ctx = codec("blockwise", 20, block=8, bits=4), context(2)
    for byte, value, sentence in ((3, 255, "finite scales"), (4, 255, "code 15, expected less than 15")):
        message, _ = up.compress(torch.ones(2, 20), {}, ctx)
        message.arrays["blocks"][1, byte] = value
        with pytest.raises(MessageError, match=sentence):
            up.decompress(message, {}, ctx)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 6}, "method.bits: expected 4 or 8, got 6"),
        ({"block": 7}, "method.block: expected a multiple of 2, got 7"),
        ({"levels": "normal"}, "levels: expected linear with bits: 8, got normal"),
        (
            {"feedback": True, "rounding": "stochastic"},
            "rounding: expected nearest with feedback, got stochastic",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse({**SMALL, "method": {"name": "blockwise", **options}})
    assert sentence in str(error.value)


def test_bytes_of_a_large_model() -> None:
    size = 100_003
    message, _ = codec("blockwise", size, bits=4, block=64).compress(torch.ones(1, size), {}, context(1))
    assert message.nbytes().tolist() == [math.ceil(size / 64) * (4 + 32)]


def test_a_single_block_of_a_single_client() -> None:
    """Whose scale is a contiguous slice of bytes that cannot be looked at as a float32."""
    x_1n = torch.linspace(-1, 1, 38)[None]
    blocks = Blocks(4, 38, normal=False)
    assert float((blocks.decode(blocks.encode(x_1n), 38) - x_1n).abs().max()) <= 1 / 14
