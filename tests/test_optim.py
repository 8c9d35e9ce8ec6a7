"""fedmpi.optim.OneBitAdam: against a transcription of the paper's Algorithm 1, and against Adam."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmpi
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError

SHAPES = [(7, 5), (3,), (11,)]
WARMUP, STEPS, LR, B1, B2, EPS = 4, 12, 0.01, 0.9, 0.99, 1e-8


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(t: int, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * t + rank + 1)
    return [torch.randn(shape, generator=generator) * 10.0**i for i, shape in enumerate(SHAPES)]


def train(optimizer: Any, params: list[nn.Parameter], steps: range, rank: int) -> None:
    for t in steps:
        for p, g in zip(params, gradients(t, rank), strict=True):
            p.grad = g.clone()
        optimizer.step()


def made(comm: Comm, params: list[nn.Parameter], **more: Any) -> Any:
    return fedmpi.optim.OneBitAdam(params, LR, (B1, B2), EPS, warmup=WARMUP, comm=comm, **more)


def flat(tensors: list[Any]) -> Any:
    return np.concatenate([np.asarray(x.detach(), dtype=np.float64).ravel() for x in tensors])


def algorithm_1(ranks: int) -> Any:
    """Tang et al. 2021, in float64, with C of each part of a tensor that lies in a chunk."""
    x = flat(parameters())
    n = len(x)
    chunk = 8 * math.ceil(n / (8 * ranks))
    ends = np.cumsum([0, *(math.prod(s) for s in SHAPES)])
    cuts = sorted({*ends.tolist(), *range(0, n, chunk)})

    def C(y: Any) -> Any:
        out = np.empty_like(y)
        for a, b in pairwise(cuts):
            out[a:b] = np.linalg.norm(y[a:b]) / np.sqrt(b - a) * np.where(y[a:b] >= 0, 1.0, -1.0)
        return out

    m, v, delta, server = np.zeros(n), np.zeros(n), np.zeros((ranks, n)), np.zeros(n)
    for t in range(1, STEPS + 1):
        g = [flat(gradients(t - 1, i)) for i in range(ranks)]
        if t <= WARMUP:
            mean = sum(g) / ranks
            m, v = B1 * m + (1 - B1) * mean, B2 * v + (1 - B2) * mean**2
        else:
            sent = np.zeros(n)
            for i in range(ranks):
                own = B1 * m + (1 - B1) * g[i] + delta[i]
                delta[i] = own - C(own)
                sent += C(own) / ranks
            m, server = C(sent + server), sent + server - C(sent + server)
        frozen = min(t, WARMUP)
        u = m / (1 - B1**t) / (np.sqrt(v / (1 - B2**frozen)) + EPS)
        bound = max(1.0, (1 - B1) / np.sqrt(1 - B2)) if t > WARMUP else np.inf
        x = x - LR * np.clip(u, -bound, bound)
    return x


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_the_papers_algorithm(ranks: int) -> None:
    def job(comm: Comm) -> Any:
        params = parameters()
        optimizer = made(comm, params)
        train(optimizer, params, range(STEPS), comm.rank)
        return flat(params), optimizer.stats()

    found = run_ranks(ranks, job)
    for x, stats in found:
        assert np.array_equal(x, found[0][0]), "replicas are equal to the bit"
        np.testing.assert_allclose(x, algorithm_1(ranks), rtol=0, atol=2e-6)
        assert (stats["step"], stats["skipped"], stats["compressed"]) == (STEPS, 0, True)


def test_its_first_steps_are_adams_on_the_mean_gradient() -> None:
    def job(comm: Comm) -> Any:
        params = parameters()
        train(made(comm, params, weight_decay=0.1), params, range(WARMUP), comm.rank)
        return flat(params)

    params = parameters()
    adam = torch.optim.AdamW(params, LR, (B1, B2), EPS, weight_decay=0.1)
    for t in range(WARMUP):
        for p, a, b in zip(params, gradients(t, 0), gradients(t, 1), strict=True):
            p.grad = (a + b) / 2
        adam.step()
    for x in run_ranks(2, job):
        np.testing.assert_allclose(x, flat(params), rtol=0, atol=1e-6)


def test_a_bit_a_number_both_ways() -> None:
    n = 512 * 1000

    def job(comm: Comm) -> Any:
        p = nn.Parameter(torch.zeros(512, 1000))
        optimizer = fedmpi.optim.OneBitAdam([p], warmup=1, comm=comm)
        p.grad = torch.ones_like(p)
        optimizer.step()
        before = comm.sent
        optimizer.step()
        return comm.sent - before, optimizer.stats()["compressed_bytes_a_step"]

    for ranks in (2, 4):
        for sent, told in run_ranks(ranks, job):
            assert sent == told <= 1.05 * 2 * (ranks - 1) / ranks * n / 8


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks_and_leaves_no_trace() -> None:
    def job(comm: Comm, bad: tuple[int, ...]) -> Any:
        params = parameters()
        optimizer = made(comm, params)
        for t in range(STEPS):
            if t in bad:
                before = flat(params)
                for p, g in zip(params, gradients(99, comm.rank), strict=True):
                    p.grad = g * (math.inf if comm.rank == 1 else 1.0)
                optimizer.step()
                assert np.array_equal(flat(params), before)
            train(optimizer, params, range(t, t + 1), comm.rank)
        return flat(params), optimizer.skipped

    whole = run_ranks(2, lambda comm: job(comm, ()))
    for (x, skipped), (y, _) in zip(run_ranks(2, lambda comm: job(comm, (1, 8))), whole, strict=True):
        assert np.array_equal(x, y)
        assert skipped == 2


@pytest.mark.parametrize("cut", [2, 7])
def test_a_state_goes_on_to_the_bit(cut: int) -> None:
    def job(comm: Comm, stop: int | None) -> Any:
        params = parameters()
        optimizer = made(comm, params)
        train(optimizer, params, range(stop or STEPS), comm.rank)
        if stop:
            saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
            params = [nn.Parameter(value) for value in values]
            optimizer = made(comm, params)
            optimizer.load_state_dict(saved)
            train(optimizer, params, range(stop, STEPS), comm.rank)
        return flat(params)

    for x, y in zip(run_ranks(2, lambda c: job(c, None)), run_ranks(2, lambda c: job(c, cut)), strict=True):
        assert np.array_equal(x, y)


def test_numbers_of_little_variance_do_not_run_away() -> None:
    """One tensor's scale is all of its numbers', also of those that hardly had a gradient in the warm-up."""

    def job(comm: Comm) -> Tensor:
        p = nn.Parameter(torch.zeros(40))
        optimizer = fedmpi.optim.OneBitAdam([p], 0.01, warmup=2, comm=comm)
        for _ in range(6):
            p.grad = torch.ones(40)
            p.grad[:10] = 1e-12
            optimizer.step()
        return p.detach().clone()

    (p,) = run_ranks(1, job)
    assert float(p.abs().max()) <= 2 * 0.01 + 4 * 0.0317


def test_numbers_without_gradient_in_the_warmup_are_named_and_stay() -> None:
    def job(comm: Comm) -> Any:
        p = nn.Parameter(torch.zeros(40))
        optimizer = fedmpi.optim.OneBitAdam([p], warmup=2, comm=comm)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for t in range(5):
                p.grad = torch.ones(40)
                p.grad[:10] = float(t >= 2)
                optimizer.step()
        return p.detach().clone(), [str(w.message) for w in told]

    ((p, told),) = run_ranks(1, job)
    assert torch.equal(p[:10], torch.zeros(10))
    assert bool((p[10:] < 0).all())
    assert len(told) == 1
    assert "10 of 40 numbers had no gradient in the first 2 steps, and do not move from here on" in told[0]


def _wrong(call: Callable[[Comm], object]) -> str:
    with pytest.raises(ConfigError) as found:
        run_ranks(1, call)
    return str(found.value)


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    def loads(state: Any) -> Callable[[Comm], object]:
        return lambda comm: made(comm, parameters()).load_state_dict(state)

    other = run_ranks(2, lambda comm: made(comm, parameters()).state_dict())[1]
    double = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    for call, sentence in (
        (lambda comm: fedmpi.optim.OneBitAdam(parameters(), warmup=0, comm=comm), "warmup: expected a whole"),
        (lambda comm: made(comm, double), "parameter 0.0 (its group and place) is torch.float64"),
        (lambda comm: fedmpi.optim.OneBitAdam(parameters(), -1.0, warmup=1, comm=comm), "lr: expected"),
        (
            lambda comm: made(comm, parameters()).add_param_group({"params": parameters()}),
            "make a new OneBitAdam",
        ),
        (loads({}), "expected what OneBitAdam.state_dict() returned"),
        (loads(other), "expected that of rank 0 of 1, got rank 1's of 2"),
    ):
        assert sentence in _wrong(call)

    def scaled(comm: Comm) -> None:
        params = parameters()
        optimizer, scaler = made(comm, params), torch.amp.GradScaler("cpu")
        scaler.scale(params[0].sum()).backward()
        scaler.step(optimizer)

    assert "got a GradScaler's call" in _wrong(scaled)
