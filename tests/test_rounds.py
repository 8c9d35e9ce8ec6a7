"""Who takes part in a round, where clients run, and what a dropped client leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config, random
from fedmpi.comm import run_ranks, solo
from fedmpi.engine.clients import cohort, place, survivors
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import FedMPIError
from fedmpi.tasks.partitions import Partition

from .conftest import SMALL
from .jobs.runs import outcome

SIZES = torch.tensor([10, 1, 5, 30, 7, 2, 45])
PARTITION = Partition(torch.arange(100), torch.cat([torch.tensor([0]), SIZES.cumsum(0)]))


def settings_for(**changes: Any) -> config.Config:
    return config.parse({**SMALL, "clients": 7, "cohort": 3, **changes})


@pytest.mark.parametrize("sampling", ["uniform", "weighted", "round_robin", "epoch_shuffle"])
def test_a_cohort_is_a_function_of_seed_and_round(sampling: str) -> None:
    chosen = [cohort(settings_for(sampling=sampling), PARTITION, t).tolist() for t in range(60)]
    again = [cohort(settings_for(sampling=sampling), PARTITION, t).tolist() for t in range(60)]
    assert chosen == again
    assert all(len(set(c)) == len(c) and c == sorted(c) for c in chosen)
    assert {client for c in chosen for client in c} == set(range(7))
    if sampling == "epoch_shuffle":  # 3 + 3 + 1 clients an epoch, each once
        for epoch in range(20):
            seen = [client for c in chosen[3 * epoch : 3 * epoch + 3] for client in c]
            assert sorted(seen) == list(range(7))
        assert chosen[0] != chosen[3], "another order each epoch"
    else:
        assert all(len(c) == 3 for c in chosen)
    if sampling != "round_robin":
        other = [cohort(settings_for(sampling=sampling, seed=4), PARTITION, t).tolist() for t in range(60)]
        assert other != chosen


def test_sampling_by_samples_draws_in_proportion() -> None:
    one = settings_for(sampling="weighted", cohort=1)
    draws = torch.cat([cohort(one, PARTITION, t) for t in range(4000)])
    expected = SIZES / SIZES.sum() * 4000
    error = (draws.bincount(minlength=7) - expected) / expected.sqrt()
    assert error.abs().max() < 5


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40) | st.integers(3000, 9000), min_size=2, max_size=40),
    st.integers(0, 9),
    st.data(),
)
def test_sampling_by_samples_is_owners_of_samples_in_random_order(
    sizes: list[int], t: int, data: st.DataObject
) -> None:
    """Drawn as far as needed, it is the draw from all samples; who has none comes last."""
    partition = Partition(torch.arange(sum(sizes)), torch.tensor([0, *sizes]).cumsum(0))
    size = data.draw(st.integers(1, len(sizes) - 1))
    values = settings_for(sampling="weighted", clients=len(sizes), cohort=size)
    order = random.permutation(random.key(values.seed, t, -1, "cohort"), sum(sizes))
    owners = dict.fromkeys((torch.searchsorted(partition.offset, order, right=True) - 1).tolist())
    expected = [*owners, *(client for client, samples in enumerate(sizes) if samples == 0)][:size]
    assert cohort(values, partition, t).tolist() == sorted(expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 99), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_first_is_within_a_third_of_the_best(work: list[int], ranks: int) -> None:
    """Graham's bound for longest-first on m machines, 4/3 − 1/(3m) of the optimum (found by trying all)."""
    placed = place(torch.arange(len(work)), torch.tensor(work), list(range(ranks)), homes=None)
    everybody = torch.cat(list(placed.values())).sort().values
    assert everybody.tolist() == list(range(len(work)))

    def longest(ranks_of: Iterable[int]) -> int:
        load = [0] * ranks
        for rank, cost in zip(ranks_of, work, strict=True):
            load[rank] += cost
        return max(load)

    best = min(longest(choice) for choice in product(range(ranks), repeat=len(work)))
    got = max(sum(work[i] for i in p.tolist()) for p in placed.values())
    assert got <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_homes_never_change() -> None:
    homes_K = torch.arange(9) % 3 + 1
    first, later = torch.tensor([0, 3, 4, 8]), torch.tensor([3, 4, 5])
    placed = [place(clients, torch.ones(9), [1, 2, 3], homes_K[clients]) for clients in (first, later)]
    assert {r: p.tolist() for r, p in placed[0].items()} == {1: [0, 1], 2: [2], 3: [3]}
    assert {r: p.tolist() for r, p in placed[1].items()} == {1: [0], 2: [1], 3: [2]}


