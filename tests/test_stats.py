"""What drop-ins tell of themselves: steps, bytes and seconds of one span, a line at the end, auto's reasons."""

from __future__ import annotations

import gc
import logging
import warnings
from typing import Any

import pytest
import torch

import fedmpi
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.integrations.auto import Auto, Link, Took, verdict
from fedmpi.integrations.job import Job
from fedmpi.integrations.reducer import Reducer
from fedmpi.integrations.say import say_at_end, summary

SHAPES = {"small": (4,), "a": (20, 10), "b": (10, 30)}
TOPK = {"name": "topk", "ratio": 0.1, "feedback": True}
SETTINGS = {"exact_below": 100}


def step(job: Job) -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    job.average(parameters, None)


def test_steps_bytes_and_seconds_are_of_the_same_span() -> None:
    def run(comm: Comm) -> Any:
        job = Job(SHAPES, TOPK, comm, SETTINGS)
        for _ in range(5):
            step(job)
        before = job.stats()
        again = Job(SHAPES, TOPK, comm, SETTINGS)
        again.load_state_dict(job.state_dict())
        for _ in range(3):
            step(again)
        after = again.stats()
        wrapped = Job(SHAPES, TOPK, comm, SETTINGS)
        wrapped.load_state_dict(again.state_dict())
        wrapped.follow(again)
        step(wrapped)
        return before, after, wrapped.stats(), job.table()

    for before, after, wrapped, table in run_ranks(2, run):
        assert (before["step"], before["steps"], before["timed_steps"]) == (5, 5, 3)
        assert (after["step"], after["steps"], after["timed_steps"]) == (8, 3, 1)
        assert (wrapped["step"], wrapped["steps"]) == (9, 4), "a wrapper made anew goes on with the figures"
        for name in ("payload_bytes", "uncompressed_bytes"):
            assert before[name] / 5 == after[name] / 3 == wrapped[name] / 4, name
        assert wrapped["wire_sent_bytes"] > after["wire_sent_bytes"] > 0
        assert after["uncompressed_bytes"] == 3 * 4 * 504
        lines = table.splitlines()
        assert len(lines) == 3
        assert lines[1].split()[:6] == ["b", "…", "a", "(2)", "500", "topk"]
        assert lines[-1].split()[:3] == ["small", "4", "dense"]


