"""Compressors that tell whether the gradients were finite, of numbers in any place, by kernels and by torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.engine.updates import check_fits_float32
from fedmpi.errors import NumericalError
from fedmpi.method import Context, Round
from fedmpi.methods.base import Setup
from fedmpi.ops import bits

from .kernels import by_kernel, by_torch, normals
from .test_conformance import CASES, SPEC


def telling() -> list[str]:
    def tells(options: dict[str, Any]) -> bool:
        method = methods.build(options, SPEC, Setup())
        return any(codec.tells for codec in method.passes)

    return [name for name, options in CASES.items() if tells(options)]


@pytest.mark.parametrize("name", telling())
def test_messages_tell_of_any_number_that_is_not_finite(name: str) -> None:
    method = methods.build(CASES[name], SPEC, Setup())
    codec = next((codec for codec in method.passes if codec.tells), method.up)
    state = {n: v[None].expand(2, *v.shape).clone() for n, v in codec.init().items()}
    if codec is not method.up:
        state = {n: v[None].expand(2, *v.shape).clone() for n, v in method.up.init().items()}
    shared = method.directions().shared(method.directions().memory())
    ctx = Context(Round(1, 2, 0.1), torch.arange(2), torch.ones(2, dtype=torch.int64), shared)

    def finite(g_CD: Tensor) -> bool | None:
        return codec.compress(g_CD, state, ctx)[0].finite

    assert finite(normals(1, 2, SPEC.size)) is True
    assert finite(torch.zeros(2, SPEC.size)) is True
    for bad in (math.nan, math.inf, -math.inf):
        for place in {*range(0, SPEC.size, 17), SPEC.size - 1}:
            g_CD = normals(1, 2, SPEC.size)
            g_CD[1, place] = bad
            assert finite(g_CD) is False, f"{bad} in place {place}"


def test_some_tell() -> None:
    assert {"signsgd", "signsgd mean", "powersgd", "intrinsic"} <= set(telling())


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_packing_signs_finds_what_is_not_finite(size: int) -> None:
    keys_C = torch.arange(2)
    for way in (by_kernel, by_torch):
        for bad in (math.nan, -math.nan, math.inf, -math.inf, 3.4e38, 1e-45, -0.0):
            for place in {0, size // 2, size - 1}:
                g_CN, odd_1 = normals(5, 2, size), torch.zeros(1, dtype=torch.uint8)
                g_CN[1, place] = bad
                way(bits.pack_signs, g_CN, keys_C, odd_1)
                assert bool(odd_1) == (not math.isfinite(bad)), (bad, place)


@pytest.mark.parametrize("name", [name for name in CASES if "over" not in name])
def test_a_message_of_huge_gradients_is_finite_or_refused(name: str) -> None:
    method = methods.build(CASES[name], SPEC, Setup())
    codec = method.passes[0]
    state = {n: v[None].expand(2, *v.shape).clone() for n, v in method.up.init().items()}
    shared = method.server.shared(method.server.init(torch.zeros(SPEC.size)))
    ctx = Context(Round(1, 0, 0.1), torch.arange(2), torch.ones(2, dtype=torch.int64), shared)
    for g_CD in (torch.full((2, SPEC.size), 3e38), torch.full((2, SPEC.size), 1e-42)):
        message, _ = codec.compress(g_CD, state, ctx)
        if all(a.isfinite().all() for a in message.arrays.values() if a.is_floating_point()):
            check_fits_float32(message, {}, 0)
            continue
        assert float(g_CD[0, 0]) > 1, "denormals"
        with pytest.raises(NumericalError, match="beyond the largest float"):
            check_fits_float32(message, {}, 0)
