"""When checkpoints are written: by rounds, by time, on a signal to any rank; up to a full disk or a killed writer."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine import checkpoint
from fedmpi.engine.checkpoint import Checkpoints
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.errors import CheckpointError, FedMPIError, Stopped

from .conftest import JOBS, Mpi, write_config
from .interrupted import LOOKBACK, SAVED, TOPK, lines, only, outcome, rounds_saved, small_disk, train


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
    path, out, original = write_config(tmp_path, SAVED), tmp_path / "run", Simulation.round

    def round(self: Simulation, t: int) -> dict[str, Any]:
        if t == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, t)

    monkeypatch.setattr(Simulation, "round", round)
    assert main(["train", path, "--out", str(out), "--quiet"]) == 130
    assert rounds_saved(out) == [3]


def test_the_command_line_stops_with_75_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_config(tmp_path, {**SAVED, "checkpoint": {}}), tmp_path / "a run"
    train({**SAVED, "rounds": 9, "checkpoint": {}}, tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_in_round(patch, 2, signal.SIGUSR1)
        assert main(["train", path, "rounds=9", "--out", str(out), "--resume", "--quiet"]) == 75
    said = capsys.readouterr().err
    assert f"fedmpi train {path} rounds=9 --resume '{out}'" in said
    assert rounds_saved(out) == [3]
    assert main(["train", path, "rounds=9", "--quiet", "--out", str(out)]) == 2
    assert "holds an interrupted run; continue it with --resume" in capsys.readouterr().err
    assert main(["train", path, "--quiet", "--resume", "rounds=9"]) == 2
    assert "expected a run's folder (overrides stand before --resume)" in capsys.readouterr().err
    assert main(["train", path, "rounds=9", "--quiet", "--resume", str(out)]) == 0
    assert outcome(out) == outcome(tmp_path / "whole")


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
    plan = {"rounds": 5 * times, "checkpoint": {"keep": 1}}
    path = write_config(tmp_path, {**SAVED, "method": TOPK, **plan})
    done = subprocess.run(
        [sys.executable, str(JOBS / "killed.py"), path, str(tmp_path / "run"), str(times)],
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
    """Two real processes, interrupted, then two, or two threads: the same as two threads that were not."""
    values = {**SAVED, "rounds": 40, "method": LOOKBACK, "topology": topology, "checkpoint": {}}
    path, out, pids = write_config(folder, values), folder / "run", folder / "pids"
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
        [*command, path, "--out", str(out), "--quiet", "--resume"],
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
    if topology == "aggregator":
        train(values, out, ranks=2, resume=True)
    else:
        resumed = mpi(2, "-m", "fedmpi", "train", path, "--resume", str(out), "--quiet")
        assert resumed.returncode == 0, resumed.stderr
    train(values, folder / "whole", ranks=2)
    assert outcome(out) == outcome(folder / "whole")
