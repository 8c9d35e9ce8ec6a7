"""LEAF's data sets of any kind, and clients that are tested on what the test set has of their own users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks.data import load

from .conftest import SMALL


def leaf_of(folder: Path, train: dict[str, Any], test: dict[str, Any]) -> Path:
    """LEAF's folders of users' samples, ``{user: (x, y)}``."""
    for part, users in (("train", train), ("test", test)):
        (folder / part).mkdir(parents=True)
        data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
        content = {"users": [*data], "num_samples": [len(v["y"]) for v in data.values()], "user_data": data}
        (folder / part / "all_data.json").write_text(json.dumps(content))
    return folder


class TestLeaf:
    def test_numbers(self, tmp_path: Path) -> None:
        """Users have the same number in both sets; one of the test set alone has one of its own."""
        folder = leaf_of(
            tmp_path,
            {"a": ([[1.0, 2], [3, 4]], [0, 1]), "b": ([[5, 6]], [2])},
            {"b": ([[7, 8]], [1]), "c": ([[9, 9]], [0])},
        )
        got = load("leaf", folder)
        assert got.train.x.tolist() == [[1, 2], [3, 4], [5, 6]]
        assert (got.train.y.tolist(), got.test.y.tolist(), got.classes) == ([0, 1, 2], [1, 0], 3)
        assert got.train.groups is not None
        assert got.test.groups is not None
        assert (got.train.groups.tolist(), got.test.groups.tolist()) == ([0, 0, 1], [1, 2])
        assert load("leaf", folder, shape=[2, 1]).shape == (2, 1)
        with pytest.raises(DataError, match=r"data.shape \[3\] does not hold the 2 numbers of a sample"):
            load("leaf", folder, shape=[3])

    def test_values(self, tmp_path: Path) -> None:
        got = load("leaf", leaf_of(tmp_path, {"a": ([[1.0]], [0.5])}, {"a": ([[2.0]], [-1])}))
        assert (got.train.y.dtype, got.test.y.tolist(), got.classes) == (torch.float32, [-1.0], 1)

    def test_shakespeare(self, tmp_path: Path) -> None:
        """The next character; one that is not in training is the last of the vocabulary."""
        folder = leaf_of(tmp_path, {"romeo": (["abc", "bca"], ["a", "b"])}, {"romeo": (["abz"], ["z"])})
        got = load("leaf", folder, text="characters", length=4)
        assert got.train.x.tolist() == [[0, 1, 2, -1], [1, 2, 0, -1]]
        assert got.test.x.tolist() == [[0, 1, 3, -1]]
        assert (got.train.y.tolist(), got.test.y.tolist(), got.classes) == ([0, 1], [3], 4)

    def test_sent140(self, tmp_path: Path) -> None:
        row = ["1", "Mon", "NO_QUERY", "me", "so so good", "training"]
        folder = leaf_of(tmp_path, {"me": ([row], [1])}, {"me": ([[*row[:4], "good bad"]], [0])})
        got = load("leaf", folder, text="words", field=4, length=3, words=2)
        assert got.train.x.tolist() == [[0, 0, 1]]
        assert got.test.x.tolist() == [[1, 2, -1]]
        assert got.classes == 2

    @pytest.mark.parametrize(
        ("x", "y", "options", "message"),
        [
            (["abc"], [1], {}, r"user a: expected numbers, got the text 'abc'; for texts set data\.text"),
            ([[1.0]], [1], {"text": "words"}, r"user a: expected texts, as data\.text says, got \[1\.0\]"),
            (
                [["a"]],
                [1],
                {"text": "words", "field": 4},
                "expected lists of more than 4 entries, as data.field",
            ),
            ([[1.0], [2.0, 3.0]], [1, 2], {}, "x: expected samples of one shape, got several"),
            ([[1.0]], [[1]], {}, r"y: expected numbers or texts, one a sample, got \[1\]"),
            ([[1.0]], [], {}, "user a: expected lists x and y of equally many samples"),
            ([[1.0]], [None], {}, "y: expected numbers or texts, one a sample, got None"),
        ],
    )
    def test_wrong_samples(
        self, tmp_path: Path, x: Any, y: Any, options: dict[str, Any], message: str
    ) -> None:
        folder = leaf_of(tmp_path, {"a": (x, y)}, {"a": (x, y)})
        with pytest.raises(DataError, match=message):
            load("leaf", folder, **options)

    def test_clients_are_tested_on_their_own_test_samples(self, tmp_path: Path) -> None:
        """Client by client, as by hand; a user who does not train is nobody's."""
        rows = [[float(i), 1.0 - i] for i in (0, 1, 0, 1)]
        users = {name: (rows, [0, 1, 0, 1]) for name in "abc"}
        tests = {"a": (rows[:2], [0, 1]), "c": (rows[:3], [1, 0, 0]), "d": (rows[:1], [1])}
        folder = leaf_of(tmp_path, users, tests)
        values = {
            **SMALL,
            "data": {"name": "leaf", "folder": str(folder)},
            "clients": 3,
            "cohort": 3,
            "partition": "natural",
            "client_test": "groups",
            "local": {"lr": 1.0, "steps": 20},
            "evaluate_every": 1,
        }
        made = Simulation(config.parse(values), solo())
        assert made.held is not None
        assert sorted(made.held.sizes.tolist()) == [0, 2, 3]
        made.round(0)
        assert made.measures["client_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
        with pytest.raises(ConfigError, match="client_test: groups: expected partition: natural"):
            Simulation(config.parse({**values, "partition": "iid"}), solo())
        with pytest.raises(ConfigError, match="expected data that say whose each sample of both sets is"):
            Simulation(config.parse({**SMALL, "client_test": "groups"}), solo())
