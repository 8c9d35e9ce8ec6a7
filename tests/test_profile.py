"""``fedmpi train --profile``: phases that add up to the rounds, a trace that a browser opens, nothing when off."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine import rounds
from fedmpi.engine.profile import profiling, table
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.phases import PHASES, Clock, phase

from .conftest import SMALL, Mpi, metrics, write_config

TOPK = {"name": "topk", "ratio": 0.1, "feedback": True}
# In parts of a batch: clients one after the other, without the seconds of tracing that training at once begins with.
PARTS = {"lr": 0.1, "steps": 2, "batch": 20, "accumulate": 2}
LONG = {**SMALL, "rounds": 9, "evaluate_every": 1, "local": PARTS}


def written(folder: Path, **changes: Any) -> str:
    return write_config(folder, {**LONG, **changes})


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "profile.json").read_text())
    return found


def marks(out: Path) -> Counter[tuple[int, str]]:
    """How often each phase begins on each process of the trace."""
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    return Counter((e["pid"], e["name"]) for e in trace["traceEvents"] if e.get("cat") == "user_annotation")


def adds_up(out: Path) -> None:
    """The phases of rank 0 are the wall time of the rounds, which the metrics' seconds lie within."""
    lines, found = metrics(out), report(out)
    wall = sum(line["seconds"] for line in lines if line["round"] in found["rounds"])
    assert sum(found["seconds"][0].values()) >= wall > 0
    assert sum(found["seconds"][0].values()) - wall < found["seconds"][0]["other"]


def test_seconds_belong_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("fedmpi.phases.perf_counter", lambda: float(next(ticks)))
    clock = Clock(dict.fromkeys(PHASES, 0.0))
    with clock.phase(
        "other"
    ):  # a tick until server, one until wire, one in it, one more in server, one to the end
        with clock.phase("server"), clock.phase("wire"):
            pass
        with pytest.raises(KeyError), clock.phase("encode"):
            raise KeyError
    assert clock.seconds == {**dict.fromkeys(PHASES, 0.0), "other": 3, "server": 2, "wire": 1, "encode": 1}
    assert not clock.running


def test_a_run_of_several_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, topology="aggregator", method=TOPK)
    assert main(["train", path, "--out", str(tmp_path / "a"), "--local-ranks", "2", "--profile"]) == 0
    found = report(tmp_path / "a")
    assert (found["rounds"], found["traced"]) == ([0, 5, 6, 7, 8], [1, 2, 3])
    aggregator, worker = found["seconds"]
    assert {name for name in PHASES if aggregator[name]} == set(PHASES) - {"compute", "encode"}
    assert {name for name in PHASES if worker[name]} == set(PHASES) - {"decode"}
    adds_up(tmp_path / "a")
    assert marks(tmp_path / "a")[0, "decode"] == 3
    lines = capsys.readouterr().err.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("ms a round"))
    assert [line.split()[0] for line in lines[begin + 1 : begin + 10]] == [*PHASES, "all"]
    assert lines[begin + 10] == "rounds 1 to 4 were traced and are left out"


@pytest.mark.parametrize("method", [{"name": "powersgd", "rank": 1}, {"name": "signsgd"}, TOPK])
@pytest.mark.parametrize("mode", ["federated", "data_parallel"])
def test_every_phase_of_two_passes_and_of_workers(method: Any, mode: str, tmp_path: Path) -> None:
    federated = mode == "federated"
    changes = {} if federated else {"clients": 0, "cohort": None, "local": {"lr": 0.1, "batch": 20}}
    values = config.parse({**LONG, "mode": mode, "method": method, **changes, "rounds": 2})

    def rank(comm: Comm) -> None:
        simulation = Simulation(values.for_ranks(2), comm)
        with profiling(simulation, 0, tmp_path, lambda said: None):
            for t in range(2):
                simulation.round(t)

    run_ranks(2, rank, timeout=60)
    found = report(tmp_path)
    assert found["rounds"] == [0, 1]  # so few that the traced one counts
    own = set(PHASES) if federated or method == TOPK else set(PHASES) - {"load"}
    for seconds in found["seconds"]:
        assert own <= {name for name in PHASES if seconds[name]}


def test_it_changes_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plain, profiled = (Simulation(config.parse({**LONG, "method": TOPK}), solo()) for _ in range(2))
    with profiling(profiled, 0, None, lambda said: None):
        lines = [profiled.round(t) for t in range(5)]
    assert profiled.around is plain.around
    for t, line in enumerate(lines):
        assert {**plain.round(t), "seconds": 0} == {**line, "seconds": 0}
    assert plain.comm.sent == profiled.comm.sent
    with phase("load") as nothing:
        assert nothing is None
    assert phase("load") is phase("compute"), "off: one shared object that does nothing"


@pytest.mark.slow
def test_under_mpirun_and_over_a_resume(openmpi: Mpi, tmp_path: Path) -> None:
    path, out = written(tmp_path, method=TOPK, checkpoint={"rounds": 4}), tmp_path / "a"
    assert main(["train", path, "rounds=4", "--out", str(out), "--quiet"]) == 0
    done = openmpi(2, "-m", "fedmpi", "train", path, "--out", str(out), "--profile", "--resume")
    assert done.returncode == 0, done.stderr
    assert "ms a round" in done.stderr
    assert (report(out)["rounds"], report(out)["traced"]) == ([4, 5, 6, 7, 8], [5, 6, 7])
    assert len(report(out)["seconds"]) == 2
    adds_up(out)
    found = marks(out)
    assert {pid for pid, _ in found} == {0, 1}
    assert found[0, "compute"] == found[1, "compute"] == 3
    assert json.loads((out / "summary.json").read_text())["ranks"] == 2


def test_a_run_that_a_signal_stops_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    account = rounds.Simulation._account

    def interrupt(simulation: Simulation, call: Any, *rest: Any) -> Any:
        if call.now.t == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return account(simulation, call, *rest)

    monkeypatch.setattr(rounds.Simulation, "_account", interrupt)
    assert main(["train", written(tmp_path), "--out", str(tmp_path / "a"), "--profile"]) == os.EX_TEMPFAIL
    assert report(tmp_path / "a")["rounds"][0] == 0
    assert "ms a round" in capsys.readouterr().err


def test_a_failed_run_is_not(tmp_path: Path) -> None:
    simulation = Simulation(config.parse(LONG), solo())

    def fails() -> None:
        with profiling(simulation, 0, tmp_path, lambda said: None):
            simulation.round(0)
            raise ConfigError("why")

    with pytest.raises(ConfigError, match="why"):
        fails()
    assert not list(tmp_path.iterdir())
    assert "round" not in vars(simulation)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    simulation, gone = Simulation(config.parse(LONG), solo()), tmp_path / "no" / "such"
    expected = pytest.raises(ConfigError, match=r"--profile: cannot write to .*such: No such file")
    with expected, profiling(simulation, 0, gone, lambda said: None):
        simulation.round(0)


def test_the_table() -> None:
    ranks = [{**dict.fromkeys(PHASES, 0.0), "compute": c, "wire": 1.0 - c / 4} for c in (1.0, 3.0)]
    shown = [line.split() for line in table(10, ranks).splitlines()]
    assert shown[2] == ["compute", "100.00", "57.1", "%", "200.00", "300.00", "1"]
    assert shown[4] == ["wire", "75.00", "42.9", "%", "50.00", "75.00", "0"]
    assert shown[-1] == ["all", "175.00", "100.0", "%", "250.00", "325.00", "1"]
    assert table(10, ranks[:1]).splitlines()[0].split() == ["ms", "a", "round", "rank", "0", "share"]
