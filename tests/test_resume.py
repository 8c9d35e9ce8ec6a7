"""A run that was interrupted, and moved to more or fewer ranks, ends as one that was not; the last bits and bytes
included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine import checkpoint
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.methods import METHODS

from .interrupted import LOOKBACK, SAVED, TOPK, lines, only, outcome, rounds_saved, train
from .test_conformance import RUNS, RUNS_BESIDE

EXAMPLES = [name for name in RUNS if name in METHODS]


@pytest.mark.parametrize("name", [*EXAMPLES, *RUNS_BESIDE])
def test_property_8_every_method_resumes_exactly_at_half_the_ranks(name: str, tmp_path: Path) -> None:
    values = {**SAVED, **(RUNS | RUNS_BESIDE)[name], "rounds": 5, "topology": "aggregator"}
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


def test_local_updates_resume_exactly(tmp_path: Path) -> None:
    """The optimizers' memories, the place in the data, and rates that change from step to step and depend on rounds."""
    local = {"lr": 0.01, "optimizer": "adamw", "steps": 3, "batch": 100, "schedule": {"name": "linear"}}
    values = {
        **{key: SAVED[key] for key in ("data", "model", "rounds", "seed", "checkpoint")},
        "mode": "data_parallel",
        "local": local,
        "server": {"optimizer": "nesterov", "lr": 0.007},
        "method": {"name": "topk", "ratio": 0.1, "feedback": True},
    }
    train(values, tmp_path, ranks=3)
    expected = outcome(tmp_path)
    train(values, tmp_path, ranks=3, resume=True)
    assert outcome(tmp_path) == expected
    with pytest.raises(
        ConfigError, match=r"rounds is 6, but .* with 5, on which local.schedule: linear depends"
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
    train(SAVED, tmp_path, overwrite=True)
    assert rounds_saved(tmp_path) == [3]
    train({**SAVED, "seed": 4, "checkpoint": {}}, tmp_path, overwrite=True)
    assert rounds_saved(tmp_path) == [], "an older run's checkpoints are not this one's"
