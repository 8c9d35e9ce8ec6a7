"""Sums over clients and ranks: the same bits in any order, and an error rather than a wrapped number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import random
from fedmpi.comm import run_ranks
from fedmpi.errors import NumericalError
from fedmpi.meet.sums import Mixed, Sum
from fedmpi.method import Segment

values32 = st.floats(-1000, 1000, width=32)


def exact(terms: int, size: int = 3) -> Sum:
    return Sum(size, integer=False, exact=True, terms=terms)


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[list[list[int]]]]:
    """Terms, their weights, and a way to add them up: ranks of chunks of terms."""
    count = draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(values32, min_size=3, max_size=3), min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    ranks: list[list[list[int]]] = [[] for _ in range(draw(st.integers(1, 4)))]
    while order:
        size = draw(st.integers(1, len(order)))
        ranks[draw(st.integers(0, len(ranks) - 1))].append(list(order[:size]))
        order = order[size:]
    return rows, weights, ranks


@given(splits())
@settings(deadline=None, max_examples=150)
def test_exact_sum_has_the_same_bits_in_any_order(case):
    rows, weights, ranks = case
    v_CS, w_C = torch.tensor(rows, dtype=torch.float32), torch.tensor(weights, dtype=torch.float64)
    whole = exact(len(rows))
    whole.add(v_CS, w_C)
    shares = []
    for chunks in ranks:
        share = exact(len(rows))
        for chunk in chunks:
            share.add(v_CS[chunk], w_C[chunk])
        shares.append(share)
    for other in shares[1:]:
        shares[0].total_S += other.total_S
    assert torch.equal(shares[0].value(), whole.value())
    assert whole.value().dtype == torch.float32
    for column in range(3):
        true = math.fsum(row[column] * weight for row, weight in zip(rows, weights, strict=True))
        bound = len(rows) * 2.0**-41 + abs(true) * 2.0**-23
        assert abs(float(whole.value()[column]) - true) <= bound


KINDS = (Segment(3, "mean"), Segment(2, "votes"), Segment(3, "total"), Segment(2, "least"))


@given(splits(), st.permutations(KINDS), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_property_3_stretches_of_all_kinds_have_the_same_bits_in_any_split(case, kinds, key):
    """Beside each other, in any order: means and totals as exact sums of their own, votes counted, the least or 0."""
    rows, weights, ranks = case
    count = len(rows)
    of = {
        "mean": torch.tensor(rows, dtype=torch.float32),
        "votes": random.uniform(random.key(key), 2 * count).view(count, 2).sub(0.5).sign(),
        "total": torch.tensor(rows, dtype=torch.float32).flip(0) / 8,
        "least": random.uniform(random.key(key, stream="least"), 2 * count)
        .view(count, 2)
        .mul(99)
        .sub(60)
        .round(),
    }
    v_CS, w_C = torch.cat([of[kind] for _, kind in kinds], 1), torch.tensor(weights, dtype=torch.float64)

    def total(chunks):
        mixed = Mixed(kinds, exact=True, terms=count)
        for chunk in chunks:
            mixed.add(v_CS[chunk], w_C[chunk])
        return mixed

    whole = total([list(range(count))])

    def main(comm):
        share = total(ranks[comm.rank])
        share.over(comm)
        return share.value()

    assert all(torch.equal(value, whole.value()) for value in run_ranks(len(ranks), main))
    for (_, kind), value in zip(kinds, whole.value().split([size for size, _ in kinds]), strict=True):
        if kind == "votes":
            assert value.tolist() == of[kind].sum(0).tolist()
        elif kind == "least":
            assert value.tolist() == of[kind].amin(0).clamp(max=0).tolist()
        else:
            alone = exact(count)
            alone.add(of[kind], w_C if kind == "mean" else torch.ones_like(w_C))
            assert torch.equal(value, alone.value())


@given(splits())
@settings(deadline=None, max_examples=40)
def test_property_2_stretches_are_additive(case):
    """The exact sums of two shares are the sum of both: votes and totals count one each, whoever sends them."""
    rows, weights, _ = case
    v_CS, w_C = torch.tensor(rows, dtype=torch.float32), torch.tensor(weights, dtype=torch.float64)
    kinds = (Segment(1, "mean"), Segment(1, "votes"), Segment(1, "total"))
    v_CS[:, 1] = v_CS[:, 1].sign()
    half = len(rows) // 2
    parts = []
    for chunk in (slice(half), slice(half, None), slice(None)):
        mixed = Mixed(kinds, exact=True, terms=len(rows))
        mixed.add(v_CS[chunk], w_C[chunk])
        parts.append(mixed.total_S)
    assert torch.equal(parts[0] + parts[1], parts[2])
    lighter = Mixed(kinds, exact=True, terms=len(rows))
    lighter.add(v_CS, w_C / 2)
    assert torch.equal(lighter.total_S[1:], parts[2][1:])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("integer", [False, True])
def test_sum_over_ranks(ranks, integer):
    """Equal bits on every rank and at every number of ranks."""
    clients, size = 40, 50
    v_CS = random.normal(random.keys(0, 0, torch.arange(clients), "v"), size)
    v_CS = v_CS.sign().to(torch.int8) if integer else v_CS
    w_C = random.uniform(random.key(1), clients).double() / clients

    def main(comm):
        total = Sum(size, integer=integer, exact=True, terms=clients)
        total.add(v_CS[comm.rank :: comm.size], w_C[comm.rank :: comm.size])
        total.over(comm)
        return total.value()

    sums = run_ranks(ranks, main)
    true = v_CS.long().sum(0) if integer else (v_CS.double() * w_C[:, None]).sum(0)
    alone = run_ranks(1, main)[0]
    assert all(torch.equal(value, alone) for value in sums)
    torch.testing.assert_close(alone.double(), true.double(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("terms", "dtype"), [(1, torch.int8), (127, torch.int8), (128, torch.int16), (2**15, torch.int32)]
)
def test_votes_are_counted_in_the_smallest_type_that_fits(terms, dtype):
    total = Sum(2, integer=True, exact=False, terms=terms)
    assert total.total_S.dtype == dtype
    total.add(torch.tensor([[1, -1]], dtype=torch.int8).expand(terms, 2), torch.ones(terms).double())
    assert total.value().tolist() == [terms, -terms]


@pytest.mark.parametrize("value", [2.0**23, -(2.0**23), 1e30, -1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 2])
def test_exact_sum_refuses_what_does_not_fit(value, place):
    row = torch.zeros(1, 3)
    row[0, place] = value
    with pytest.raises(NumericalError):
        exact(1).add(row, torch.ones(1).double())


@pytest.mark.parametrize("value", [2.0**22, -(2.0**22), 2.0**21])
def test_exact_sum_never_wraps(value):
    """Many terms that fit one by one: the true sum, or an error."""
    total = exact(9)
    try:
        for _ in range(9):
            total.add(torch.tensor([[value, 0.0, -value]]), torch.ones(1).double())
    except NumericalError:
        return
    assert total.value().tolist() == [9 * value, 0, -9 * value]


def test_a_sum_of_weights_one_takes_values_up_to_its_bound():
    """A mean of large values is representable, so it is no error."""
    total = exact(5)
    total.add(torch.full((5, 3), 2.0**21), torch.full((5,), 0.2, dtype=torch.float64))
    assert total.value().tolist() == pytest.approx([2.0**21] * 3)