@pytest.mark.parametrize("method", ["dense", {"name": "topk", "feedback": True, "ratio": 0.05}, "lookback"])
@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
def test_dropped_clients_download_but_change_nothing(method: Any, topology: str) -> None:
    values = {**SMALL, "method": method, "topology": topology, "dropout": 0.5, "rounds": 8, "seed": 5}
    simulation = Simulation(config.parse(values), solo())
    lost = 0
    for t in range(8):
        called = cohort(simulation.config, simulation.partition, t)
        alive = survivors(simulation.config, called, t)
        dropped = torch.tensor([c for c in called.tolist() if c not in alive.tolist()], dtype=torch.int64)
        lost += len(dropped)
        kept = simulation.clients.get(dropped) if len(dropped) else {}
        uploads = simulation.ledger.upload.clone()
        downloads = simulation.ledger.download.clone()
        line = simulation.round(t)
        assert line["clients"] == len(alive) > 0
        if len(dropped):
            after = simulation.clients.get(dropped)
            assert all(torch.equal(kept[name], after[name]) for name in kept)
            assert torch.equal(simulation.ledger.upload[dropped], uploads[dropped])
            assert t == 0 or bool((simulation.ledger.download[dropped] > downloads[dropped]).all())
    assert lost > 5
    exact = {**values, "reproducible": True}
    alone = outcome(exact, solo())
    for result in run_ranks(3, lambda comm: outcome(exact, comm), timeout=60):
        assert result["sha256"] == alone["sha256"]
        assert result["upload_bytes"] == alone["upload_bytes"]


def test_a_message_that_cannot_be_read_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 refuses a frame; the senders, who wait for its answer, get the same error."""
    monkeypatch.setattr("fedmpi.meet.ways.to_bytes", lambda *message: b"fMSG nonsense")

    def main(comm: Any) -> str:
        simulation = Simulation(config.parse({**SMALL, "topology": "aggregator"}), comm)
        with pytest.raises(FedMPIError, match="message: ") as caught:
            simulation.round(0)
        return type(caught.value).__name__

    assert run_ranks(3, main, timeout=30) == ["MessageError", "RankError", "RankError"]


@pytest.mark.parametrize(("share", "faster", "threads"), [(4, 0.5, 4), (4, 0.9, 1), (1, 0.1, 1)])
def test_without_a_wish_a_rank_takes_threads_where_they_pay(
    share: int, faster: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads must save more than a fifth of one's time."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fedmpi.engine.rounds.own_cpus", lambda comm: share)
    simulation = Simulation(settings_for(), solo())
    monkeypatch.setattr(simulation.trainer, "time", lambda data, batch, n: 1.0 if n == 1 else faster)
    simulation.set_threads()
    assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    simulation.set_threads()
    assert torch.get_num_threads() == 1


def test_timing_a_step_leaves_the_run_as_it_was() -> None:
    timed, fresh = (Simulation(settings_for(), solo()) for _ in range(2))
    assert timed.trainer.time(timed.data.train, 20, 1) > 0
    assert timed.round(0)["loss"] == fresh.round(0)["loss"]
    assert torch.equal(timed.replica.parameters(), fresh.replica.parameters())
