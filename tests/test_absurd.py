"""Values that no machine can run are refused with the figure, before anything of their size is allocated."""

from __future__ import annotations

import pytest

from fedmpi import config
from fedmpi.comm.local import run_ranks
from fedmpi.engine import parts
from fedmpi.errors import ConfigError
from fedmpi.methods import METHODS

from .conftest import SMALL

HUGE = 2**62


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threads": 1_000_000}, "threads: expected less than or equal to 1024, got 1000000"),
        ({"clients": 10**12}, "clients: expected less than or equal to 1000000000"),
        ({"clients": 10**8}, "clients: expected 1 to"),
        ({"rounds": 10**12}, "rounds: expected less than"),
        ({"rounds": 2**64}, "rounds: expected an integer of 64 bits, got one of 65"),
        ({"local": {"lr": 0.1, "batch": 2**64}}, "local.batch: expected an integer of 64 bits"),
        ({"local": {"lr": float("nan")}}, "local.lr: expected a finite number, got nan"),
        ({"server": {"lr": float("inf")}}, "server.lr: expected a finite number, got inf"),
        (
            {"server": {"schedule": {"name": "step", "milestones": [2**70]}}},
            "milestones: expected an integer of 64",
        ),
        ({"model": {"name": "fcn", "hidden": 10**10}}, "model fcn: it needs"),
        ({"model": {"name": "fcn", "hidden": HUGE}}, "model fcn: it needs"),
        ({"partition": {"name": "dirichlet", "minimum": HUGE}}, "partition"),
        ({"partition": {"name": "labels", "labels_per_client": HUGE}}, "labels_per_client"),
        ({"data": {"name": "digits", "x": {1: 2}}}, "data.x: expected text as a key, got 1"),
        ({"x" * 10_000: 1}, "unknown key"),
        ({"model": "f" * 10_000}, "unknown 'fff"),
        ({"rounds": [[[[["x" * 1000] * 100] * 100] * 10] * 10]}, "rounds: expected a valid integer"),
        ({f"key{i}": i for i in range(5000)}, "more"),
    ],
    ids=range(18),
)
def test_an_absurd_value_is_one_short_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parts.load(config.parse({**SMALL, **changes}))
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 2_000


NUMBERS = [
    (name, key)
    for name, row in METHODS.items()
    for key, field in row.options.model_fields.items()
    if "int" in str(field.annotation)
]


@pytest.mark.parametrize(("name", "key"), NUMBERS, ids="-".join)
def test_a_methods_absurd_number_is_refused(name: str, key: str) -> None:
    """Or is more than there is and means all of it, as a rank does."""
    method = {
        "name": name,
        **{k: v for k, v in METHODS[name].example.items() if (k, key) != ("ratio", "k")},
        key: HUGE,
    }
    said = ""
    try:
        parts.load(config.parse({**SMALL, "method": method}))
    except ConfigError as error:
        said = str(error)
    assert not said or key in said
    assert len(said) < 600


def test_more_ranks_than_threads_can_be_had() -> None:
    with pytest.raises(ConfigError, match="--local-ranks: expected at most 1,024"):
        run_ranks(1_000_000, lambda comm: comm.rank)
