"""Checkpoints on an untrusted disk: a damaged one is named and passed over, a foreign one executes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine import manifest
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import CheckpointError, FedMPIError

from .interrupted import LOOKBACK, SAVED, only, outcome, rounds_saved, train


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """A run with checkpoints after rounds 3 and 4, and the states that they hold."""
    plan = {"rounds": 1, "keep": 3}
    values = {**SAVED, "clients": 20, "method": LOOKBACK, "topology": "aggregator", "checkpoint": plan}
    out = tmp_path_factory.mktemp("saved") / "run"
    train(values, out, ranks=2)
    only(out, 3, 4)
    states = []
    for n in (3, 4):
        copy = out.parent / f"only-{n}"
        shutil.copytree(out, copy)
        only(copy, n)
        states.append(loaded(values, copy)[1])
    return values, out, states


def loaded(values: dict[str, Any], out: Path) -> tuple[int, dict[str, Any], list[str]]:
    """The round that a resume starts at, all that it starts with, and what was said."""
    simulation, said = Simulation(config.parse(values), solo()), []
    checkpoints = Checkpoints(out, simulation.config.checkpoint, simulation.comm)
    done, metrics = checkpoints.load(simulation, said.append)
    assert metrics is not None
    assert metrics.count(b"\n") == done
    return done, everything(simulation), said


def everything(simulation: Simulation) -> dict[str, Any]:
    """Each thing that a simulation of one rank keeps between rounds, or its hash."""
    parts = {"server": simulation.replica.state, "ledger": vars(simulation.ledger)}
    for name, kept in simulation.kept().items():
        rows = kept.store.get(torch.arange(simulation.config.clients))
        parts[name] = {**rows, "known": kept.store.known}
    digests = {
        f"{part}.{name}": hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for part, tensors in parts.items()
        for name, value in tensors.items()
    }
    return {**digests, **{name: str(getattr(simulation, name)) for name in manifest.Totals.model_fields}}


def test_a_checkpoint_holds_what_the_run_held(
    two_saved: tuple[dict[str, Any], Path, list[dict[str, Any]]],
) -> None:
    values, _, states = two_saved
    simulation = Simulation(config.parse(values), solo())
    held = []
    for t in range(4):
        simulation.round(t)
        held.append(everything(simulation))
    assert held[2:] == states
    assert held[2]["clients.known"] != held[3]["clients.known"]


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damage_is_named_and_the_one_before_is_taken(
    data: st.DataObject, two_saved: tuple[dict[str, Any], Path, list[dict[str, Any]]]
) -> None:
    values, out, states = two_saved
    last = out / "checkpoints" / "round-00000004"
    name = data.draw(st.sampled_from(sorted(path.name for path in last.iterdir())))
    kept = (last / name).read_bytes()
    at = data.draw(st.integers(0, len(kept) - 1))
    how = data.draw(st.sampled_from(["flip", "truncate", "extend", "remove", "another file"]))
    if how == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        (last / name).write_bytes(kept[:at] + bytes([kept[at] ^ bit]) + kept[at + 1 :])
    elif how == "truncate":
        (last / name).write_bytes(kept[:at])
    elif how == "extend":
        (last / name).write_bytes(kept + b"0")
    elif how == "remove":
        (last / name).unlink()
    else:
        (last / name).write_bytes((last.parent / "round-00000003" / name).read_bytes())
    try:
        done, state, said = loaded(values, out)
    finally:
        (last / name).write_bytes(kept)
    if done == 4:  # JSON that means the same
        assert name == "manifest.json"
        assert state == states[1]
    else:
        assert state == states[0]
        assert any("round-00000004" in line and "taking the one before it" in line for line in said)


def test_with_all_of_them_damaged_each_is_named(
    two_saved: tuple[dict[str, Any], Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    values, saved, _ = two_saved
    out = tmp_path / "run"
    shutil.copytree(saved, out)
    (out / "checkpoints" / "round-00000004" / "state.safetensors").write_bytes(b"")
    (out / "checkpoints" / "round-00000003" / "manifest.json").write_bytes(b"[" * 100_000)
    metrics = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        train(values, out, ranks=3, resume=True)
    none, newer, older = str(caught.value).splitlines()
    assert "none in" in none
    assert "round-00000004/state.safetensors: expected" in newer
    assert "bytes, got 0 (truncated or foreign)" in newer
    assert "round-00000003/manifest.json: expected a manifest: RecursionError" in older
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert (out / "summary.json").exists()


def test_a_damaged_one_is_written_anew(
    two_saved: tuple[dict[str, Any], Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The run that starts before it passes it again, and does not count it among those it keeps."""
    values, saved, _ = two_saved
    out = tmp_path / "run"
    shutil.copytree(saved, out)
    for name in ("round-00000004", "round-00000007"):
        shutil.copytree(
            saved / "checkpoints" / "round-00000004", out / "checkpoints" / name, dirs_exist_ok=True
        )
        (out / "checkpoints" / name / "peers-00000-00000.safetensors").write_bytes(b"x")
    train({**values, "checkpoint": {"rounds": 4, "keep": 1}}, out, resume=True)
    assert rounds_saved(out) == [4]
    assert loaded(values, out)[0] == 4
    assert outcome(out) == outcome(saved)


