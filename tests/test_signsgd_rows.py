"""Rows in which nobody has a gradient stay, under ``zeros: skip``; other zeros and ties are coins."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi import methods, random
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import MessageError
from fedmpi.integrations.reducer import Reducer
from fedmpi.meet import ways
from fedmpi.message import Message, from_bytes, to_bytes
from fedmpi.method import Context, Round
from fedmpi.methods.base import Setup
from fedmpi.ops import bits
from fedmpi.spec import Spec

from .meeting import met
from .test_kernels import by_kernel, same

# Rows: 6 of 4, 64 and 6 of one tensor, 1, 2 of 6: eleven in all.
SPEC = Spec(("embedding", "bias", "scale", "conv"), ((6, 4), (70,), (), (2, 3, 2)))
ROWS = [*range(0, 25, 4), 88, 94, 95, 101, 107]
BYTES = -(-(SPEC.size + 1) // 8)


def gradients(senders: int, t: int = 0) -> Tensor:
    """Row 0 of nobody, row 1 of sender 0 alone, row 2 of all but with zeros, the end of the bias and the conv's first
    row of nobody; the scale is a tie of an even number of senders."""
    g_CD = random.normal(random.key(t), senders * SPEC.size).view(senders, SPEC.size)
    g_CD[:, 0:4], g_CD[1:, 4:8], g_CD[:, 8:10], g_CD[:, 88:94], g_CD[:, 95:101] = 0, 0, 0, 0, 0
    g_CD[:, 94] = torch.tensor([1.0, -1.0]).repeat(senders)[:senders]
    return g_CD


STILL = torch.zeros(SPEC.size, dtype=torch.bool)
STILL[0:4] = STILL[88:94] = STILL[95:101] = True


def context(clients: int, t: int = 0) -> Context:
    ids = torch.arange(clients)
    return Context(Round(5, t, 0.25), ids, torch.ones_like(ids))


def plain(g_CD: Tensor, ctx: Context) -> Tensor:
    """The direction of a vote in which a sender abstains in its empty rows."""
    coins = torch.stack([random.coins(int(key), SPEC.size) for key in ctx.keys("sign of zero")])
    votes_CD = torch.where(g_CD == 0, coins, g_CD > 0).int() * 2 - 1
    for c, g_D in enumerate(g_CD):
        for first, last in itertools.pairwise(ROWS):
            if not bool(g_D[first:last].any()):
                votes_CD[c, first:last] = 0
    total_D, tie_D = votes_CD.sum(0), random.coins(ctx.round.key("tie"), SPEC.size)
    direction = torch.where(total_D == 0, tie_D.int() * 2 - 1, total_D.sign())
    return direction.masked_fill((votes_CD == 0).all(0), 0).float()


def test_rows() -> None:
    assert SPEC.rows.tolist() == ROWS
    assert Spec(("a", "b"), ((0,), (3, 0, 2))).rows.tolist() == [0]


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_of_rows(threads: int) -> None:
    g_CD = gradients(3)
    g_CD[0, 5], g_CD[1, 12:16] = float("nan"), -0.0
    empty = by_kernel(bits.empty_rows, g_CD, SPEC.rows, threads=threads)
    assert same(empty, bits.empty_rows_reference(g_CD, SPEC.rows))
    assert empty[1].tolist() == [True, True, False, True, *[False] * 3, True, False, True, False]
    for dtype in (torch.float32, torch.int8):
        v_CD = torch.ones(3, SPEC.size, dtype=dtype)
        got = by_kernel(bits.clear_rows, v_CD.clone(), empty, SPEC.rows, threads=threads)
        assert same(got, bits.clear_rows_reference(v_CD, empty, SPEC.rows))


def test_the_bytes_are_counted_where_there_are_such_rows() -> None:
    up = methods.build("signsgd", SPEC, Setup()).up
    g_CD = gradients(3)
    g_CD[2] = 1
    message, _ = up.compress(g_CD, {}, context(3))
    assert message.nbytes().tolist() == [BYTES + 2, BYTES + 2, BYTES]
    v_CS, _ = up.decompress(from_bytes(to_bytes(message), up.layout(), 3), {}, context(3))
    assert v_CS[0, : SPEC.size][STILL].unique().tolist() == [0]
    assert v_CS[:, SPEC.size :].sum(1).tolist() == [8, 7, 11]
    lying = Message({**message.arrays, "rows": message.arrays["rows"][:1]}, {"rows": torch.tensor([1, 0, 0])})
    with pytest.raises(MessageError, match=r"\[1, 0, 0\] arrays 'rows' of the clients, expected \[1, 1, 0\]"):
        up.decompress(lying, {}, context(3))


def test_coins_have_the_bits_of_before() -> None:
    up = methods.build({"name": "signsgd", "zeros": "coin"}, SPEC, Setup()).up
    g_CD = gradients(2)
    message, _ = up.compress(g_CD, {}, context(2))
    assert list(message.arrays) == ["signs"]
    assert torch.equal(message.arrays["signs"], bits.pack_signs(g_CD, context(2).keys("sign of zero")))
    assert up.decompress(message, {}, context(2))[0].unique().tolist() == [-1, 1]


@pytest.mark.parametrize("clients", [2, 3])
def test_a_vote_of_the_server_and_its_downloads(clients: int) -> None:
    method = methods.build("signsgd", SPEC, Setup())
    server, theta = method.server, random.normal(random.key(9), SPEC.size)
    state, views = server.init(theta), {1: server.view(theta), 2: server.view(theta)}
    for t in range(4):
        g_CD = (
            gradients(clients, t) if t != 1 else random.normal(random.key(7), 107 * clients).view(clients, -1)
        )
        message, _ = method.up.compress(g_CD, {}, context(clients, t))
        v_CS, _ = method.up.decompress(message, {}, context(clients, t))
        before = state["theta"]
        state = server.finish(state, v_CS.sum(0), context(clients, t).round)
        assert torch.equal(state["theta"], before - 0.25 * plain(g_CD, context(clients, t)))
        for every, view in views.items():
            if (t + 1) % every:
                continue
            download = from_bytes(to_bytes(server.download(state, int(view["version"]))))
            still = sum(s != 1 for s in range(t + 1 - every, t + 1))
            assert download.nbytes().tolist() == [every * (BYTES + 4) + 2 * still]
            views[every] = server.reconcile(view, download, t + 1)
            assert torch.equal(views[every]["theta"], state["theta"])
    download.arrays["rows"] = download.arrays["rows"][:, :1]
    with pytest.raises(MessageError, match="rows of 1 rounds, expected 2"):
        server.reconcile(views[2], download, 4)


@pytest.mark.parametrize("options", [{"vote": "mean"}, {"feedback": True}, {"momentum": 0.5, "vote": "mean"}])
def test_of_the_mean_they_are_zero(options: dict[str, Any]) -> None:
    up = methods.build({"name": "signsgd", **options}, SPEC, Setup()).up
    state = {name: torch.stack([value] * 2) for name, value in up.init().items()}
    for t in range(2):
        g_CD = gradients(2, t)
        message, state = up.compress(g_CD, state, context(2, t))
        v_CD, _ = up.decompress(message, {}, context(2, t))
        assert not bool(v_CD[:, STILL].any())
        assert not bool(v_CD[1, 4:8].any())
        assert bool(v_CD[0, 4:12].all())
        total = torch.zeros(1, SPEC.size)
        up.add(total.expand(2, -1), message, {}, context(2, t), [0.5, 0.25])
        assert torch.allclose(total[0], 0.5 * v_CD[0] + 0.25 * v_CD[1])
        assert all(not bool(value[:, STILL].any()) for value in state.values())


def test_a_row_whose_momentum_is_left_moves() -> None:
    up = methods.build({"name": "signsgd", "momentum": 0.5}, SPEC, Setup()).up
    state = {"momentum": torch.ones(1, SPEC.size)}
    message, _ = up.compress(torch.zeros(1, SPEC.size), state, context(1))
    assert up.decompress(message, {}, context(1))[0].unique().tolist() == [1]
    assert message.nbytes().tolist() == [BYTES]


@pytest.mark.parametrize(
    "options", [{}, {"scope": "tensor"}, {"keep": "message"}, {"keep": "clustered"}], ids=str
)
def test_under_lookback(options: dict[str, Any]) -> None:
    """Also in rounds of scalars."""
    method = methods.build(
        {"name": "lookback", "threshold": 1.0, "inner": "signsgd", **options}, SPEC, Setup()
    )
    up, server = method.up, method.server
    state = server.init(torch.zeros(SPEC.size))
    kept, peers = ({n: torch.stack([v] * 2) for n, v in made.items()} for made in (up.init(), up.init_peer()))
    for t in range(3):
        ctx = Context(context(2, t).round, torch.arange(2), torch.ones(2).long(), server.shared(state))
        message, kept = up.compress(gradients(2), kept, ctx)
        v_CS, peers = up.decompress(message, peers, ctx)
        before = state["theta"]
        state = server.finish(state, v_CS.mean(0), ctx.round)
        moved_D = state["theta"] != before
        assert torch.equal(moved_D, ~STILL)
        assert up.count(message)["scalars"] == (2 if t else 0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_way_to_exchange(ranks: int) -> None:
    """Votes and means, and a rank without a usable gradient."""
    g_CD = gradients(ranks)
    expected = plain(g_CD, context(ranks))

    def run(comm: Comm) -> None:
        ctx = Context(Round(5, 0, 0.25), torch.tensor([comm.rank]), torch.ones(1).long())
        for vote in ("majority", "mean"):
            method = methods.build({"name": "signsgd", "vote": vote}, SPEC, Setup())
            answers = []
            for way, packed in (("sum", 0), ("gather", 0), ("auto", 1), ("merge", 0), ("owner", 0)):
                if way == "merge" and vote == "mean":
                    continue
                for g_1D in (g_CD[comm.rank][None], torch.ones(1, SPEC.size)):
                    message, _ = method.up.compress(g_1D, {}, ctx)
                    built = ways.build(
                        comm, method.up, way, owner=0 if way == "owner" else None, packed=bool(packed)
                    )
                    mean = met(built, message, {}, ctx)
                    assert met(built, message, {}, ctx, usable=comm.rank != 1) is None
                    assert mean is not None
                    answers.append(method.directions().direction({}, mean, ctx.round)[0])
            for got, ones in zip(answers[::2], answers[1::2], strict=True):
                torch.testing.assert_close(ones, torch.ones(SPEC.size))
                if vote == "majority":
                    assert torch.equal(got, expected), way
                assert not bool(got[STILL].any())

    run_ranks(ranks, run)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_drop_in_leaves_them_alone(ranks: int) -> None:
    shapes = {"embedding": (50, 8), "out": (5, 8)}

    def run(comm: Comm) -> list[Tensor]:
        found = []
        for method in (
            {"name": "signsgd"},
            {"name": "signsgd", "feedback": True},
            {"name": "signsgd", "momentum": 0.9},
        ):
            reducer = Reducer(shapes, method, comm, exact_below=0)
            parameters = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
            for t in range(3):
                for i, (name, p) in enumerate(parameters.items()):
                    p.grad = random.normal(random.key(t, comm.rank, i), p.numel()).view(shapes[name])
                parameters["embedding"].grad[0] = 0
                parameters["embedding"].grad[20 + comm.rank :] = 0
                reducer.average(parameters)
                found.append(parameters["embedding"].grad.clone())
        return found

    for grad in run_ranks(ranks, run)[0]:
        assert not bool(grad[0].any())
        assert not bool(grad[20 + ranks :].any())
        assert bool(grad[1 : 19 + ranks].all())
