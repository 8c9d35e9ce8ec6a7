"""Small clients that train at once, with buffers, parts and memories of their own: as one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine import trainer
from fedmpi.engine.rounds import Simulation

from .conftest import SMALL

NET = {"name": "tests.nets:build", "p": 0.0}
OWN = [{"match": "last.*", "travels": "local"}, {"match": "norm.*", "travels": "local"}]
# ε keeps it from making steps of what rounding leaves of a gradient of 0, as before batch norm.
ADAM = {"optimizer": "adamw", "epsilon": 1e-3, "keep": True, "lr": 0.01, "steps": 3, "batch": 20}
EQUAL = {"data": {"name": "digits", "limit": 600}, "partition": "iid"}  # a hundred samples each


@pytest.mark.parametrize(
    ("changes", "at_once"),
    [
        ({**EQUAL, "model": NET}, True),
        ({**EQUAL, "model": NET, "parts": OWN, "client_test": 0.2}, True),
        ({**EQUAL, "model": NET, "parts": OWN, "client_test": 0.2, "local": ADAM}, True),
        ({"model": {"name": "fcn", "hidden": 8}, "local": ADAM}, True),  # clients of many sizes
        (
            {
                "model": {"name": "fcn", "hidden": 8},
                "parts": OWN[:0],
                "local": {**ADAM, "epochs": 1, "steps": None},
            },
            True,
        ),
        ({"model": NET}, False),  # rows that are left out would count in the others' statistics
        (
            {**EQUAL, "model": NET, "local": {"lr": 0.1, "steps": 3, "batch": 33}},
            False,
        ),  # one of 100 is left alone
        ({**EQUAL, "model": "tests.nets:means"}, False),
        ({**EQUAL, "model": NET, "parts": [{"match": "norm.running*", "travels": "frozen"}]}, False),
    ],
    ids=[
        "buffers",
        "parts of their own",
        "parts and memories of their own",
        "memories",
        "epochs",
        "other sizes",
        "a batch of one",
        "assigned buffers",
        "frozen buffers",
    ],
)
def test_at_once_as_one_after_the_other(
    changes: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(*args: Any) -> Any:
        calls.append(1)
        return train(*args)

    train = trainer.at_once
    monkeypatch.setattr(trainer, "at_once", spy)
    values = {**SMALL, "local": {"lr": 0.1, "steps": 3, "batch": 20}, "rounds": 6, **changes}
    pair = [Simulation(config.parse({**values, "evaluate_every": 6}), solo()) for _ in range(2)]
    for made, together in zip(pair, (True, False), strict=True):
        made.trainer.together = together
        start_X = made.replica.parameters().clone()
        for t in range(6):
            made.round(t)
    assert bool(calls) == at_once
    one, other = (made.replica.parameters() for made in pair)
    size = pair[0].plan.trained.size
    assert float((one - other)[:size].norm()) <= 1e-3 * float((one - start_X)[:size].norm())
    torch.testing.assert_close(one[size:], other[size:], rtol=1e-3, atol=1e-4)
    ids = pair[0].own.known
    assert torch.equal(ids, pair[1].own.known)
    for name, value in pair[0].own.get(ids).items():
        torch.testing.assert_close(value, pair[1].own.get(ids)[name], rtol=1e-2, atol=1e-3)
