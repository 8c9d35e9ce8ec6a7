"""Who takes part in a round, where clients run, and what a dropped client leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config
from fedmpi.comm import run_ranks, solo
from fedmpi.engine import store as stores
from fedmpi.engine.clients import cohort, place, survivors
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.store import ClientStore, MappedStore
from fedmpi.errors import ConfigError, FedMPIError
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


@pytest.mark.parametrize("kind", ["memory", "mmap"])
def test_a_store_keeps_rows_apart(kind: str, tmp_path: Path) -> None:
    def init() -> dict[str, torch.Tensor]:
        return {"a": torch.zeros(3), "h": torch.zeros((), dtype=torch.bfloat16), "b": torch.ones(0)}

    store = ClientStore(init) if kind == "memory" else MappedStore(init, 10, tmp_path)
    assert store.row == 14
    assert not list(tmp_path.iterdir()), "its files have no names"
    ids = torch.tensor([5, 2])
    state = store.get(ids)
    state["a"] += torch.tensor([[1.0], [2.0]])
    assert torch.equal(store.get(ids)["a"], torch.zeros(2, 3)), "a state that was not put back is not kept"
    store.put(ids, state)
    state["a"] += 7
    assert store.get(torch.tensor([2, 5, 9]))["a"][:, 0].tolist() == [2.0, 1.0, 0.0]


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


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_server_optimizers_follow_their_rule(optimizer: str) -> None:
    """Against a plain transcription, fed with the means that the simulation itself computes."""
    values = {**SMALL, "server": {"optimizer": optimizer, "lr": 0.05, "beta1": 0.8, "beta2": 0.95}}
    simulation = Simulation(config.parse(values), solo())
    theta = simulation.topology.parameters().double()
    means: list[torch.Tensor] = []
    finish = simulation.method.server.finish

    def spy(state: Any, mean_S: torch.Tensor, round: Any) -> Any:
        means.append(mean_S.double())
        return finish(state, mean_S, round)

    simulation.method.server.finish = spy  # type: ignore[method-assign]
    m, v = torch.zeros_like(theta), torch.full_like(theta, 1e-6)
    for t in range(6):
        simulation.round(t)
        g = means[-1]
        if optimizer == "momentum":
            m = 0.8 * m + g
            theta = theta - 0.05 * m
        else:
            m = 0.8 * m + 0.2 * g
            v = 0.95 * v + 0.05 * g**2 if optimizer == "adam" else v - 0.05 * g**2 * (v - g**2).sign()
            theta = theta - 0.05 * m / (v.sqrt() + 1e-3)
        assert torch.allclose(simulation.topology.parameters().double(), theta, rtol=1e-4, atol=1e-5)


def test_a_message_that_cannot_be_read_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 refuses a frame; the senders, who wait for its answer, get the same error."""
    monkeypatch.setattr("fedmpi.engine.topology.to_bytes", lambda message: b"fMSG nonsense")

    def main(comm: Any) -> str:
        simulation = Simulation(config.parse({**SMALL, "topology": "aggregator"}), comm)
        with pytest.raises(FedMPIError, match="message: ") as caught:
            simulation.round(0)
        return type(caught.value).__name__

    assert run_ranks(3, main, timeout=30) == ["MessageError", "RankError", "RankError"]


def test_the_two_stores_are_the_same_run(tmp_path: Path) -> None:
    values = {
        **SMALL,
        "method": {"name": "lookback", "inner": {"name": "topk", "feedback": True, "ratio": 0.1}},
    }
    mapped = outcome({**values, "store": "mmap", "store_folder": str(tmp_path)}, solo())
    assert mapped["sha256"] == outcome(values, solo())["sha256"]


def test_a_run_whose_state_would_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpi.engine.store._available_memory", lambda: 10_000)
    values = {**SMALL, "method": {"name": "topk", "feedback": True}}
    with pytest.raises(
        ConfigError, match=r"client state needs up to 15\.6 kB of memory, 10 kB are free; ways out"
    ):
        Simulation(config.parse(values), solo())  # 6 clients x 650 numbers
    assert Simulation(config.parse({**values, "store": "mmap"}), solo()).memory.startswith(
        "client state needs"
    )
    assert Simulation(config.parse({**values, "method": "dense"}), solo()).memory == ""
    with pytest.raises(ConfigError, match="store_folder: cannot use /nowhere: No such file"):
        Simulation(config.parse({**values, "store": "mmap", "store_folder": "/nowhere"}), solo())


@pytest.mark.parametrize(
    ("said", "expected"),
    [("MemTotal: 90 kB\nMemAvailable:  7 kB\n", 7 * 1024), ("MemTotal: 90 kB\n", None), (None, None)],
)
def test_free_memory_is_what_linux_says_or_all_that_there_is(
    said: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is not None:
        (tmp_path / "meminfo").write_text(said)
    monkeypatch.setattr(stores, "Path", lambda path: {"/proc/meminfo": tmp_path / "meminfo"}[path])
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert stores._available_memory() == (everything if expected is None else expected)


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
    assert torch.equal(timed.topology.parameters(), fresh.topology.parameters())
