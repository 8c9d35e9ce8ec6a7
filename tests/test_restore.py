"""What a checkpoint must be to be gone on from: each thing that can be wrong with one has a sentence of its own.

Damage at random and resumes to the same bits are in tests/test_checkpoint.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedmpi import config
from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.engine import manifest
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.resume import restore
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.errors import CheckpointError, ConfigError, FedMPIError

from .conftest import SMALL

VALUES: dict[str, Any] = {
    **SMALL,
    "rounds": 2,
    "checkpoint": {"rounds": 2},
    "method": {"name": "topk", "ratio": 0.1, "feedback": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run(config.parse(VALUES), solo(), out, quiet=True)
    return out / "checkpoints" / "round-00000002"


Body = dict[str, Any]


def rewrite(folder: Path, change: Callable[[Body], None]) -> None:
    """A manifest with its checksum, as a foreign program would write it."""
    path = folder / manifest.MANIFEST
    body = json.loads(path.read_bytes())["manifest"]
    change(body)
    path.write_text(json.dumps({"sha256": manifest._digest(body), "manifest": body}))


def rewrite_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load((folder / "state.safetensors").read_bytes())
    change(tensors)
    (folder / "state.safetensors").unlink()
    file = manifest.write(folder / "state.safetensors", save(tensors))
    rewrite(folder, lambda body: body["files"].update({"state.safetensors": file.model_dump()}))


def of_stores(body: Body) -> list[Body]:
    return [file for file in body["files"].values() if file["store"]]


CHANGES: dict[str, tuple[Callable[[Body], Any], type[FedMPIError], str]] = {
    "no state": (
        lambda body: body["files"].pop("state.safetensors"),
        CheckpointError,
        "expected a file state.safetensors, got clients-00000-00000.safetensors, metrics.jsonl",
    ),
    "another round": (
        lambda body: body.update(round=1),
        CheckpointError,
        "expected round-00000001, by its manifest",
    ),
    "a store that there is not": (
        lambda body: [file.update(store="servants") for file in of_stores(body)],
        CheckpointError,
        "expected a store of clients, got 'servants'",
    ),
    "other clients": (
        lambda body: [file["clients"].pop() for file in of_stores(body)],
        CheckpointError,
        "expected client states {'residual': .*, got {'residual'",
    ),
    "a number that is none": (
        lambda body: body["totals"].update(called="six"),
        CheckpointError,
        "totals.called: .*, got 'six'",
    ),
    "a configuration of another version": (
        lambda body: body["config"].update(quantum=True),
        ConfigError,
        "has a configuration of another version: quantum",
    ),
    "another model": (
        lambda body: body["parameters"].update(more=[3]),
        ConfigError,
        "got one of other parameters",
    ),
    "another configuration": (
        lambda body: body["config"].update(seed=4),
        ConfigError,
        "--resume: seed is 3, but .* was written with 4",
    ),
}


def refused(folder: Path, error: type[FedMPIError], match: str) -> None:
    simulation = Simulation(config.parse(VALUES), solo())
    before = simulation.topology.parameters().clone()
    with pytest.raises(error, match=match):
        restore(simulation, folder)
    assert torch.equal(simulation.topology.parameters(), before)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_does_not_fit_is_named(name: str, folder: Path) -> None:
    change, error, match = CHANGES[name]
    rewrite(folder, change)
    refused(folder, error, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("server.changed"), "expected server state changed int32, .*, got theta"),
        (lambda tensors: tensors.pop("ledger.seen"), "expected ledger state .*seen int64, .*, got "),
        (
            lambda tensors: tensors.update({"server.theta": torch.zeros(650, dtype=torch.float64)}),
            "expected server state .*theta float32, .*, got .*theta float64",
        ),
        (
            lambda tensors: tensors.update({"server.theta": torch.zeros(649)}),
            re.escape("server.theta: expected (650,), got (649,)"),
        ),
        (
            lambda tensors: tensors.update({"ledger.seen": torch.zeros(7, dtype=torch.int64)}),
            re.escape("ledger.seen: expected (6,), got (7,)"),
        ),
    ],
)
def test_a_state_of_another_method_or_model_is_named(change: Any, match: str, folder: Path) -> None:
    rewrite_state(folder, change)
    refused(folder, CheckpointError, match)


def test_a_manifest_is_what_its_checksum_says(folder: Path) -> None:
    path = folder / manifest.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"called": 8', b'"called": 9'))
    refused(folder, CheckpointError, r"manifest.json: expected SHA-256 \w+, got \w+ \(damaged\)")


def test_a_manifest_of_more_than_a_gigabyte_is_not_read(folder: Path) -> None:
    with (folder / manifest.MANIFEST).open("r+b") as file:
        file.truncate((1 << 30) + 1)  # a hole: no gigabyte on the disk
    refused(folder, CheckpointError, f"expected at most {1 << 30} bytes, got {(1 << 30) + 1}")


def test_another_torch_is_said(folder: Path) -> None:
    rewrite(folder, lambda body: body.update(torch="1.0"))
    (folder.parent / "checkpoints").mkdir()
    folder.rename(folder.parent / "checkpoints" / folder.name)
    simulation, said = Simulation(config.parse(VALUES), solo()), list[str]()
    checkpoints = Checkpoints(folder.parent, simulation.config.checkpoint, simulation.comm)
    assert checkpoints.load(simulation, said.append)[0] == 2
    assert said[1:] == [f"written with torch 1.0, this is {torch.__version__}: the last bits may differ"]


def test_ranks_that_share_no_folder_are_named_and_leave_nothing(tmp_path: Path) -> None:
    """Two machines, each with a folder of its own in the place of ``--out``."""

    def main(comm: Comm) -> str:
        simulation = Simulation(config.parse(VALUES), comm)
        simulation.round(0)
        own = tmp_path / str(comm.rank)
        own.mkdir()
        (own / "metrics.jsonl").touch()
        with pytest.raises(FedMPIError) as caught:
            Checkpoints(own, simulation.config.checkpoint, comm).save(simulation, 1)
        return str(caught.value)

    said = run_ranks(2, main, timeout=30)
    assert all(f"rank 1 does not see {tmp_path}/1/checkpoints/.round-00000001" in one for one in said), said
    assert not list((tmp_path / "0" / "checkpoints").iterdir())


def test_what_could_not_be_recorded_ends_the_save_before_anything_is_written(tmp_path: Path) -> None:
    simulation = Simulation(config.parse(VALUES), solo())
    simulation.round(0)
    simulation.error = ConfigError("--out: no space")
    with pytest.raises(ConfigError, match="--out: no space"):
        Checkpoints(tmp_path, simulation.config.checkpoint, simulation.comm).save(simulation, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(method={"name": "evil:ENTRY"}),
        lambda config: config.update(method="evil:ENTRY"),
        lambda config: config.update({"method.name": "topk", "method": {"name": "evil:ENTRY"}}),
        lambda config: config["method"].update(inner={"name": "evil:ENTRY"}),
        lambda config: config["model"].update(name="evil:build"),
        lambda config: config["data"].update(name="evil:load"),
        lambda config: config["data"].update(folder={"name": "evil:load"}),
    ],
)
def test_a_checkpoint_names_nothing_that_is_imported(
    change: Callable[[Body], Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('PWNED').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rewrite(folder, lambda body: change(body["config"]))
    with contextlib.suppress(ConfigError):  # a folder of data may differ, and is this run's
        restore(Simulation(config.parse(VALUES), solo()), folder)
    assert not (tmp_path / "PWNED").exists()


def test_a_number_is_not_a_share(folder: Path) -> None:
    rewrite(folder, lambda body: body["config"].update(cohort=float(body["config"]["cohort"])))
    refused(folder, ConfigError, r"cohort is 4, but .* was written with 4.0")
