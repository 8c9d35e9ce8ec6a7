"""States that do not fit are refused on all ranks, with one sentence, before anything changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError
from fedmpi.integrations.job import Job
from fedmpi.integrations.reducer import Reducer
from fedmpi.schema import Entry, differs, schema_of

from .jobs.fuzz_states import AUTO, SETTINGS, SHAPES, same, states, step

TOPK = {"name": "topk", "ratio": 0.3, "feedback": True}
FETCH = {"name": "fetchsgd", "k": 10, "rows": 3, "columns": 20}
KEPT = {"name": "lookback", "keep": "message", "inner": {"name": "topk", "ratio": 0.3}}
Change = Callable[[dict[str, Any]], Any]


def refused(method: Any, given: list[Any], before: list[Any], settings: Any = SETTINGS) -> str:
    """What all ranks say of their states, having loaded ``before``."""

    def run(comm: Comm) -> str:
        job = Job(SHAPES, method, comm, settings)
        if before:
            job.load_state_dict(before[comm.rank])
        kept = copy.deepcopy(job.state_dict())
        with pytest.raises(ConfigError) as error:
            job.load_state_dict(given[comm.rank])
        assert same(kept, job.state_dict()), "a refused state leaves no trace"
        step(job, comm.rank, 5)  # and nobody waits for anybody
        return str(error.value)

    told = run_ranks(len(given), run, timeout=30)
    assert len(set(told)) == 1, "every rank says the same"
    return told[0]


def put(*path: Any, to: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        *way, last = path
        inside: Any = state
        for key in way:
            inside = inside[key]
        inside[last] = to(inside[last]) if callable(to) else to

    return change


def drop(*path: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        inside: Any = state
        for key in path[:-1]:
            inside = inside[key]
        del inside[path[-1]]

    return change


RESIDUAL = ("groups", 0, "state", "residual")
WRONG: list[tuple[Change, str]] = [
    (
        put(*RESIDUAL, to=torch.zeros(1, 1)),
        r"residual: expected float32 of shape (1, 120), got float32 of shape (1, 1)",
    ),
    (put(*RESIDUAL, to=lambda r: r[0]), "of shape (1, 120), got float32 of shape (120)"),
    (put(*RESIDUAL, to=lambda r: r.double()), "expected float32 of shape (1, 120), got float64"),
    (put(*RESIDUAL, to=lambda r: r / 0), "groups.0.state.residual: expected finite numbers"),
    (
        put(*RESIDUAL, to=lambda r: r.tolist()[0][:2]),
        "groups.0.state.residual: expected a dense tensor, got [",
    ),
    (put(*RESIDUAL, to=lambda r: r.to_sparse()), "expected a dense tensor, got torch.sparse_coo float32"),
    (lambda state: state["groups"][0]["state"].update(more=torch.zeros(1)), "got 'more' besides"),
    (drop(*RESIDUAL), "groups.0.state: expected residual, residual is missing"),
    (drop("groups", 0, "memory"), "groups.0: expected names, shapes, state, memory"),
    (drop("groups", 1), "parameters: expected 'bias' of shape [7], got no 'bias'"),
    (put("groups", to=lambda g: [*g, g[0]]), "parameters: expected each once, got 'fc' twice"),
    (
        put("groups", 0, "names", 0, to="kernel"),
        "parameters: expected 'fc' of shape [9, 8], got no 'fc'",
    ),
    (put("groups", 0, "shapes", 0, to=[8, 9]), "expected 'fc' of shape [9, 8], got 'fc' of shape [8, 9]"),
    (
        put("groups", 0, "shapes", 0, 0, to=True),
        "parameters: expected 'fc' of shape [9, 8], got 'fc' of shape [True, 8]",
    ),
    (put("step", to=-5), "step: expected a whole number from 0, got -5"),
    (put("step", to=True), "step: expected a whole number from 0, got True"),
    (put("step", to=2.0), "step: expected a whole number from 0, got 2.0"),
    (put("step", to=2**64), "step: expected a whole number from 0"),
    (put("skipped", to=-1), "skipped: expected a whole number from 0, got -1"),
    (drop("step"), "expected what this version's state_dict() returned, step is missing"),
    (drop("settings"), "settings is missing"),
    (put("settings", "seed", to=3), "settings.seed: expected 0, got 3"),
    (put("settings", "steps_per_epoch", to=2), "settings.steps_per_epoch: expected 1, got 2"),
    (put("settings", to=None), "settings: expected seed, exact_below, steps_per_epoch, group_mb, got None"),
    (put("method", "ratio", to=0.2), "method: expected {"),
    (put("method", "ratio", to=torch.zeros(2)), "method: expected plain values, got {"),
    (put("method", to=None), "got None"),
    (put("ranks", to=0), "ranks: expected a whole number from 1, got 0"),
    (put("rank", to=9), "rank: expected one below 2, got 9"),
    (put("measuring", to="no"), "measuring: expected true or false, got 'no'"),
    (put("groups", to=None), "groups: expected a list, got None"),
    (lambda state: state.update(epoch=3), "got 'epoch' besides"),
]


@pytest.fixture(scope="module")
def topk() -> list[dict[str, Any]]:
    return states(TOPK, 2)


def test_what_one_rank_finds_wrong_is_refused_on_all(topk: list[dict[str, Any]]) -> None:
    for i, (change, sentence) in enumerate(WRONG):
        given = copy.deepcopy(topk)
        change(given[i % 2])
        told = refused(TOPK, given, topk)
        assert re.match(r"state_dict: .*\(rank \d\); nothing was loaded on any rank$", told), told
        assert sentence in told
        assert f"(rank {i % 2})" in told
    for nothing in (None, [], 3):
        assert "expected what state_dict() returned" in refused(TOPK, [topk[0], nothing], topk)


def test_ranks_that_were_saved_at_different_times_do_not_go_on(topk: list[dict[str, Any]]) -> None:
    later = states(TOPK, 3)
    told = refused(TOPK, [topk[0], later[1]], later)
    assert "step: rank 0's has 2, rank 1's has 3" in told
    skipped = copy.deepcopy(topk)
    skipped[1]["skipped"] = 1
    assert "skipped: rank 0's has 0, rank 1's has 1" in refused(TOPK, skipped, topk)


@pytest.mark.parametrize("method", [FETCH], ids=["fetchsgd"])
def test_a_server_memory_that_differs_is_refused_or_the_replicas_drift(method: dict[str, Any]) -> None:
    early, late = states(method, 2), states(method, 3)
    late[1]["step"] = 2
    assert "the server's memory: rank 0's has" in refused(method, [early[0], late[1]], early)


def test_a_rank_loads_its_own_state(topk: list[dict[str, Any]]) -> None:
    """As accelerate's register_for_checkpointing gives all ranks rank 0's."""
    told = refused(TOPK, [topk[0], topk[0]], topk)
    assert "expected rank 1's own state, got rank 0's" in told
    assert "fedmpi.accelerate.register" in told


def test_a_state_of_other_settings_is_refused(topk: list[dict[str, Any]]) -> None:
    assert "settings.seed: expected 7, got 0" in refused(TOPK, topk, [], {**SETTINGS, "seed": 7})
    assert "settings.exact_below: expected 100, got 10" in refused(TOPK, topk, [], {"exact_below": 100})

    def run(comm: Comm) -> int:  # what it does not depend on may change
        reducer = Reducer(SHAPES, TOPK, comm, **SETTINGS, start_after=5, exchange="gather")
        reducer.load_state_dict(topk[comm.rank])
        return reducer.step

    assert run_ranks(2, run) == [2, 2]


def test_a_message_that_is_kept_has_to_be_one() -> None:
    saved = states(KEPT, 2)
    wrong = copy.deepcopy(saved)
    wrong[1]["groups"][0]["state"]["kept.index"].fill_(255)
    assert "groups.0.state: " in refused(KEPT, wrong, saved)
    wrong = copy.deepcopy(saved)
    wrong[0]["groups"][0]["state"]["held"].fill_(2)
    assert "held: expected 0 or 1, got 2" in refused(KEPT, wrong, saved)


def test_auto_takes_over_what_was_chosen_or_measures_on(topk: list[dict[str, Any]]) -> None:
    def run(comm: Comm, given: list[Any]) -> tuple[Any, int, bool, Any]:
        job = Job(SHAPES, AUTO, comm, SETTINGS)
        job.load_state_dict(given[comm.rank])
        again = job.state_dict()
        return job.stats()["auto"]["chosen"], again["step"], again["measuring"], again

    for chosen, step_, measuring, again in run_ranks(2, lambda comm: run(comm, topk)):
        assert (chosen["name"], step_, measuring) == ("topk", 2, False)
        assert same(again, topk[again["rank"]])
    early = states(AUTO, 1)
    assert early[0]["measuring"] is True
    for chosen, step_, measuring, _ in run_ranks(2, lambda comm: run(comm, early)):
        assert (chosen, step_, measuring) == (None, 1, True)
    told = refused(AUTO, states({"name": "dense"}, 1), early)
    assert "method: expected one that auto tries here" in told
    assert "measuring: rank 0's has True, rank 1's has False" in refused(
        AUTO, [early[0], {**early[1], "measuring": False}], early
    )
    assert "method: " in refused(AUTO, [topk[0], states({"name": "bf16"}, 2)[1]], early)
    hurt = copy.deepcopy(topk)
    hurt[0]["groups"][0]["state"]["residual"] = torch.zeros(1, 1)
    assert "residual: expected float32 of shape (1, 120)" in refused(AUTO, hurt, early)


def test_a_schema_is_declared_by_the_first_state() -> None:
    first = {
        "theta": torch.zeros(3),
        "signs": torch.zeros(0, 2, dtype=torch.uint8),
        "version": torch.tensor(0),
    }
    schema = schema_of(first, grows=("signs",))
    assert schema["signs"] == Entry(torch.uint8, (None, 2))
    assert schema_of(first, clients=4)["version"] == Entry(torch.int64, (4,))
    right = {**first, "signs": torch.zeros(5, 2, dtype=torch.uint8)}
    assert differs(schema, right, "server") is None
    wide = {**right, "signs": torch.zeros(5, 3, dtype=torch.uint8)}
    assert differs(schema, wide, "server") == (
        "server.signs: expected uint8 of shape (any, 2), got uint8 of shape (5, 3)"
    )
    assert differs({}, right, "client") == "client: expected nothing, got 'theta' besides"
