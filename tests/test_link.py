"""The link bench: real ranks in network namespaces, its arithmetic, what it says where there can be no link. And what
the hook does for it: nothing over bf16 where that stays, the same memory in every step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.studies import link, link_report, netns
from configs.studies.__main__ import main as studies
from configs.studies.link_cases import ALONE, BOUND, CASES, OURS, POWERSGD, REFERENCE
from configs.studies.link_driver import Job
from configs.studies.link_job import MODELS
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError
from fedmpi.integrations.reducer import Reducer
from fedmpi.methods.lowrank import orthonormal, orthonormal_reference, set_product, subtract_product
from fedmpi.ops.sums import absolute, absolute_reference


def possible() -> bool:
    try:
        netns.require()
        with netns.Pair([["cat"]] * 2, [dict(os.environ)] * 2):
            return True
    except ConfigError:
        return False


@pytest.mark.slow  # the study's own; that bytes are counted right: tests/test_ddp.py
def test_steps_and_bytes_across_a_link() -> None:
    """Bytes by the interface: bf16 sends half of fp32, signs a sixteenth of bf16; auto that has chosen bf16 sends what
    the bf16 hook sends, and where its steps are bf16 it learns the same to the bit."""
    if not possible():
        pytest.skip("no network namespaces for us here (the study says what it takes)")
    plain = {"method": {"name": "auto", "candidates": ["dense"], "steps": 3, "margin": 0.99}}
    cases = {
        "fp32": {"plain": "fp32"},
        "bf16": {"plain": "bf16"},
        "signs": {"method": "signsgd"},
        "auto": plain,
        "nothing": CASES[ALONE].options,
        "one number": CASES[BOUND].options,
    }
    with Job(name="digits") as job:
        job.pair.shape(1e8)
        sent, sums = {}, {}
        for name, case in cases.items():
            job.start(name, case, lr=0.01, batch=8)
            job.ask("steps", name, count=3)
            sums[name] = job.ask("checksum", name)["bits"]
            job.ask("steps", name, count=5)
            sent[name] = job.ask("steps", name, count=4)["sent"] / 4
        stats = job.ask("stats", "auto")
        assert stats["auto"]["chosen"]["name"] == "bf16"
        assert 2 * job.parameters <= sent["bf16"] <= 1.15 * 2 * job.parameters
        assert sent["nothing"] < 100, (
            "but for what TCP itself sends: an acknowledgement that came late has 66 bytes"
        )
        assert 0 < sent["one number"] < 1000
        assert sums["one number"] == sums["nothing"] != sums["fp32"], "each rank keeps its own gradients"
        assert sent["fp32"] == pytest.approx(2 * sent["bf16"], rel=0.1)
        assert sums["auto"] == sums["bf16"] != sums["fp32"], "after its first steps, which are plain"
        assert sent["signs"] < sent["bf16"] / 8
        assert sent["auto"] == pytest.approx(sent["bf16"], rel=0.05)
        with pytest.raises(ConfigError, match="rank"):
            job.start("wrong", {"method": {"name": "powersgd", "rank": 0}}, lr=0.01)
        assert job.ask("accuracy", "bf16", count=50)["accuracy"] >= 0


def test_the_models_have_about_as_many_parameters() -> None:
    sizes = {
        name: sum(p.numel() for p in make((1, 28, 28), 10).parameters()) for name, make in MODELS.items()
    }
    assert sizes == {"cnn": 1_663_370, "mlp": 1_863_690}


def test_the_ranks_and_their_namespaces_end_together() -> None:
    if not possible():
        pytest.skip("no network namespaces for us here (the study says what it takes)")
    with netns.Pair([["cat"]] * 2, [dict(os.environ)] * 2) as pair:
        spaces = {Path(f"/proc/{process.pid}/ns/net").readlink() for process in pair.processes}
        assert len(spaces | {Path("/proc/self/ns/net").readlink()}) == 3
        pair.shape(1e6)
        pair.shape(None)
        pair.tell("still there")
        assert pair.heard() == ["still there\n"] * 2
    assert all(process.returncode for process in pair.processes)


def test_who_cannot_have_a_link_is_told_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netns.os, "geteuid", lambda: 1000)
    assert studies(["link"]) == 2
    said = capsys.readouterr().err
    assert "making network namespaces needs root" in said
    assert "unshare --user --map-root-user --net python -m configs.studies link" in said
    monkeypatch.setattr(netns.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert studies(["link"]) == 2
    assert "needs tc (Debian, Ubuntu: apt-get install iproute2" in capsys.readouterr().err
    assert studies(["link", "--speed", "2 Gb/s"]) == 2
    assert (
        "--speed: expected one of unshaped, 1 Gb/s, 100 Mb/s, 10 Mb/s, got '2 Gb/s'"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        studies(["link", "--accuracy", "80"])
    assert "expected a share above 0 and below 1, got '80'" in capsys.readouterr().err


def test_turns_are_compared_with_the_references_around_them() -> None:
    turn = link.Turn(None, ["bf16 hook", "auto"])  # type: ignore[arg-type]
    turn.seconds, turn.sent = {"bf16 hook": [1.0, 3.0, 5.0], "auto": [2.0, 2.0, 9.0]}, {"auto": 5e5}
    row = turn.row("auto", "unshaped", link.SLOWER)
    assert (row.name, row.ratio.low, row.ratio.high) == ("auto, unshaped: 0.500 MB", 0.625, 0.875)
    assert row.met
    ours = OURS[0]
    found = {ours: (3.0, 140), REFERENCE: (12.0, 120), POWERSGD: (2.0, 100)}
    assert not link.compare(found, ours, REFERENCE, "100 Mb/s", 0.8, link.FASTER["100 Mb/s"]).met
    assert link.compare(found, ours, REFERENCE, "1 Gb/s", 0.8, link.FASTER["1 Gb/s"]).met
    assert not link.compare(found, ours, POWERSGD, "1 Gb/s", 0.8, 1.0).met


def test_steps_to_an_accuracy_are_by_three_looks() -> None:
    assert link.steps_to([0.9, 0.6, 0.6, 0.95, 0.95, 0.95], 0.8) == 5 * link.EVERY
    assert link.steps_to([0.7, 0.79, 0.8], 0.8) is None
    assert link.steps_to([], 0.8) is None


def test_break_even_counts_steps_and_seconds() -> None:
    def case(steps: int | None, *seconds: float) -> dict[str, object]:
        return {"median_steps": steps, "seconds_a_step": dict(zip(link.SPEEDS, seconds, strict=False))}

    bf16 = case(100, 1.0, 2.0, 11.0)
    # Twice the steps at 1 s each: 200 s, as long as bf16 at 1 Gb/s, whose 100 steps take 2 s each.
    assert link_report.break_even(case(200, 1.0, 1.0, 1.0), bf16) == pytest.approx(1e9)
    assert link_report.break_even(case(100, 0.9, 0.9, 0.9), bf16) == float("inf")
    assert link_report.break_even(case(2000, 1.0, 1.0, 1.0), bf16) is None
    assert link_report.break_even(case(None, 0.1, 0.1, 0.1), bf16) is None


def test_every_case_can_be_told_in_one_line() -> None:
    assert {REFERENCE, *OURS, POWERSGD} <= set(CASES)
    assert {REFERENCE, *OURS, POWERSGD, BOUND} <= set(link.cases("mlp")) <= set(link.cases("cnn"))
    for case in CASES.values():
        assert "\n" not in json.dumps(case.options)
        assert case.rate in case.rates
        assert case.mlp in (None, *case.rates)


METHODS = [
    "signsgd",
    {"name": "signsgd", "feedback": True},
    {"name": "topk", "ratio": 0.05, "feedback": True},
    {"name": "powersgd", "rank": 2, "feedback": True},
    {"name": "bf16", "feedback": True},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_use_the_same_memory(method: object) -> None:
    """From the third step on, no residual and no mean lies anywhere but where one lay before."""

    def places(comm: Comm) -> list[set[int]]:
        reducer = Reducer({"w": (300, 500)}, method, comm)  # type: ignore[arg-type]
        (group,) = reducer.groups
        seen = []
        for t in range(7):
            group.flat_D.copy_(
                torch.randn(150_000, generator=torch.Generator().manual_seed(10 * t + comm.rank))
            )
            reducer.reduce(0)
            kept = [way._kept.total_S for way in group.ways.values() if way._kept is not None]
            seen.append({x.data_ptr() for x in (*kept, *group.state.values())})
        return seen

    for seen in run_ranks(2, places):
        assert set().union(*seen[2:]) <= seen[1] | seen[2] | seen[0]
        assert all(seen[t] == seen[t - 2] for t in range(3, 7)), "two residuals take turns"


def test_a_saved_state_is_not_written_into() -> None:
    def drift(comm: Comm) -> bool:
        reducer = Reducer({"w": (300, 500)}, METHODS[2], comm)  # type: ignore[arg-type]
        for t in range(6):
            reducer.groups[0].flat_D.normal_(generator=torch.Generator().manual_seed(t))
            reducer.reduce(0)
            if t == 2:
                saved = reducer.state_dict()["groups"][0]["state"]["residual"]
                copy = saved.clone()
        return bool(torch.equal(saved, copy))

    assert run_ranks(2, drift) == [True, True]


def test_two_voters_agree_by_every_way() -> None:
    def votes(comm: Comm, exchange: str) -> list[Tensor]:
        reducer = Reducer({"w": (500, 300)}, "signsgd", comm, exchange=exchange)
        got = []
        for t in range(3):
            generator = torch.Generator().manual_seed(10 * t + comm.rank)
            reducer.groups[0].flat_D.copy_(torch.randn(150_000, generator=generator).round())
            reducer.reduce(0)
            got.append(reducer.groups[0].flat_D.clone())
        return got

    ways = [run_ranks(2, lambda comm, way=way: votes(comm, way))[0] for way in ("auto", "sum", "merge")]
    for other in ways[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ways[0], other, strict=True))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_products_of_factors_are_the_references_to_the_bit(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(401, rank, generator=generator), torch.randn(1, 333, rank, generator=generator)
    expected = torch.zeros(1, 401, 333)
    for r in range(rank):
        expected += left[None, :, r, None] * right[:, None, :, r]
    got = torch.empty_like(expected)
    set_product(got, left, right)  # 133,533 numbers: the kernel
    assert torch.equal(got, expected)
    start = torch.randn(1, 401, 333, generator=generator)
    rest = start.clone()
    subtract_product(rest, left, right)
    assert torch.equal(rest, start - expected)


def test_kernels_return_the_references_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(37, 5, generator=generator)
    p[:, 3] = p[:, 0] - 2 * p[:, 1]
    assert torch.equal(orthonormal(p, count=1 << 20), orthonormal_reference(p))
    v = torch.randn(2, 140_001, generator=generator)
    assert torch.equal(absolute(v), absolute_reference(v))
    assert torch.allclose(absolute(v), v.double().abs().sum(1), rtol=1e-12)
