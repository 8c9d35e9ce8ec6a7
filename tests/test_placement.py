"""Which CPUs and which GPU are a rank's own."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.comm import placement, run_ranks, solo
from fedmpi.comm.placement import Seat, gpu_index, own_cpus, seats, share
from fedmpi.doctor import chart

CPUS = len(os.sched_getaffinity(0))
masks = st.lists(st.sets(st.integers(0, 15), min_size=1), min_size=1, max_size=8)


@given(masks)
def test_shares_never_exceed_the_cpus(masks: list[set[int]]) -> None:
    own = [share(mask, masks, None, None) for mask in masks]
    assert all(1 <= n <= len(mask) for n, mask in zip(own, masks, strict=True))
    # A rank has one thread at least, even where ranks outnumber CPUs.
    assert sum(n for n in own if n > 1) <= len(set().union(*masks))


def test_bound_ranks_keep_their_cpus_and_unbound_ones_divide_them() -> None:
    bound = [{0, 1, 2}, {3, 4}]
    assert [share(mask, bound, None, None) for mask in bound] == [3, 2]
    everything = [set(range(8))] * 3
    assert share(everything[0], everything, None, None) == 2
    mixed = [{0, 1}, {0, 1}, {2, 3}]
    assert [share(mask, mixed, None, None) for mask in mixed] == [1, 1, 2]


def test_an_allocation_limits_ranks_that_are_not_bound() -> None:
    two = [set(range(64))] * 2
    assert share(two[0], two, 8, None) == 4, "the step has 8 CPUs of 64"
    assert share(two[0], two, 8, 2) == 2, "--cpus-per-task=2"
    assert share(two[0], two, 2, 8) == 1, (
        "mpirun with two ranks in a job of one task of 8 CPUs, of which 2 here"
    )
    assert share(two[0], two, 1, None) == 1
    assert share({5}, [{5}, {6}], 16, 8) == 1, "bound to fewer than granted"


def test_ranks_in_threads_divide_this_process() -> None:
    alone = {"SLURM_CPUS_ON_NODE": "", "SLURM_CPUS_PER_TASK": "x"}
    assert own_cpus(solo(), {}) == own_cpus(solo(), alone) == CPUS
    assert run_ranks(2, lambda comm: own_cpus(comm, {})) == [max(1, CPUS // 2)] * 2
    assert own_cpus(solo(), {"SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "1"}) == 1


def test_every_rank_knows_every_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, which this machine need not have, and three ranks."""
    monkeypatch.setattr(placement, "_visible", lambda: ["card a", "card b"])

    def main(comm: Any) -> list[Seat]:
        return seats(comm, {})

    tables = run_ranks(3, main)
    assert tables[0] == tables[1] == tables[2]
    assert [(seat.rank, seat.local_rank) for seat in tables[0]] == [(0, 0), (1, 1), (2, 2)]
    assert [seat.gpu for seat in tables[0]] == ["card a", "card b", "card a"]
    _, first, second, third = chart(tables[0])
    assert first.endswith("  card a, shared with 1 more")
    assert second.endswith("  card b")
    assert third.endswith("  card a, shared with 1 more")


def test_the_map_counts_machines_apart() -> None:
    same = [Seat(rank, host, 0, 4, "card") for rank, host in enumerate(("a", "much-longer-name"))]
    header, first, second = chart(same)
    assert first.split() == ["0", "a", "0", "1", "or", "4", "card"]
    assert second.split() == ["1", "much-longer-name", "0", "1", "or", "4", "card"]
    assert header.index("GPU") == first.index("card") == second.index("card")


def test_gpus_are_dealt_out_in_turn() -> None:
    assert [gpu_index(rank, 2) for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [gpu_index(rank, 1) for rank in range(3)] == [0, 0, 0], (
        "each bound to its own, which it sees as the first"
    )