def forge(folder: Path, **changes: Any) -> None:
    """A manifest with a right checksum that says something else."""
    body = json.loads((folder / "manifest.json").read_text())["manifest"]
    body |= changes
    (folder / "manifest.json").unlink()
    text = json.dumps({"sha256": manifest._digest(body), "manifest": body})
    (folder / "manifest.json").write_text(text)


def test_a_foreign_checkpoint_executes_nothing_and_reads_nothing_else(
    two_saved: tuple[dict[str, Any], Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    values, saved, states = two_saved
    peers = "peers-00000-00000.safetensors"

    def refused(says: str, change: Any) -> None:
        out = tmp_path / "run"
        shutil.copytree(saved, out)
        folder = out / "checkpoints" / "round-00000004"
        change(folder, json.loads((folder / "manifest.json").read_text())["manifest"])
        done, state, said = loaded(values, out)
        assert (done, state) == (3, states[0])
        assert says in said[0], said
        shutil.rmtree(out)

    def link(folder: Path, body: Any) -> None:
        (folder / peers).rename(tmp_path / "elsewhere")
        (folder / peers).symlink_to(tmp_path / "elsewhere")

    def pipe(folder: Path, body: Any) -> None:
        (folder / peers).unlink()
        os.mkfifo(folder / peers)

    def link_folder(folder: Path, body: Any) -> None:
        folder.rename(tmp_path / "round")
        folder.symlink_to(tmp_path / "round")

    def outside(folder: Path, body: Any) -> None:
        forge(folder, files={**body["files"], f"../round-00000003/{peers}": body["files"][peers]})

    def huge(folder: Path, body: Any) -> None:
        forge(folder, files={**body["files"], peers: {**body["files"][peers], "bytes": 1 << 50}})

    def pickled(folder: Path, body: Any) -> None:
        data = b"cos\nsystem\n(S'touch executed'\ntR."
        (folder / peers).write_bytes(data)
        file = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        forge(folder, files={**body["files"], peers: {**body["files"][peers], **file}})

    def other_rows(folder: Path, body: Any) -> None:
        file = {**body["files"][peers], "clients": list(range(2000))}
        forge(folder, files={**body["files"], peers: file})

    def other_store(folder: Path, body: Any) -> None:
        forge(folder, files={**body["files"], peers: {**body["files"][peers], "store": "friends"}})

    def other_ids(folder: Path, body: Any) -> None:
        forge(folder, files={**body["files"], peers: {**body["files"][peers], "clients": [-1, 1 << 80]}})

    def other_state(folder: Path, body: Any) -> None:
        file = body["files"]["metrics.jsonl"]
        (folder / "state.safetensors").write_bytes((folder / "metrics.jsonl").read_bytes())
        forge(folder, files={**body["files"], "state.safetensors": file})

    refused(f"{peers}: expected a plain file", link)
    refused(f"{peers}: expected a plain file", pipe)
    refused("expected a folder, not a link", link_folder)
    refused("String should match pattern", outside)
    refused(f"expected {1 << 50} bytes", huge)
    refused(f"{peers}: expected safetensors", pickled)
    refused(f"files.{peers}: expected clients below 20, got 20", other_rows)
    refused("expected a store of clients, peers, got 'friends'", other_store)
    refused("greater than or equal to 0", other_ids)
    refused("state.safetensors: expected safetensors", other_state)
    refused("expected round-00000009, by its manifest", lambda folder, body: forge(folder, round=9))
    refused("Extra inputs are not permitted", lambda folder, body: forge(folder, code="import os"))
    assert not Path("executed").exists()


def test_links_do_not_lead_out_of_a_run(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    out.mkdir()
    (out / "metrics.jsonl").symlink_to(elsewhere / "precious")
    (out / "checkpoints").symlink_to(elsewhere)
    for resume in (False, True):
        with pytest.raises(FedMPIError, match="checkpoints: expected a folder, not a link"):
            train(SAVED, out, resume=resume)
    (out / "checkpoints").unlink()
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / ".round-00000009").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Cannot call rmtree on a symbolic link"):
        train(SAVED, out)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    assert (elsewhere / "precious").read_text() == "mine"
