"""Checkpoints: a run that was interrupted, killed, moved to more or fewer ranks or damaged on disk ends as one that was
not, or with an error that says what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine import checkpoint, manifest
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.errors import CheckpointError, ConfigError, FedMPIError, Stopped
from fedmpi.methods import METHODS

from .conftest import JOBS, SMALL, Mpi
from .test_conformance import RUNS

SAVED = {**SMALL, "reproducible": True, "checkpoint": {"rounds": 3, "keep": 9}}
TOPK = {"name": "topk", "ratio": 0.1, "feedback": True}
LOOKBACK = {"name": "lookback", "threshold": 0.5, "inner": TOPK}
# Not a function of what is trained: times, and what depends on the number of ranks.
OWN = ("seconds", "wire_bytes", "wire_bytes_by_rank", "ranks", "clients_by_rank", "comm")


def train(values: dict[str, Any], out: Path, ranks: int = 1, resume: bool = False) -> dict[str, Any]:
    """The summary; whatever torch, numpy and Python think of as randomness is somewhere else each time."""
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    parsed = config.parse(values)
    return run_ranks(ranks, lambda comm: run(parsed, comm, out, quiet=True, resume=resume), timeout=60)[0]


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def outcome(out: Path) -> tuple[Any, ...]:
    """Everything that an interruption must not change."""
    summary = json.loads((out / "summary.json").read_text())
    trained = sum(summary["clients_by_rank"])
    kept = {name: value for name, value in summary.items() if name not in OWN}
    return lines(out), (out / "model.safetensors").read_bytes(), kept, trained


def rounds_saved(out: Path) -> list[int]:
    return sorted(int(path.name[6:]) for path in (out / "checkpoints").iterdir())


def only(out: Path, *rounds: int) -> None:
    """As if the run had been interrupted after the last of ``rounds``."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name[6:]) not in rounds:
            shutil.rmtree(path)


