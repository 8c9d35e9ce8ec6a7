"""A rank that dies, stops or fails: with ULFM the others go on; without, all end with its name, and a resume goes on.

Real processes, real signals, at a chosen place (tests/jobs/strike.py). The failure matrix is slow (``--full``), and
shows what must happen and what did.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.faults import Faults
from fedmpi.engine.rounds import Simulation

from .conftest import JOBS, SMALL, Mpi, find_mpi, metrics, write_config
from .interrupted import outcome, small_disk
from .interrupted import train as train_in_threads

TOPK = {"name": "topk", "ratio": 0.1, "feedback": True}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "intrinsic": {"name": "intrinsic", "dim": 64, "schedule": "time_varying"},
    "lookback over topk": {"name": "lookback", "threshold": 0.5, "inner": TOPK},
    "fetchsgd": {"name": "fetchsgd", "rows": 3, "columns": 200, "k": 60},
}
LOOKBACK = METHODS["lookback over topk"]
RUN: dict[str, Any] = {
    **SMALL,
    "clients": 12,
    "cohort": 8,
    "rounds": 8,
    "evaluate_every": 2,
    "checkpoint": {"rounds": 2},
    "reproducible": True,
    "timeout": 3,
}


class Ended(NamedTuple):
    code: int
    said: str
    seconds: float  # from the strike to the end of all


def train(mpi: Mpi, ranks: int, strike: str, folder: Path, *options: str, **changes: Any) -> Ended:
    """``fedmpi train`` on so many processes, of which one is struck; the run's folder is ``folder/run``."""
    command = [str(mpi.prefix / "bin" / "mpiexec"), *options, "-n", str(ranks), sys.executable]
    return launch(command, mpi.env, strike, folder, changes)


