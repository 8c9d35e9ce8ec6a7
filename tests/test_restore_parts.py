"""What a checkpoint of a run with parts, buffers and what clients keep for themselves must be to be gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine import manifest
from fedmpi.engine.resume import restore
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.errors import CheckpointError

from .conftest import SMALL
from .test_restore import Body, rewrite, rewrite_state

VALUES: dict[str, Any] = {
    **SMALL,
    "rounds": 2,
    "model": {"name": "tests.nets:build"},
    "client_test": 0.2,
    "local": {"lr": 0.05, "batch": 20, "scaffold": "exact"},
    "method": {"name": "topk", "ratio": 0.1, "feedback": True},
    "parts": [
        {"match": "norm.*", "travels": "local"},
        {"match": "middle.weight", "travels": {"name": "intrinsic", "dim": 8, "schedule": "time_varying"}},
    ],
    "checkpoint": {"rounds": 2},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run(config.parse(VALUES), solo(), out, quiet=True)
    return out / "checkpoints" / "round-00000002"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def refused(folder: Path, match: str) -> None:
    """And everything is as it was: the checkpoint that is whole can be taken after it."""
    simulation = Simulation(config.parse(VALUES), solo())
    before = simulation.replica.parameters().clone()
    with pytest.raises(CheckpointError, match=match) as raised:
        restore(simulation, folder)
    assert str(folder) in str(raised.value)
    assert torch.equal(simulation.replica.parameters(), before)


def own_of(body: Body) -> tuple[str, Body]:
    return next((name, file) for name, file in body["files"].items() if file["store"] == "own")


def without_a_file(body: Body) -> None:
    del body["files"][own_of(body)[0]]


def without_a_client(body: Body) -> None:
    own_of(body)[1]["clients"].pop()


@pytest.mark.parametrize("change", [without_a_file, without_a_client])
def test_a_client_whose_own_part_is_missing_is_named(change: Callable[[Body], None], folder: Path) -> None:
    """Else it would begin again with the parameters that the run began with."""
    rewrite(folder, change)
    refused(folder, r"expected the state of client \d, which sent messages, got none \(own\)")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda own: own.pop("local"), r"expected client states .*'local'"),
        (
            lambda own: own.update(local=own["local"][:, 1:].contiguous()),
            r"'local': \(torch.float32, \(6, \d",
        ),
        (lambda own: own.update(local=own["local"].double()), r"got .*'local': \(torch.float64"),
        (lambda own: own["local"].fill_(float("nan")), "local: expected finite numbers, got NaN or infinity"),
    ],
    ids=["missing", "shorter", "of another type", "not finite"],
)
def test_what_clients_keep_for_themselves_is_checked(
    change: Callable[[dict[str, Tensor]], None], match: str, folder: Path
) -> None:
    def other(body: Body) -> None:
        name, file = own_of(body)
        own = load((folder / name).read_bytes())
        change(own)
        (folder / name).unlink()
        written = manifest.write(folder / name, save(own))
        file.update(written.model_dump(include={"bytes", "sha256"}))

    rewrite(folder, other)
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("server.behind"), "expected server state behind int64"),
        (lambda t: t.pop("server.intrinsic.sigma"), r"expected server state .*intrinsic\.\w+ float32"),
        (lambda t: t.update({"server.more": torch.zeros(2)}), "expected server state .*, got .*more float32"),
        (
            lambda t: t.update({"server.behind": t["server.behind"][:, 1:].contiguous()}),
            r"server.behind: expected \(1, 5\), got \(1, 4\)",
        ),
        (lambda t: t["server.behind"].fill_(7), "expected a server state that clients can catch up with"),
        (lambda t: t["server.behind"].fill_(-1), "server.behind: expected whole numbers from 0"),
        (lambda t: t["server.control.version"].fill_(9), "expected"),
        (lambda t: t["server.theta"].mul_(2), "server.theta: expected the parameters that the other entries"),
    ],
    ids=[
        *(
            "no row of versions",
            "no coordinates",
            "one more",
            "of fewer parts",
            "later versions",
            "negative versions",
        ),
        *("a part of another version", "other parameters"),
    ],
)
def test_a_server_state_of_other_parts_is_named(change: Any, match: str, folder: Path) -> None:
    rewrite_state(folder, change)
    refused(folder, match)


def test_the_whole_one_is_taken(folder: Path) -> None:
    simulation = Simulation(config.parse(VALUES), solo())
    restore(simulation, folder)
    assert len(simulation.own.known) == len(simulation.clients.known) > 0