EXAMPLES = [name for name in RUNS if name in METHODS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_method_resumes_exactly_at_half_the_ranks(name: str, tmp_path: Path) -> None:
    values = {**SAVED, "method": RUNS[name]["method"], "topology": "aggregator"}
    train(values, tmp_path, ranks=4)
    expected = outcome(tmp_path)
    train(values, tmp_path, ranks=2, resume=True)
    assert outcome(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("name", RUNS)
def test_every_variant_resumes_exactly_from_any_round_at_any_number_of_ranks(
    name: str, topology: str, tmp_path: Path
) -> None:
    every = {**SAVED, "checkpoint": {"rounds": 1, "keep": 9}, "topology": topology}
    for exact, ranks, to in (
        (True, 4, (4, 2)),
        (True, 2, (3,)),
        (True, 1, (2,)),
        (False, 2, (2,)),  # float sums in one order: the same bits at the same number of ranks
    ):
        values, out = {**every, "reproducible": exact, "method": RUNS[name]["method"]}, tmp_path / "run"
        train(values, out, ranks)
        expected = outcome(out)
        for done in (1, 2, 3, 4):
            for n in to:
                copy = tmp_path / "copy"
                shutil.copytree(out, copy)
                only(copy, done)
                train(values, copy, n, resume=True)
                assert outcome(copy) == expected, (exact, ranks, done, n)
                shutil.rmtree(copy)


OTHERS: dict[str, dict[str, Any]] = {
    "server momentum": {"server": {"optimizer": "momentum"}},
    "adam, dropouts": {"server": {"optimizer": "adam", "lr": 0.05}, "dropout": 0.4},
    "coordinates with yogi": {
        "method": {"name": "intrinsic", "dim": 32, "schedule": "time_varying"},
        "server": {"optimizer": "yogi", "lr": 0.05},
    },
    "the server's own training": {
        "method": {"name": "prune", "keep": 0.3, "mask_from": "auxiliary", "inner": TOPK},
        "topology": "aggregator",
    },
    "each client once an epoch": {"sampling": "epoch_shuffle", "method": LOOKBACK},
    "by samples, mapped": {"sampling": "weighted", "method": TOPK, "store": "mmap"},
    "evaluated seldom": {"evaluate_every": 2, "method": {"name": "powersgd", "rank": 2, "feedback": True}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_everything_that_a_run_keeps_is_saved(what: str, tmp_path: Path) -> None:
    values = {**SAVED, **OTHERS[what]}
    train(values, tmp_path, ranks=2)
    expected = outcome(tmp_path)
    train(values, tmp_path, ranks=3, resume=True)
    assert outcome(tmp_path) == expected


@pytest.mark.parametrize("name", ["topk", "lookback", "signsgd"])
@pytest.mark.parametrize("exact", [True, False])
def test_data_parallel_training_resumes_exactly(name: str, exact: bool, tmp_path: Path) -> None:
    """Every rank keeps what the receivers of all ranks' messages keep."""
    values = {
        **{key: SAVED[key] for key in ("data", "model", "rounds", "seed", "checkpoint")},
        "mode": "data_parallel",
        "local": {"lr": 0.1, "batch": 100},
        "server": {"optimizer": "momentum"} if name == "topk" else {"schedule": {"name": "cosine"}},
        "method": RUNS[name]["method"],
        "reproducible": exact,
    }
    train(values, tmp_path, ranks=3)
    expected = outcome(tmp_path)
    train(values, tmp_path, ranks=3, resume=True)
    assert outcome(tmp_path) == expected
    with pytest.raises(ConfigError, match=r"--resume: clients is 2, but .* with 3"):
        train(values, tmp_path, ranks=2, resume=True)
    if name != "topk":
        with pytest.raises(
            ConfigError, match=r"rounds is 6, but .* with 5, on which server.schedule: cosine depends"
        ):
            train({**values, "rounds": 6}, tmp_path, ranks=3, resume=True)


def test_floats_resume_to_the_same_bits_at_the_same_number_of_ranks(tmp_path: Path) -> None:
    values = {**SAVED, "method": LOOKBACK, "reproducible": False}
    whole = train(values, tmp_path, ranks=3)
    expected = outcome(tmp_path)
    again = train(values, tmp_path, ranks=3, resume=True)
    assert outcome(tmp_path) == expected
    assert again["clients_by_rank"] == whole["clients_by_rank"]


def test_only_clients_that_came_are_written_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped store of a million clients is read row by row; the other store continues from it."""
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 3 * 4 * 650)
    values = {**SAVED, "method": TOPK, "clients": 40, "cohort": 4, "store": "mmap"}
    train(values, tmp_path, ranks=2)
    expected, saved = outcome(tmp_path), tmp_path / "checkpoints" / "round-00000003"
    described = json.loads((saved / "manifest.json").read_text())["manifest"]
    came = [file["clients"] for file in described["files"].values() if file["store"] == "clients"]
    simulation = Simulation(config.parse(values), solo())
    for t in range(3):
        simulation.round(t)
    assert sorted(client for clients in came for client in clients) == simulation.clients.known.tolist()
    assert len(simulation.clients.known) < 13
    assert max(map(len, came)) == 3
    assert len(came) >= 3
    train({**values, "store": "memory"}, tmp_path, ranks=1, resume=True)
    assert outcome(tmp_path) == expected


def signal_in_round(monkeypatch: pytest.MonkeyPatch, t: int, number: int) -> None:
    """A signal to this process, whose main thread is rank 0, while its last rank is in round t."""
    original = Simulation.round

    def round(self: Simulation, now: int) -> dict[str, Any]:
        if now == t and self.comm.rank == self.comm.size - 1:
            os.kill(os.getpid(), number)
        return original(self, now)

    monkeypatch.setattr(Simulation, "round", round)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_round(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches one of the ranks; all stop."""
    values = {**SAVED, "rounds": 12, "method": TOPK, "checkpoint": {}}
    train(values, tmp_path / "whole", ranks=2)
    before, out = signal.getsignal(number), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in_round(patch, 3, number)
        with pytest.raises(Stopped, match=r"stopped after round \d+ of 12"):
            train(values, out, ranks=2)
    assert signal.getsignal(number) is before
    (done,) = rounds_saved(out)
    assert done in (4, 5), "after the round, or after the next where rank 0 had already agreed on it"
    assert [line["round"] for line in lines(out)] == list(range(done))
    assert not (out / "summary.json").exists()
    train(values, out, ranks=1, resume=True)
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out, original = tmp_path / "small.yaml", tmp_path / "run", Simulation.round
    path.write_text(yaml.safe_dump(SAVED))

    def round(self: Simulation, t: int) -> dict[str, Any]:
        if t == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, t)

    monkeypatch.setattr(Simulation, "round", round)
    assert main(["train", str(path), "--out", str(out), "--quiet"]) == 130
    assert rounds_saved(out) == [3]


def test_the_command_line_stops_with_75_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "small.yaml", tmp_path / "a run"
    path.write_text(yaml.safe_dump({**SAVED, "checkpoint": {}}))
    train({**SAVED, "rounds": 9, "checkpoint": {}}, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_in_round(patch, 2, signal.SIGUSR1)
        assert main(["train", str(path), "rounds=9", "--out", str(out), "--resume", "--quiet"]) == 75
    said = capsys.readouterr().err
    assert f"fedmpi train {path} rounds=9 --resume '{out}'" in said
    assert rounds_saved(out) == [3]
    assert main(["train", str(path), "rounds=9", "--quiet", "--out", str(out)]) == 2
    assert "holds an interrupted run; continue it with --resume" in capsys.readouterr().err
    assert main(["train", str(path), "--quiet", "--resume", "rounds=9"]) == 2
    assert "expected a run's folder (overrides stand before --resume)" in capsys.readouterr().err
    assert main(["train", str(path), "rounds=9", "--quiet", "--resume", str(out)]) == 0
    assert outcome(out) == outcome(tmp_path / "whole")


def test_without_a_folder_the_last_run_of_the_configuration_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SAVED))
    assert main(["train", "small.yaml", "--quiet", "--resume"]) == 2
    assert "expected a run of small in" in capsys.readouterr().err
    for name in ("small-20260101-000000", "small-20260102-000000", "small-other-20270101-000000"):
        train(SAVED, Path("runs") / name)
    assert main(["train", "small.yaml", "rounds=6", "--resume"]) == 0
    assert "continuing after round 3 of 6, from runs/small-20260102-000000" in capsys.readouterr().err
    assert len(lines(Path("runs/small-20260102-000000"))) == 6


def test_saves_by_rounds_by_time_and_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(**plan: Any) -> list[int]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        train({**SAVED, "checkpoint": plan}, out, ranks=3)
        return rounds_saved(out) if (out / "checkpoints").exists() else []

    assert saved() == [], "a short run writes none"
    assert saved(rounds=1, keep=3) == [3, 4, 5]
    assert saved(rounds=2, minutes=None) == [2, 4]
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    assert saved(minutes=1e-9, keep=9) == [1, 2, 3, 4]
    monkeypatch.setattr(checkpoint, "_SHARE", 1e9)
    assert saved(minutes=1e-9, keep=9) == [1], "what the first one cost is too much of the time"


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path: Path) -> None:
    """Only what no result shows may change; anything else is named with both values."""
    values = {**SAVED, "checkpoint": {"rounds": 5}, "method": TOPK}
    train({**values, "rounds": 10}, tmp_path / "whole")
    train(values, tmp_path / "run")
    changed = {**values, "rounds": 10, "threads": 1, "checkpoint": {"minutes": None}, "store": "mmap"}
    train(changed, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    for path, changes in {
        "local.lr is 0.2, but .*round-00000005 was written with 0.1": {
            "local": {"lr": 0.2, "batch": 20, "steps": 2}
        },
        "method.ratio is 0.2, but .* with 0.1": {"method": {**TOPK, "ratio": 0.2}},
        "seed is 4, but .* with 3": {"seed": 4},
        "topology is 'aggregator', but .* with 'allreduce'": {"topology": "aggregator"},
        "expected rounds of at least 5, which .* has behind it, got 4": {"rounds": 4},
    }.items():
        kept = outcome(tmp_path / "run")
        with pytest.raises(ConfigError, match=f"--resume: {path}"):
            train({**values, **changes}, tmp_path / "run", ranks=2, resume=True)
        assert outcome(tmp_path / "run") == kept, "a refused resume changes nothing"


def test_a_finished_run_is_not_mistaken_for_an_interrupted_one(tmp_path: Path) -> None:
    train({**SAVED, "checkpoint": {}}, tmp_path)
    with pytest.raises(ConfigError, match="is finished, and left no checkpoint"):
        train(SAVED, tmp_path, resume=True)
    train(SAVED, tmp_path)
    assert rounds_saved(tmp_path) == [3]
    train({**SAVED, "seed": 4, "checkpoint": {}}, tmp_path)
    assert rounds_saved(tmp_path) == [], "an older run's checkpoints are not this one's"


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
    parts = {"server": simulation.topology.state, "ledger": vars(simulation.ledger)}
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
    refused(f"{peers}: expected client states", other_rows)
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


def test_a_full_disk_is_named_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk; the next test has a real one."""
    values = {**SAVED, "method": TOPK, "checkpoint": {"rounds": 1, "keep": 9}}
    simulation = Simulation(config.parse(values), solo())
    checkpoints = Checkpoints(tmp_path, simulation.config.checkpoint, simulation.comm)
    for t in range(3):
        line = simulation.round(t)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if t == 1:
            checkpoints.save(simulation, t + 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 1500, 4000):  # at the first client's state, the server's, …
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"cannot write .*\.round-00000003.*: File too large"):
                checkpoints.save(simulation, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert rounds_saved(tmp_path) == [2]
    checkpoints.save(simulation, 3)
    assert rounds_saved(tmp_path) == [2, 3]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    options = ["-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(["mount", "-t", "tmpfs", *options], check=False, capture_output=True).returncode:
        pytest.skip("a small tmpfs needs root; the file-size limit stands for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the error holds the files


@pytest.mark.parametrize(
    ("kilobytes", "says"), [(160, "checkpoint: cannot write"), (28, "--out: cannot write")]
)
def test_a_really_full_disk_ends_all_ranks_with_its_name(kilobytes: int, says: str, tmp_path: Path) -> None:
    """Full for a checkpoint, or already for the lines of metrics."""
    plan = {"rounds": 1, "keep": 50} if says.startswith("checkpoint") else {}
    values = {**SAVED, "method": TOPK, "rounds": 400, "checkpoint": plan}
    with small_disk(tmp_path / "disk", kilobytes) as disk:

        def rank(comm: Comm) -> None:
            with pytest.raises(FedMPIError, match=rf"{says} .*: No space left on device"):
                run(config.parse(values), comm, disk / "run", quiet=True)

        run_ranks(2, rank, timeout=60)
        *whole, _ = (disk / "run" / "metrics.jsonl").read_bytes().split(b"\n")
        assert [json.loads(line)["round"] for line in whole] == list(range(len(whole)))
        if plan:
            n = rounds_saved(disk / "run")[-1]
            shutil.copytree(disk / "run", tmp_path / "run")
            only(tmp_path / "run", n)
    if plan:
        few = {**values, "rounds": n + 2, "checkpoint": {}}
        train(few, tmp_path / "run", resume=True)
        train(few, tmp_path / "whole")
        assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("times", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_killing_a_writer_never_loses_the_one_before(times: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**SAVED, "method": TOPK, "rounds": 5 * times, "checkpoint": {"keep": 1}}))
    done = subprocess.run(
        [sys.executable, str(JOBS / "killed.py"), str(path), str(tmp_path / "run"), str(times)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == times
    assert all(kill["killed"] for kill in kills)
    assert kills[-1]["start"] > 0
    assert any(kill["left"] for kill in kills), "none was killed while it wrote"
    for kill in kills:
        assert kill["start"] >= kill["saved"]
        assert kill["same"]
        assert "taking the one before it" not in "".join(kill["said"])


@pytest.mark.mpi
@pytest.mark.parametrize("topology", ["aggregator", pytest.param("allreduce", marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all(openmpi: Mpi, topology: str, tmp_path: Path) -> None:
    check_mpi(openmpi, topology, tmp_path, lambda launcher, pids: os.kill(pids[1], signal.SIGTERM))


@pytest.mark.slow
@pytest.mark.mpi
def test_a_signal_to_the_launcher_reaches_the_processes(mpi: Mpi, tmp_path: Path) -> None:
    check_mpi(mpi, "allreduce", tmp_path, lambda launcher, pids: os.kill(launcher, signal.SIGUSR1))


def check_mpi(mpi: Mpi, topology: str, folder: Path, send: Any) -> None:
    """Two real processes, interrupted, then one: the same as two threads that were not."""
    path, out, pids = folder / "config.yaml", folder / "run", folder / "pids"
    values = {**SAVED, "rounds": 40, "method": LOOKBACK, "topology": topology, "checkpoint": {}}
    path.write_text(yaml.safe_dump(values))
    pids.mkdir()
    command = [
        str(mpi.prefix / "bin" / "mpiexec"),
        "-n",
        "2",
        sys.executable,
        str(JOBS / "train.py"),
        str(pids),
    ]
    process = subprocess.Popen(
        [*command, str(path), "--out", str(out), "--quiet", "--resume"],
        env=mpi.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
            time.sleep(0.01)
        send(process.pid, [int((pids / str(rank)).read_text()) for rank in range(2)])
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert f"--resume {out}" in said
    (done,) = rounds_saved(out)
    assert 3 < done < 40
    resumed = mpi(2, "-m", "fedmpi", "train", str(path), "--resume", str(out), "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    train(values, folder / "whole", ranks=2)
    assert outcome(out) == outcome(folder / "whole")
