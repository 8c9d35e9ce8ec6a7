"""How one message a rank becomes their mean: every method by the way chosen for it, against decoding them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.engine.store import ClientStore
from fedmpi.errors import ConfigError
from fedmpi.meet import ways
from fedmpi.meet.base import Held
from fedmpi.method import Compressor, Context, Method, Round, believed
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .meeting import met
from .test_conformance import CASES, SPEC, gradients

STEPS = 5


def _context(method: Method, t: int, clients: Tensor) -> Context:
    server = method.server
    return Context(
        Round(1, t, 0.1, 2),
        clients,
        torch.ones_like(clients),
        server.shared(server.init(torch.zeros(SPEC.size))),
    )


def _reference(up: Compressor, method: Method, ranks: int) -> list[Tensor]:
    """The mean (of an integer method: the sum) of each step, all messages decoded in one place."""
    ids, means = torch.arange(ranks), []
    state, receiver = ClientStore(method.up.init).get(ids), ClientStore(up.init_peer)
    for t in range(STEPS):
        ctx = _context(method, t, ids)
        message, state = up.compress(gradients(t)[:ranks], state, ctx)
        v, peer = up.decompress(message, receiver.get(ids), ctx)
        receiver.put(ids, peer)
        means.append(v.sum(0, dtype=torch.int32) if up.integer else v.double().mean(0))
    return means


def _merged(up: Compressor, method: Method, ranks: int) -> list[Tensor]:
    """What a method's own merging makes of each step's messages, all of them in one place."""
    assert up.merge is not None
    ids, merged = torch.arange(ranks), []
    state = ClientStore(method.up.init).get(ids)
    for t in range(STEPS):
        ctx = _context(method, t, ids)
        message, state = up.compress(gradients(t)[:ranks], state, ctx)
        rows_WN = message.arrays[up.merge.array]
        whole_1N = up.merge(rows_WN, 0, ctx.round)[None]
        merged.append(up.decompress(up.merge.message(whole_1N), {}, ctx)[0][0])
    return merged


def _exchanged(options: dict[str, Any], comm: Comm, way: ways.Name, exact: bool) -> list[list[Tensor]]:
    method = methods.build(options, SPEC, Setup(seed=1))
    results = []
    for up in method.passes:
        try:
            built = ways.build(comm, up, way, exact)
        except ConfigError:
            return []
        means = []
        state = {name: value[None].clone() for name, value in method.up.init().items()}
        for t in range(STEPS):
            ctx = _context(method, t, torch.tensor([comm.rank]))
            message, after = up.compress(gradients(t)[comm.rank][None], state, ctx)
            assert isinstance(built.peers, Held)
            kept = built.peers.state
            assert met(built, message, state, ctx, usable=comm.rank != 1) is None
            assert built.peers.state is kept
            mean = met(built, message, state, ctx)
            assert mean is not None
            peers = built.peers.state
            if comm.rank == getattr(built, "owner", comm.rank):
                for name, value in believed(up, after).items():
                    assert name not in peers or torch.equal(peers[name][comm.rank], value[0])
            state = after
            means.append(mean)
        results.append(means)
    return results


@pytest.mark.parametrize("way", ["auto", "sum", "gather", "merge", "owner"])
@pytest.mark.parametrize("name", CASES)
def test_every_method_by_every_way(name: str, way: ways.Name) -> None:
    ranks = 3
    options = CASES[name]
    answers = run_ranks(ranks, lambda comm: _exchanged(options, comm, way, exact=False))
    method = methods.build(options, SPEC, Setup(seed=1))
    if way == "merge" and any(up.merge is None for up in method.passes):
        assert answers == [[]] * ranks, "refused with a named error"
        return
    for up, *by_rank in zip(method.passes, *answers, strict=True):
        for t, expected in enumerate(_reference(up, method, ranks)):
            for means in by_rank:
                assert torch.equal(means[t], by_rank[0][t]), "all ranks get the same bits"
            got = by_rank[0][t]
            if (
                up.integer
                and got.dtype == torch.int8
                and int(got.abs().max()) == 1
                and way in ("auto", "merge")
            ):
                assert torch.equal(got > 0, expected > 0), "only the majority"
            elif up.integer:
                assert torch.equal(got.int(), expected)
            else:
                scale = float(expected.abs().max())
                rounded = up.merge is not None and way in ("auto", "merge")
                if rounded:  # again, each rank its part: as all of it at once
                    assert torch.equal(got, _merged(up, method, ranks)[t])
                    if name.startswith("blockwise"):
                        continue  # how far that may go is said in test_blockwise.py
                assert torch.allclose(
                    got.double(), expected, rtol=0, atol=(4e-3 if rounded else 1e-6) * scale
                )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_votes_travel_packed(ranks: int) -> None:
    """Within 5 % of 2 (W − 1)/W · n/8 bytes, sent and received."""
    n = 1_000_000
    spec = Spec(("w",), ((n,),))

    def vote(comm: Comm) -> tuple[Tensor, int, int]:
        method = methods.build("signsgd", spec, Setup())
        generator = torch.Generator().manual_seed(comm.rank)
        ctx = Context(Round(0, 0, 1.0), torch.tensor([comm.rank]), torch.ones(1).long())
        message, _ = method.up.compress(torch.randn(1, n, generator=generator), {}, ctx)
        sent, received = comm.sent, comm.received
        mean = met(ways.build(comm, method.up, "merge"), message, {}, ctx)
        assert mean is not None
        return (
            method.directions().direction({}, mean, ctx.round)[0],
            comm.sent - sent,
            comm.received - received,
        )

    answers = run_ranks(ranks, vote)
    votes = sum(torch.randn(n, generator=torch.Generator().manual_seed(r)).sign().int() for r in range(ranks))
    clear = votes != 0
    for got, sent, received in answers:
        assert torch.equal(got[clear], votes[clear].sign().float())
        assert torch.equal(got, answers[0][0])
        bound = 2 * (ranks - 1) / ranks * n / 8
        assert bound <= sent <= 1.05 * bound
        assert bound <= received <= 1.05 * bound


def test_ties_fall_alike_by_every_way() -> None:
    """Merged parts toss the coins that the whole vote would."""
    spec = Spec(("w",), ((1000,),))

    def vote(comm: Comm, way: ways.Name) -> Tensor:
        method = methods.build("signsgd", spec, Setup())
        ctx = Context(Round(0, 5, 1.0), torch.tensor([comm.rank]), torch.ones(1).long())
        generator = torch.Generator().manual_seed(comm.rank)
        message, _ = method.up.compress(torch.randn(1, 1000, generator=generator), {}, ctx)
        mean = met(ways.build(comm, method.up, way), message, {}, ctx)
        assert mean is not None
        return method.directions().direction({}, mean, ctx.round)[0]

    by_way = [run_ranks(4, lambda comm, way=way: vote(comm, way))[0] for way in ("sum", "gather", "merge")]
    assert torch.equal(by_way[0], by_way[1])
    assert torch.equal(by_way[0], by_way[2])
    assert set(by_way[0].tolist()) == {-1.0, 1.0}


def test_the_way_that_sends_least_is_chosen() -> None:
    spec = Spec(("w",), ((1000, 10),))

    def names(comm: Comm) -> list[str]:
        chosen = []
        for options in (
            "dense",
            "bf16",
            "signsgd",
            {"name": "topk", "ratio": 0.001},
            {"name": "topk", "ratio": 0.9},
            {"name": "intrinsic", "dim": 100},
            {"name": "lookback", "inner": {"name": "dense"}},
        ):
            chosen.append(ways.build(comm, methods.build(options, spec, Setup()).up).name)
        up = methods.build({"name": "lookback"}, spec, Setup()).up
        chosen.append(ways.build(comm, up, room=1000).name)
        chosen.append(ways.build(comm, up, room=1000, owner=1).name)
        return chosen

    expected = ["sum", "merge", "merge", "gather", "sum", "sum", "gather", "sum", "owner"]
    assert run_ranks(3, names) == [expected] * 3