@pytest.mark.parametrize("unscale", [False, True])
def test_gradients_that_a_scaler_scaled_without_being_given_are_noticed(unscale: bool) -> None:
    """What is averaged is then as with the scaler given, from the second step on."""

    def run(comm: Comm, given: bool) -> Any:
        net = torch.nn.Linear(20, 10, bias=False)
        torch.nn.init.zeros_(net.weight)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        average = fedmpi.sync(net, TOPK, comm=comm, scaler=scaler if given else None, exact_below=0)
        kept = []
        for t in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 20, generator=torch.Generator().manual_seed(10 * t + comm.rank))
            scaler.scale(net(x).square().sum() + net(x).sum()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            average()
            kept.append(average.run(lambda job: job.reducer.groups[0].state["residual"].abs().max().item()))
            scaler.step(optimizer)
            scaler.update()
        return kept

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = run_ranks(2, lambda comm: run(comm, False))
    said = [str(w.message) for w in told if "scaler: expected the job's GradScaler" in str(w.message)]
    for kept in found:
        if unscale:
            assert max(kept) < 100
        else:
            assert kept[0] > 1000 > 100 > max(kept[1:]), "in the gradients' own units from there on"
    assert len(said) == (0 if unscale else 2), "on each rank"
    if not unscale:
        given = run_ranks(2, lambda comm: run(comm, True))
        assert max(max(kept) for kept in given) < 100


def test_the_first_steps_seconds_are_apart() -> None:
    def run(comm: Comm) -> Any:
        reducer = Reducer(SHAPES, TOPK, comm, **SETTINGS)
        told = []
        for _ in range(4):
            for group in reducer.groups:
                group.seconds["encode"] += 100.0 if reducer._reduced < 2 else 1.0
            reducer.reduce(*range(len(reducer.groups)))
            told.append(reducer.stats())
        return told

    first, second, third, fourth = run_ranks(1, run)[0]
    assert (first["encode_seconds"], second["encode_seconds"]) == (0, 0)
    assert 400 <= second["warmup_seconds"] < 402
    assert second["warmup_seconds"] == fourth["warmup_seconds"]
    assert 2 <= third["encode_seconds"] < 3 < 4 <= fourth["encode_seconds"] < 6


def test_a_line_at_the_end() -> None:
    stats = {
        "method": "signsgd",
        "steps": 1200,
        "skipped": 3,
        "payload_bytes": 3.2e9,
        "uncompressed_bytes": 86.4e9,
        "timed_steps": 1000,
        "encode_seconds": 4.1,
        "wire_seconds": 2.0,
        "decode_seconds": 1.0,
        "warmup_seconds": 2.5,
    }
    assert summary(stats) == (
        "signsgd: 1,200 steps and 3 skipped, 3.2 GB sent a rank instead of 86.4 GB (27.0x smaller); ms a step: encode "
        "4.1, wire 2.0, decode 1.0 (without 2.50 s of the first two)"
    )
    assert summary(stats | {"steps": 0, "skipped": 0}) == ""


def test_a_job_that_is_gone_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        pass

    kept: list[Any] = []
    monkeypatch.setattr("atexit.register", kept.append)
    monkeypatch.setattr("atexit.unregister", kept.remove)
    job = Gone()
    say_at_end(1, job, lambda job: {})
    assert not kept, "rank 0 alone"
    say_at_end(0, job, lambda job: {})
    assert len(kept) == 1
    del job
    gc.collect()
    assert not kept


def test_a_winner_is_faster_by_a_margin_and_by_more_than_the_noise() -> None:
    bf16 = Took(0.100, 0.095, 0.105)
    close, clear, noisy = Took(0.095, 0.094, 0.096), Took(0.050, 0.048, 0.052), Took(0.080, 0.060, 0.120)
    assert verdict([bf16, close], 0.1) == (0, "no candidate saves 10% of bf16's step")
    assert verdict([bf16, close, clear], 0.1) == (2, "50% less than bf16's step, at least 10% was asked for")
    assert verdict([bf16, noisy], 0.1) == (
        0,
        "inconclusive: 20% less than bf16's step, but steps differ by as much among themselves",
    )


AUTO = {"name": "auto", "candidates": ["signsgd"], "steps": 3, "recheck": 2}


def test_auto_says_what_it_measured_and_notices_another_link(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmpi")
    monkeypatch.setattr(logging.getLogger("fedmpi"), "propagate", True)
    looks = {"now": Link(0.001, 0.003, 2)}

    def took(self: Auto, mine: Any) -> list[float]:
        return [0.1, 0.09, 0.11] if self.plain else [0.02, 0.019, 0.021]

    monkeypatch.setattr(Auto, "_slowest", took)
    monkeypatch.setattr(Auto, "_look", lambda self: (looks["now"], 0.0))

    def run(comm: Comm) -> Any:
        job, told = Job(SHAPES, AUTO, comm, SETTINGS), []
        for t in range(24):
            looks["now"] = Link(0.001, 0.003 if t < 12 else 0.2, 2)
            step(job)
            told.append(job.stats()["auto"]["chosen"])
        return told, job.stats()

    told, stats = run_ranks(2, run)[0]
    first = told.index(None, 8)  # measured anew from here
    assert told[7]["name"] == "signsgd"
    assert 12 <= first <= 17, "two looks at it"
    assert told[-1]["name"] == "signsgd"
    assert (stats["steps"], stats["step"]) == (24, 24)
    assert stats["uncompressed_bytes"] == 24 * 4 * 504, "of all methods that were tried"
    lines = [record.message for record in caplog.records]
    assert lines[0] == (
        "auto: ms a step: bf16 100.0 (90.0 … 110.0), signsgd 20.0 (19.0 … 21.0); link 1.04 Gb/s, latency 1.00 ms; "
        "chosen: signsgd (80% less than bf16's step, at least 10% was asked for)"
    )
    assert lines[1] == (
        "auto: the link was 1.04 Gb/s, latency 1.00 ms and is 10.5 Mb/s, latency 1.00 ms: all is measured anew"
    )
    assert lines[2].startswith("auto: ms a step: bf16 100.0")
    assert len(lines) == 3
    assert stats["auto"]["why"].startswith("80% less")


def test_a_link_is_another_one_if_it_shows_in_a_step() -> None:
    before = Link(0.001, 0.003, 2)
    assert before.bandwidth == pytest.approx(4 * (2**16 - 2**8) / 0.002)
    assert not Link(0.001, 0.2, 2).like(before, 0.02)
    assert not before.like(Link(0.001, 0.2, 2), 0.02), "faster, too"
    assert Link(0.002, 0.007, 2).like(before, 0.1), "4 ms of 100"
    assert Link(0.002, 0.005, 2).like(before, 0.001)
    assert str(Link(0.013, 0.012, 2)) == "faster than 256 kB show, latency 13.00 ms"


def test_looks_at_the_link_take_a_hundredth_of_the_time() -> None:
    def run(comm: Comm) -> Any:
        job = Job(SHAPES, AUTO, comm, SETTINGS)
        auto = job._auto
        assert auto is not None
        link, seconds = auto._look()
        auto.took = [Took(0.1, 0.1, 0.1), Took(0.05, 0.05, 0.05)]
        auto._next_look(2.0)
        return link, seconds, auto._look_at

    for link, seconds, look_at in run_ranks(2, run):
        assert link.bandwidth > 0
        assert seconds > 0
        assert look_at == 2.0 / 0.01 / 0.05
