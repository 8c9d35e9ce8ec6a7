"""What must hold of every method (tests/test_conformance.py), of Prune-m once it has a mask."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from fedmpi import methods, random
from fedmpi.comm import run_ranks, solo
from fedmpi.method import Context, Method, State
from fedmpi.methods.base import Setup

from . import test_conformance as conformance
from .conftest import SMALL
from .jobs.runs import outcome

INNERS = {
    "topk feedback": {"name": "topk", "ratio": 0.05, "feedback": True},
    "rtopk": {"name": "rtopk", "k": 12, "r": 90},
}
PROPERTIES = [
    name
    for name, test in vars(conformance).items()
    if name.startswith("test_") and [*inspect.signature(test).parameters] == ["method"]
]  # but for those that make models, and so methods, of their own


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
@pytest.mark.parametrize("mask_from", ["dense", "compressed", "auxiliary", "client"])
@pytest.mark.parametrize("name", PROPERTIES)
def test_conformance_after_the_first_epoch(
    name: str, mask_from: str, inner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the suite takes the shared state of a server before its first round, the later epochs here have a
    mask; where it plays a server's rounds, the mask is that server's own."""
    options = {"name": "prune", "m": 120, "mask_from": mask_from, "inner": inner}
    method = methods.build(options, conformance.SPEC, Setup(seed=1))
    kept = random.sample(random.key(4), conformance.SPEC.size, 120).sort().values
    plain = conformance.at

    def at(
        method: Method, t: int, clients: torch.Tensor | None = None, state: State | None = None
    ) -> Context:
        ctx = plain(method, t, clients, state)
        if state is not None:
            return ctx
        shared = {"kept": kept if ctx.round.epoch else kept[:0]}
        return Context(ctx.round, ctx.clients_C, ctx.steps_C, shared)

    monkeypatch.setattr(conformance, "at", at)
    getattr(conformance, name)(method)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_from": "dense", "inner": {"name": "rtopk", "k": 20, "feedback": True}},
        {"mask_from": "compressed", "inner": {"name": "topk", "k": 20, "feedback": True}},
        {"mask_from": "auxiliary", "inner": {"name": "topk", "k": 20, "feedback": True}},
        {"mask_from": "client", "inner": {"name": "topk", "k": 20, "feedback": True}},
    ],
    ids=lambda options: options["mask_from"],
)
def test_ranks_and_topologies_are_the_same_run(options: dict[str, Any]) -> None:
    values = {**SMALL, "method": {"name": "prune", "m": 100, **options}, "rounds": 6, "reproducible": True}
    reference = outcome(values, solo())
    for topology in ("allreduce", "aggregator"):
        for result in run_ranks(
            3, lambda comm, t=topology: outcome({**values, "topology": t}, comm), timeout=60
        ):
            conformance.assert_same_run(result, reference, exact=True)
