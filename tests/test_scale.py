"""The scale study: counts that the formulas meet, real processes, and arithmetic that can be checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.studies import arithmetic, scale
from configs.studies import scale_jobs as jobs
from configs.studies.__main__ import main as studies
from configs.studies.arithmetic import busiest, fit, modelled, part, sent
from fedmpi import cli, random
from fedmpi.bench import synthetic
from fedmpi.comm import solo
from fedmpi.comm.launcher import Launch
from fedmpi.errors import CommError, ConfigError
from fedmpi.tasks import data

FEW = {
    label: scale.METHODS[label]
    for label in ("dense", "bf16", "signsgd", "topk 1 %", "powersgd rank 4", "lookback")
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few methods and a small model; jobs run in this process."""
    monkeypatch.setattr(scale, "METHODS", FEW)
    monkeypatch.setattr(scale, "_HIDDEN", 100)
    monkeypatch.setattr(scale, "_COHORT", 8)
    monkeypatch.setattr(scale, "_child", lambda job, arguments, launch=(): jobs.JOBS[job](**arguments))


def counted(ranks: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = scale._wire(ranks, 1, None, lambda line: None)
    return {(row["mode"], row["method"], row["ranks"]): row for row in rows}


@pytest.mark.usefixtures("small")
def test_formulas_give_what_is_counted() -> None:
    """Of 4 and 8 ranks, from two ranks' counts; and the sums that need no measurement at all."""
    at = counted(8)
    assert {key[2] for key in at} == {2, 4, 8}
    assert not any(row["real"] for row in at.values())
    for (mode, method, ranks), row in at.items():
        assert busiest(row) == pytest.approx(modelled(row, at[mode, method, 2]), rel=0.02), (
            mode,
            method,
            ranks,
        )
    size = at["allreduce", "dense", 2]["parameters"]
    assert size == 17 * 100 + 101 * 10
    for ranks in (2, 4, 8):
        assert (
            busiest(at["allreduce", "dense", ranks]) == 4 * size + at["allreduce", "dense", ranks]["status"]
        )
        assert 8 * 4 * size < busiest(at["aggregator", "dense", ranks]) < 8 * 4 * size + 1000  # and frames
    assert {at["data_parallel", "signsgd", n]["way"] for n in (4, 8)} == {"merge"}
    assert at["data_parallel", "topk 1 %", 8]["way"] == "gather"
    assert at["data_parallel", "lookback", 8]["message"] < 10, "a scalar"


def test_the_modelled_ways() -> None:
    two = {"received": [90, 100], "way": "gather"}
    five = {"mode": "data_parallel", "ranks": 5, "status": 10, "summed": 700, "message": 1000, "entry": 1}
    assert modelled({**five, "way": "gather"}, two) == 4 * 90 + 10
    assert modelled({**five, "way": "sum"}, two) == 710
    assert modelled({**five, "way": "sum"}, {**two, "way": "sum"}) == 100
    assert modelled({**five, "way": "merge"}, two) == 8 * 256 + 10
    served = {**five, "mode": "aggregator", "clients": 3, "message": 20.0}
    assert modelled(served, {"received": [110, 60]}) == 60 + 10 + 4 * 40
    assert modelled(served, {"received": [110, 999]}) == 999
    assert part(1000, 4, 1) == 256  # 250 in whole 64s
    assert part(1000, 4, 2) == 256
    assert part(1025, 4, 2) == 384
    whole = {"way": "sum", "summed": 4000, "frame": 60, "message": 1000, "entry": 1}
    assert sent([whole], 1000) == pytest.approx(2 * 0.999 * 4000)
    assert sent([whole, {**whole, "way": "gather"}], 10) == pytest.approx(1.8 * 4000 + 9 * 60)
    assert sent([{**whole, "way": "merge"}], 4) == 6 * 256


def test_slopes_and_the_fitted_round() -> None:
    assert scale.slope([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert scale.slope([1, 10, 100], [7, 7, 7]) == pytest.approx(0)

    def seconds(cohort: int, parameters: int) -> float:
        return 0.005 + cohort * (0.002 + 3e-9 * parameters)

    def row(cohort: int, parameters: int) -> dict[str, float]:
        return {"cohort": cohort, "parameters": parameters, "seconds": seconds(cohort, parameters)}

    axes = {
        "cohort": {"rows": [row(c, 0) for c in (10, 30, 100)]},
        "D": {"rows": [row(10, d) for d in (1000, 10_000, 100_000)]},
    }
    assert fit(axes) == pytest.approx((0.005, 0.002, 3e-9))


def test_messages_are_those_of_a_thousand_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scale, "METHODS", {label: FEW[label] for label in ("signsgd", "topk 1 %", "powersgd rank 4")}
    )
    monkeypatch.setattr(scale, "build", lambda *_: torch.nn.Linear(199, 100))
    found = scale._messages(lambda line: None)
    assert found["parameters"] == 20_000
    rows = found["methods"]
    assert (rows["signsgd"]["message"], rows["signsgd"]["download"]) == (2500, 2504)  # and the learning rate
    assert [one["way"] for one in rows["signsgd"]["passes"]] == ["merge"]
    assert [one["way"] for one in rows["topk 1 %"]["passes"]] == ["sum"], (
        "999 others' messages are more than D numbers"
    )
    assert rows["topk 1 %"]["state"] == 4 * 20_000
    assert [one["way"] for one in rows["powersgd rank 4"]["passes"]] == ["sum", "sum"]
    assert rows["powersgd rank 4"]["message"] == sum(
        one["message"] for one in rows["powersgd rank 4"]["passes"]
    )


@pytest.mark.usefixtures("small")
def test_the_page_and_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "build", lambda *_: torch.nn.Linear(199, 100))
    point = {"clients": 1000, "cohort": 2, "model": {"name": "linear"}, "method": {"name": "dense"}}
    grid = {
        "clients": [point, {**point, "clients": 2000}],
        "cohort": [point, {**point, "cohort": 8}],
        "D": [{**point, "model": {"name": "fcn", "hidden": n}} for n in (10, 1000)],
        "d": [{**point, "method": {"name": "intrinsic", "dim": n}} for n in (8, 64)],
    }
    monkeypatch.setattr(scale, "_grid", lambda clients: grid)
    monkeypatch.setattr(jobs, "_BUDGET", 0)
    monkeypatch.setattr(scale, "_mpiexec", lambda: None)
    said: list[str] = []
    found = scale.run(2, 2, 10_000, said.append, tmp_path / "new")
    assert said[0] == "bytes of 2 ranks, threads of one process"
    assert (tmp_path / "new" / "scale.md").read_text() == found.text()
    kept = json.loads((tmp_path / "new" / "scale.json").read_text())
    assert [row["clients"] for row in kept["start"]] == [1000, 10_000]
    assert [row["at"] for row in kept["cost"]["d"]["rows"]] == [8, 64]
    assert [row["at"] for row in kept["cost"]["D"]["rows"]] == [280, 27_010]
    assert all(row["seconds"] > 0 for axis in kept["cost"].values() for row in axis["rows"])
    assert all(row["bytes"]["peak"] > row["bytes"]["data"] for row in kept["start"])
    del kept["bench"]
    assert arithmetic.page(kept) == found.text(), "the page is a function of scale.json"
    for title in ("Bytes by rank", "Clients", "Cost of a round", "1,000 ranks", "1,000,000 devices"):
        assert f"\n## {title}\n" in found.text()
    rows = [line.split(" | ") for line in found.text().splitlines() if line.startswith("| ")]
    assert sum(row[0] == "| dense" for row in rows) == 3 + 1 + 1
    assert found.missed() == []


def test_noise_of_any_size() -> None:
    found = data.load(synthetic.PATH, samples=5000)
    assert found.train.x.shape == (5000, synthetic.FEATURES)
    assert torch.equal(found.train.x[:904], found.train.x[4096:])
    assert found.classes == int(found.train.y.max()) + 1 == synthetic.CLASSES


@pytest.mark.slow
def test_a_process_of_its_own_measures_a_start() -> None:
    found = scale._start(2000, lambda line: None)
    assert (found["clients"], found["cohort"], found["parameters"]) == (2000, 100, 170)
    assert min(found["seconds"].values()) > 0
    assert found["bytes"]["peak"] >= found["bytes"]["imports"] + found["bytes"]["data"]


@pytest.mark.slow
def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(
        CommError, match=r"(?s)scale study: start failed \(1\): .*unexpected keyword argument 'wrong'"
    ):
        scale._child("start", {"wrong": 1})


def test_it_starts_ranks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "launcher", lambda: Launch("mpirun", 2, True, "mpi"))
    with pytest.raises(ConfigError, match="expected to be started alone"):
        scale.run()