def launch(
    command: list[str], env: dict[str, str], strike: str, folder: Path, changes: dict[str, Any]
) -> Ended:
    path, struck = write_config(folder, {**RUN, **changes}), folder / "struck"
    done = subprocess.run(
        [*command, str(JOBS / "strike.py"), strike, path, "--out", str(folder / "run")],
        env={**env, "STRUCK": str(struck)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    seconds = time.time() - float(struck.read_text())
    return Ended(done.returncode, done.stdout + done.stderr, seconds)


def summary(folder: Path) -> dict[str, Any]:
    """Of a run that is finished, and whose lines of metrics are whole."""
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    lines = metrics(folder / "run")
    assert [line["round"] for line in lines] == list(range(found["rounds"]))
    for total, part in (("upload_bytes",) * 2, ("download_bytes",) * 2, ("messages", "clients")):
        assert sum(line[part] for line in lines) == found[total]
    return found


def check_resumes(folder: Path, **changes: Any) -> None:
    """It goes on from the last checkpoint, and ends as if nothing had been."""
    values = {**RUN, **changes}
    train_in_threads(values, folder / "run", ranks=2, resume=True)
    train_in_threads(values, folder / "whole", ranks=1)
    assert outcome(folder / "run") == outcome(folder / "whole")


def says_how_to_go_on(ended: Ended, folder: Path) -> bool:
    return f"fedmpi train {folder / 'small.yaml'} --resume {folder / 'run'}\n" in ended.said


def reference(values: dict[str, Any], rank: int, ranks: int, t: int, saved: int) -> Simulation:
    """What must come of a run that loses ``rank`` in round ``t``, with a checkpoint after ``saved`` rounds: in one
    process, which forgets what that rank kept."""
    simulation = Simulation(config.parse(values), solo())
    crew = list(range(1 if simulation.config.topology == "aggregator" else 0, ranks))
    lives_there = torch.arange(simulation.config.clients) % len(crew) == crew.index(rank)
    orphans = lives_there.nonzero()[:, 0]
    for now in range(simulation.config.rounds):
        if now == saved:
            came = [orphans[torch.isin(orphans, store.known)] for store in simulation.stores]
            kept = [
                store.get(clients) if len(clients) else {}
                for store, clients in zip(simulation.stores, came, strict=True)
            ]
            seen = simulation.ledger.seen.clone()
        if now == t:
            for store, clients, state in zip(simulation.stores, came, kept, strict=True):
                store.forget(orphans)
                store.put(clients, state)
            simulation.ledger.seen[orphans] = seen[orphans]
            simulation.dropped[t] = orphans
        simulation.round(now)
    return simulation


def check_survived(
    ended: Ended, folder: Path, values: dict[str, Any], lost: tuple[int, int, int], t: int
) -> None:
    """The same bits and bytes as the reference. ``lost``: rank, of how many; and the last checkpoint before."""
    rank, ranks, saved = lost
    assert ended.code == 0, ended.said
    expected, found = reference(values, rank, ranks, t, saved), summary(folder)
    parameters = expected.spec.views(expected.replica.parameters())
    model = load_file(folder / "run" / "model.safetensors")
    assert all(torch.equal(model[name], value) for name, value in parameters.items())
    assert found["upload_bytes"] == expected.bytes["upload"]
    assert found["download_bytes"] == expected.bytes["download"]
    assert found["ranks"] == len(found["clients_by_rank"]) == ranks - 1
    (entry,) = found["lost_ranks"]
    assert (entry["rank"], entry["round"], entry["checkpoint"]) == (rank, t, saved)
    assert entry["dropped"] == 8 * RUN["rounds"] - found["messages"]
    assert f"rank {rank} was lost in round {t}" in ended.said


@pytest.mark.mpi
def test_the_others_go_on_without_a_killed_rank(openmpi: Mpi, tmp_path: Path) -> None:
    """Rank 0 dies while the others wait for it; the clients that live there continue from the last checkpoint."""
    ended = train(openmpi, 3, "0 SIGKILL collective 5", tmp_path, "--with-ft", "ulfm", method=LOOKBACK)
    check_survived(ended, tmp_path, {**RUN, "method": LOOKBACK}, (0, 3, 4), 5)


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["openmpi", pytest.param("mpich", marks=pytest.mark.slow)])
def test_without_ulfm_all_end_and_a_resume_goes_on(name: str, tmp_path: Path) -> None:
    """MPICH's launcher names the process only."""
    ended = train(find_mpi(name), 2, "1 SIGKILL compress 5", tmp_path)
    assert ended.code != 0
    assert ("process rank 1" if name == "openmpi" else "Killed (signal 9)") in ended.said
    assert says_how_to_go_on(ended, tmp_path)
    check_resumes(tmp_path)


@pytest.mark.mpi
def test_a_stopped_rank_is_named_by_the_timeout(openmpi: Mpi, tmp_path: Path) -> None:
    ended = train(openmpi, 2, "0 SIGSTOP compress 3", tmp_path)
    assert ended.code != 0
    assert "rank 0 does not answer (stopped, or its machine is gone); ending all ranks" in ended.said
    assert says_how_to_go_on(ended, tmp_path)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """What clients lose with their rank comes from the one before; without any, they start afresh."""
    values = {**RUN, "method": LOOKBACK, "topology": "aggregator", "checkpoint": {"rounds": 1, "keep": 9}}
    train_in_threads(values, tmp_path, ranks=2)
    simulation, states = Simulation(config.parse(values), solo()), []
    orphans, others = torch.arange(0, 12, 3), torch.tensor([1, 2, 4, 5, 7, 8, 10, 11])
    for t in range(6):
        states.append([store.get(torch.arange(12)) for store in simulation.stores])
        simulation.round(t)
    now = [store.get(torch.arange(12)) for store in simulation.stores]
    faults = Faults(simulation.comm)
    faults.checkpoints = Checkpoints(tmp_path, simulation.config.checkpoint, simulation.comm)
    (tmp_path / "checkpoints" / "round-00000005" / "state.safetensors").write_bytes(b"")
    for n in (5, 3, 0):
        found = faults._restore(simulation, orphans, torch.zeros(12, dtype=torch.int64), n)
        expected = {5: 4, 3: 3}.get(n)
        assert found.round == expected
        for store, saved, held in zip(simulation.stores, states[expected or 0], now, strict=True):
            for clients, state in ((orphans, saved), (others, held)):
                got = store.get(clients)
                assert all(torch.equal(got[name], state[name][clients]) for name in state)
    assert found.seen[orphans].tolist() == [0] * 4
    assert not simulation.clients.known[torch.isin(simulation.clients.known, orphans)].numel()


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("place", ["before", "compress", "collective", "save"])
@pytest.mark.parametrize(
    ("topology", "rank", "method", "store"),
    [("allreduce", 1, "fetchsgd", "memory"), ("aggregator", 2, "lookback over topk", "mmap")],
)
def test_wherever_a_rank_dies_the_others_end_alike(
    openmpi: Mpi, topology: str, rank: int, method: str, store: str, place: str, tmp_path: Path
) -> None:
    """ "save" is after round 5 of those counted from 0, so that the next one is begun anew."""
    changes = {"topology": topology, "method": METHODS[method], "store": store}
    ended = train(openmpi, 3, f"{rank} SIGKILL {place} 5", tmp_path, "--with-ft", "ulfm", **changes)
    if method == "fetchsgd":  # nothing lives on a rank
        assert ended.code == 0, ended.said
        assert [lost["rank"] for lost in summary(tmp_path)["lost_ranks"]] == [rank]
    else:
        check_survived(ended, tmp_path, {**RUN, **changes}, (rank, 3, 4), 6 if place == "save" else 5)


@pytest.mark.slow
@pytest.mark.mpi
def test_two_ranks_die_in_one_round_and_without_a_folder_nothing_is_restored(
    openmpi: Mpi, tmp_path: Path
) -> None:
    ended = train(
        openmpi, 4, "0,2 SIGKILL compress 5", tmp_path, "--with-ft", "ulfm", method=TOPK, checkpoint={}
    )
    assert ended.code == 0, ended.said
    found = summary(tmp_path)
    assert sorted(lost["rank"] for lost in found["lost_ranks"]) == [0, 2]
    assert [(lost["restored"], lost["reset"]) for lost in found["lost_ranks"]] == [(0, 3)] * 2
    assert found["ranks"] == 2


@pytest.mark.slow
@pytest.mark.mpi
def test_a_rank_that_dies_before_the_first_round_is_missed_by_nobody(openmpi: Mpi, tmp_path: Path) -> None:
    ended = train(openmpi, 3, "0 SIGKILL prepare -1", tmp_path, "--with-ft", "ulfm", method=LOOKBACK)
    assert ended.code == 0, ended.said
    assert [(lost["rank"], lost["round"]) for lost in summary(tmp_path)["lost_ranks"]] == [(0, 0)]
    whole = train_in_threads({**RUN, "method": LOOKBACK}, tmp_path / "whole")
    assert whole["loss"] == summary(tmp_path)["loss"]


@pytest.mark.slow
@pytest.mark.mpi
def test_data_parallel_training_shares_out_the_data_anew(openmpi: Mpi, tmp_path: Path) -> None:
    changes = {"mode": "data_parallel", "clients": 3, "cohort": None, "local": {"lr": 0.1, "batch": 20}}
    changes |= {"method": LOOKBACK}
    ended = train(openmpi, 3, "1 SIGKILL compress 5", tmp_path, "--with-ft", "ulfm", **changes)
    assert ended.code == 0, ended.said
    found = summary(tmp_path)
    assert (found["ranks"], found["clients"], found["messages"]) == (2, 2, 5 * 3 + 3 * 2)
    assert "rank 1 was lost in round 5" in ended.said


@pytest.mark.slow
@pytest.mark.mpi
def test_the_death_of_the_aggregator_ends_the_run_at_its_last_checkpoint(
    openmpi: Mpi, tmp_path: Path
) -> None:
    changes = {"topology": "aggregator", "method": LOOKBACK}
    ended = train(openmpi, 3, "0 SIGKILL collective 5", tmp_path, "--with-ft", "ulfm", **changes)
    assert ended.code == 2, ended.said
    said = "rank 0, which aggregates, ended in round 5: the others cannot go on; the last checkpoint is after round 4"
    assert said in ended.said
    assert says_how_to_go_on(ended, tmp_path)
    check_resumes(tmp_path, **changes)


@pytest.mark.slow
def test_over_gloo_the_dead_rank_is_named_and_a_resume_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = launch(command, env, "1 SIGKILL compress 5", tmp_path, {"timeout": 60})
    assert ended.code != 0
    assert "rank 1 ended or did not come" in ended.said
    assert says_how_to_go_on(ended, tmp_path)
    check_resumes(tmp_path)


FAILURES = ("SIGKILL", "SIGKILL, ULFM", "SIGTERM", "SIGSTOP", "exception", "full disk", "NaN")
EXPECTED = {
    "SIGKILL": "ends within 10 s, names the rank, resumes exactly",
    "SIGKILL, ULFM": "the others finish: 0, and say what was lost",
    "SIGTERM": "saves and ends with 75, resumes exactly",
    "SIGSTOP": "ends after the timeout, names the rank, resumes exactly",
    "exception": "ends within 10 s, names the rank, resumes exactly",
    "full disk": "ends with 2, names the disk, resumes exactly",
    "NaN": "ends with 2, names client and round, resumes exactly",
}


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_matrix(
    openmpi: Mpi,
    failure: str,
    rank: int,
    method: str,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    how = {"NaN": "nan before", "full disk": "full save", "SIGTERM": "SIGTERM before"}.get(
        failure, f"{failure.split(',')[0]} compress"
    )
    options = ["--with-ft", "ulfm"] if "ULFM" in failure else []
    changes = {"method": METHODS[method], "checkpoint": {"rounds": 2, "keep": 9}}
    did = "nothing that was expected"
    with small_disk(tmp_path / "disk", 2000) as disk:
        try:
            ended = train(openmpi, 3, f"{rank} {how} 5", disk, *options, **changes)
            did = f"{ended.code} after {ended.seconds:.1f} s"
            check_ended(failure, rank, ended, disk)
            if "ULFM" not in failure:
                (disk / "filler").unlink(missing_ok=True)
                check_resumes(disk, **changes)
                did += ", resumed exactly"
            did += ": as it must"
        finally:
            row = f"{failure:<14} rank {rank}  {method:<19} {EXPECTED[failure]:<55} {did}"
            record_property("row", row)


def check_ended(failure: str, rank: int, ended: Ended, folder: Path) -> None:
    name = {
        "SIGKILL": f"process rank {rank} ",
        "SIGKILL, ULFM": f"rank {rank} was lost in round 5",
        "SIGTERM": "stopped after round 6 of 8",
        "SIGSTOP": f"rank {rank} does not answer",
        "exception": f"rank {rank} failed; ending all ranks",
        "full disk": "No space left on device",
        "NaN": ", round 5: the loss or gradient is not finite",
    }[failure]
    assert name in ended.said, ended.said
    if failure == "SIGKILL, ULFM":
        assert ended.code == 0, ended.said
        assert [lost["rank"] for lost in summary(folder)["lost_ranks"]] == [rank]
        return
    assert not (folder / "run" / "summary.json").exists()
    assert ended.code == {"SIGTERM": 75, "full disk": 2, "NaN": 2}.get(failure, ended.code)
    assert ended.code != 0
    if failure in ("SIGKILL", "exception"):
        assert ended.seconds < 10
    assert says_how_to_go_on(ended, folder)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(1800)
def test_twenty_runs_in_a_row_lose_a_rank_at_a_random_moment(
    openmpi: Mpi, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Code 0, and within a point of the undisturbed accuracy. The moment lies anywhere from the first round on."""
    values = {
        **RUN,
        "clients": 40,
        "cohort": 20,
        "rounds": 60,
        "method": LOOKBACK,
        "checkpoint": {"rounds": 5},
    }
    values["evaluate_every"] = 60
    whole = train_in_threads(values, tmp_path / "whole")["accuracy"]
    draw = random.Random(0)
    for n in range(20):
        folder = tmp_path / str(n)
        folder.mkdir()
        rank, moment = draw.randrange(4), draw.uniform(0, 59)
        ended = train(
            openmpi, 4, f"{rank} SIGKILL moment {moment:.3f}", folder, "--with-ft", "ulfm", **values
        )
        assert ended.code == 0, ended.said
        found = summary(folder)
        (lost,) = found["lost_ranks"]
        record_property(
            "row",
            f"run {n + 1:>2} of 20: {ended.code}, accuracy {found['accuracy']:.4f} for {whole:.4f}; {lost}",
        )
        assert lost["rank"] == rank
        assert abs(found["accuracy"] - whole) <= 0.01, found
