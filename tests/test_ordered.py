"""Trimmed mean and median: against numpy, against clients that attack, and where they cannot be had."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.errors import ConfigError
from fedmpi.meet.sums import Ordered

from .conftest import SMALL
from .test_bad_updates import CASES, SOME, simulate


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12), st.floats(0, 0.49), st.sampled_from(["median", "trimmed_mean"]), st.integers(0, 99)
)
def test_ordered_sums_against_numpy(clients: int, trim: float, rule: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(clients, 7)).astype(np.float32)
    rows[rng.integers(clients)] *= 1e6
    total = Ordered(rule, trim, clients)
    for part in torch.from_numpy(rows).split(3):
        total.add(part, torch.ones(len(part), dtype=torch.float64))
    if rule == "median":
        expected = np.median(rows.astype(np.float64), axis=0)
    else:
        cut = math.floor(trim * clients + 1e-9)
        expected = np.sort(rows.astype(np.float64), axis=0)[cut : clients - cut].mean(0)
    assert np.allclose(total.value().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_ordered_sums_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpi.meet.sums._BLOCK_VALUES", 10)
    v_CS = torch.arange(35.0).view(5, 7).flip(0)
    total = Ordered("median", 0.0, 5)
    total.add(v_CS, torch.ones(5))
    assert torch.equal(total.value(), torch.arange(14.0, 21.0))


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("dense", "median"),
        ("bf16", "trimmed_mean"),
        ({"name": "topk", "ratio": 0.9}, "trimmed_mean"),
        ("lookback", "median"),
    ],
)
def test_a_few_wrong_clients_hardly_matter(method: Any, rule: str) -> None:
    """Two of eight send ten thousand times too much, in the wrong direction."""
    server = {"aggregate": rule, "trim": 0.3}
    values = {**SMALL, "clients": 8, "cohort": None, "partition": "iid", "topology": "aggregator"}
    values |= {"method": method, "rounds": 8, "reproducible": True}
    values |= {"local": {"lr": 0.3, "steps": 2, "batch": 20}, "evaluate_every": 8}

    def accuracy(values: dict[str, Any], comm: Comm) -> tuple[float, torch.Tensor]:
        simulation = simulate(values, comm)
        train = simulation.trainer.train

        def attack(theta: Any, data: Any, partition: Any, clients_C: torch.Tensor, *rest: Any) -> Any:
            update = train(theta, data, partition, clients_C, *rest)
            return update._replace(g_CD=torch.where(clients_C[:, None] < 2, -1e4, 1.0) * update.g_CD)

        simulation.trainer.train = attack  # type: ignore[method-assign]
        for t in range(8):
            simulation.round(t)
        return simulation.measures["accuracy"], simulation.replica.parameters()

    attacked, theta = accuracy({**values, "server": server}, solo())
    assert attacked > 0.8 > 0.5 > accuracy(values, solo())[0]
    for _, theirs in run_ranks(2, lambda comm: accuracy({**values, "server": server}, comm), timeout=60):
        assert torch.equal(theirs, theta)


@pytest.mark.parametrize("name", ["signsgd", "fetchsgd", "powersgd", "intrinsic", "prune of clients"])
def test_what_cannot_be_ordered_is_named(name: str) -> None:
    method = {**SOME, **CASES}[name]
    values = {**SMALL, "method": method, "topology": "aggregator", "server": {"aggregate": "median"}}
    with pytest.raises(ConfigError, match=r"server.aggregate: median does not work with"):
        simulate(values)


@pytest.mark.parametrize("changes", [{"topology": "allreduce"}, {"mode": "data_parallel", "cohort": None}])
def test_ranks_that_add_up_before_they_meet_cannot_order(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"server.aggregate: expected mean with topology: allreduce, got median"
    ):
        config.parse({**SMALL, "local": {"lr": 1.0}, **changes, "server": {"aggregate": "median"}})