def test_where_the_page_cannot_go(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out: cannot write to"):
        scale._write(tmp_path / "file", scale.Scale({}))


@pytest.mark.parametrize(("option", "value"), [("--ranks", "1"), ("--clients", "99"), ("--processes", "0")])
def test_wrong_sizes_are_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        studies(["scale", option, value])
    assert f"argument {option}: expected a whole number from" in capsys.readouterr().err


_HELD = """
import time, torch
from configs.studies import scale_jobs as jobs
with jobs.peak_memory() as peak:
    before = jobs.memory()
    held = torch.ones(1 << 26)
    end = time.monotonic() + 30
    while peak[0] < before + held.nbytes // 2 and time.monotonic() < end:
        time.sleep(0.01)
    del held
print(peak[0] - before)
"""


def test_the_peak_sees_what_is_gone_again() -> None:
    """In a process of its own: what other tests left is given back at any moment and hides what is taken."""
    seen = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, check=True)
    assert int(seen.stdout) >= 1 << 27


@pytest.mark.parametrize("sampling", ["uniform", "weighted", "epoch_shuffle"])
def test_a_round_does_not_look_at_all_clients(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a round takes of a million clients' partition is taken by index."""
    few = {"model": "linear", "cohort": 5, "method": "dense", "sampling": sampling}
    run = jobs.simulation(solo(), 70_000, clients=70_000, **few)
    run.round(0)
    monkeypatch.setattr(type(run.partition.offset), "diff", None)
    monkeypatch.setattr(random, "permutation", None)
    assert run.round(1)["clients"] == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_scale_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MPI processes where there is an mpiexec; threads count the same bytes."""
    command = [
        "bench",
        "scale",
        "--ranks",
        "4",
        "--processes",
        "2",
        "--clients",
        "10000",
        "--out",
        str(tmp_path),
    ]
    assert cli.main([*command, "--json", "--check"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["ranks"]: row["real"] for row in found["wire"]} == {2: scale._mpiexec() is not None, 4: False}
    threads = scale._child("wire", {"cases": scale._cases(), "rounds": scale._ROUNDS, "threads": 2})
    assert [row["received"] for row in found["wire"] if row["ranks"] == 2] == [
        row["received"] for row in threads
    ]
