"""More ranks than clients that are called: a rank without any does its part of every collective."""

from __future__ import annotations

from typing import Any

import pytest

from fedmpi.comm import run_ranks, solo
from fedmpi.methods import METHODS

from .jobs.runs import outcome
from .test_conformance import RUNS, assert_same_run


@pytest.mark.parametrize("name", METHODS)
def test_more_ranks_than_called_clients(name: str) -> None:
    """Five ranks and a cohort of two: the run of one rank, in both topologies and with two passes."""
    values: dict[str, Any] = {**RUNS[name], "cohort": 2, "rounds": 2, "reproducible": True}
    reference = outcome(values, solo())
    for topology in ("allreduce", "aggregator"):
        for result in run_ranks(
            5, lambda comm, t=topology: outcome({**values, "topology": t}, comm), timeout=60
        ):
            assert_same_run(result, reference, exact=True)


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(
    "more", [{"dropout": 0.6}, {"on_bad_update": "reject"}, {"clients": 2, "cohort": None}], ids=str
)
def test_one_client_and_four_ranks(topology: str, more: dict[str, Any]) -> None:
    values = {**RUNS["dense"], "cohort": 1, "rounds": 4, "reproducible": True, "topology": topology, **more}
    reference = outcome(values, solo())
    for result in run_ranks(4, lambda comm: outcome(values, comm), timeout=60):
        assert_same_run(result, reference, exact=True)
