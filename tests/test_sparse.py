"""How the values and indices of sparse messages are coded."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmpi import config, methods, random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message
from fedmpi.method import Compressor, Context
from fedmpi.methods.base import Setup
from fedmpi.methods.sparse import Coder
from fedmpi.methods.values import Values
from fedmpi.spec import Spec

from .codecs import codec, context
from .conftest import SMALL
from .kernels import keys, quick, same, smallest


def drawn(key: int, size: int, count: int, rows: int = 2) -> Tensor:
    each = [random.sample(random.key(key, stream=f"{i}"), size, count).sort().values for i in range(rows)]
    return torch.stack(each)


def elias_fano(index_K: list[int], size: int, low: int) -> tuple[list[int], list[int]]:
    """The low bits of each, and the map, bit by bit."""
    bits = [index >> b & 1 for index in index_K for b in range(low)]
    unary: list[int] = []
    high = 0
    for index in index_K:
        unary += [0] * ((index >> low) - high) + [1]
        high = index >> low
    return bits, unary + [0] * (len(index_K) + ((size - 1) >> low) - len(unary))


@given(st.integers(1, 1000), st.floats(0, 1), keys)
@quick
def test_coded_indices_are_elias_fanos(size: int, share: float, key: int) -> None:
    """By torch and by kernels, against a transcription bit by bit."""
    count = max(1, round(share * size))
    index_CK, coder = drawn(key, size, count), Coder("coded", count, size)
    arrays = {}
    for least in (0, sys.maxsize):
        with smallest(least):
            arrays = coder.encode(index_CK)
            for name, field in coder.layout().items():
                assert arrays[name].shape == (2, *field.row)
            assert same(coder.decode(Message(arrays)), index_CK)
            for c in range(2):
                low, unary = elias_fano(index_CK[c].tolist(), size, coder.width)
                for name, expected in (("index", low), ("map", unary)):
                    packed = np.packbits(np.array(expected, dtype=np.uint8), bitorder="little")
                    assert arrays[name][c].tolist() == packed.tolist()
    entropy = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    used = count * coder.width + coder.map
    assert entropy / math.log(2) - 1e-6 <= used <= count * (2 + math.ceil(math.log2(size / count)))


@pytest.mark.parametrize(("ratio", "most"), [(0.01, 8.6), (0.001, 12.0), (0.1, 5.3)])
def test_bits_of_an_index_of_a_large_vector(ratio: float, most: float) -> None:
    size = 5_000_000
    count = int(ratio * size)
    coder = Coder("coded", count, size)
    assert 8 * sum(field.row[0] for field in coder.layout().values()) / count <= most
    index_CK = drawn(1, size, count, rows=1)
    assert torch.equal(coder.decode(Message(coder.encode(index_CK))), index_CK)


def test_bytes_at_one_percent_are_less_than_half() -> None:
    """bf16 values and coded indices: 24.6 bits of 55 in a model of five million, 13.1 with 4 bits."""
    size = 5_000_000
    spec = Spec(("w",), ((size,),))
    nbytes = []
    for values, indices in (("float32", "packed"), ("bf16", "coded"), ("int4", "coded")):
        options = {"name": "topk", "ratio": 0.01, "values": values, "indices": indices}
        nbytes.append(methods.build(options, spec, Setup()).up.nbytes() or 0)
    assert nbytes[0] / nbytes[1] >= 2.2
    assert nbytes[0] / nbytes[2] >= 4.1


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("count", [1, 63, 64, 200])
def test_values_are_rounded_to_the_nearest(kind: Any, count: int) -> None:
    v_CK = random.normal(random.keys(1, 0, torch.arange(3), "v"), count)
    v_CK[1] = 0
    values = Values(kind, count)
    array = values.encode(v_CK)
    assert tuple(array.shape[1:]) == values.layout()["values"].row
    got = values.decode(array)
    if kind == "bf16":
        assert torch.equal(got, v_CK.bfloat16().float())
        return
    half = 2 ** (int(kind[3:]) - 1) - 1
    for c in range(3):
        for part in range(0, count, 64):
            x = v_CK[c, part : part + 64].double()
            scale = x.abs().max()
            expected = (x / scale * half).round() / half * scale if scale else x
            assert torch.allclose(got[c, part : part + 64].double(), expected, rtol=1e-6, atol=1e-7)


def sent(up: Compressor, g_CD: Tensor, ctx: Context) -> Tensor:
    return up.decompress(up.compress(g_CD, {}, ctx)[0], {}, ctx)[0]


@pytest.mark.parametrize("name", ["topk", "rtopk"])
def test_coding_changes_what_travels_and_not_what_is_chosen(name: str) -> None:
    ctx = context(4)
    g_CD = random.normal(random.keys(2, 0, ctx.clients_C, "g"), 3000)
    plain = sent(codec(name, 3000, ratio=0.05), g_CD, ctx)
    assert torch.equal(sent(codec(name, 3000, ratio=0.05, indices="coded"), g_CD, ctx), plain)
    halves = codec(name, 3000, ratio=0.05, indices="coded", values="bf16")
    assert torch.equal(sent(halves, g_CD, ctx), plain.bfloat16().float())
    total_CS, weights = torch.zeros(4, 3000), [0.5, 1.0, -1.0, 2.0]
    halves.add(total_CS, halves.compress(g_CD, {}, ctx)[0], {}, ctx, weights)
    assert torch.equal(total_CS, plain.bfloat16().float() * torch.tensor(weights)[:, None])


def test_random_values_stay_unbiased() -> None:
    ctx = context(4000)
    v_D = random.normal(random.key(1), 40)
    up = codec("randomk", 40, ratio=0.5, values="int4")
    v_CD = sent(up, v_D.expand(4000, -1), ctx).double()
    error_D = (v_CD.mean(0) - v_D.double()).abs()
    assert (error_D <= 5 * (v_CD.var(0) / 4000).sqrt() + 1e-6).all()


def test_what_no_sender_could_have_sent_is_refused() -> None:
    up, ctx = codec("topk", 1000, k=40, indices="coded", values="bf16"), context(2)
    g_CD = random.normal(random.keys(2, 0, ctx.clients_C, "g"), 1000)

    def wrong(name: str, byte: int, value: float, sentence: str) -> None:
        message, _ = up.compress(g_CD, {}, ctx)
        message.arrays[name][1, byte] = value
        with pytest.raises(MessageError, match=sentence):
            up.decompress(message, {}, ctx)

    wrong("map", 0, 255, "message: a map of 4. indices, expected 40")
    wrong("values", 3, math.inf, "message: expected finite values")
    beyond = Coder("coded", 2, 1000)
    arrays = beyond.encode(torch.tensor([[3, 999]]))
    arrays["index"].fill_(255)
    with pytest.raises(MessageError, match=r"message: index 10.., expected less than 1000"):
        beyond.decode(Message(arrays))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            {"name": "topk", "values": "int3"},
            "method.values: expected 'float32', 'bf16', 'int8', 'int4' or 'int2', got 'int3'",
        ),
        ({"name": "topk", "indices": "rice"}, "method.indices: expected 'packed' or 'coded', got 'rice'"),
        ({"name": "randomk", "indices": "coded"}, "method.indices: unknown key"),
    ],
)
def test_wrong_options(method: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse({**SMALL, "method": method})
    assert sentence in str(error.value)
