"""The dimension search: the right d from the fewest runs, real runs that are done once, and a claim's row of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.studies.claims import RULES, Results
from fedmpi.analysis.dimension import smallest
from fedmpi.cli import main

from .conftest import SMALL, Mpi


@given(
    answer=st.integers(1, 5000), low=st.integers(1, 900), high=st.integers(1, 4000), within=st.floats(0, 1)
)
@settings(deadline=None, max_examples=200)
def test_the_smallest_that_reaches(answer: int, low: int, high: int, within: float) -> None:
    high = max(low, high)
    asked: list[int] = []

    def reaches(d: int) -> bool:
        asked.append(d)
        return d >= answer

    reached, missed = smallest(reaches, low, high, within)
    assert len(asked) == len(set(asked))
    assert all(low <= d <= high for d in asked)
    assert missed == max((d for d in asked if d < answer), default=None)
    if answer > high:
        assert (reached, missed) == (None, high)
        return
    assert reached is not None
    assert reached == min(d for d in asked if d >= answer)
    assert reached <= max(low, answer * (1 + within), (missed or 0) + 1)
    assert len(asked) <= 32


LEARNS = {**SMALL, "rounds": 8, "evaluate_every": 8, "local": {"lr": 0.2, "steps": 2, "batch": 50}}


def write(folder: Path, **changes: object) -> list[str]:
    (folder / "small.yaml").write_text(yaml.safe_dump({**LEARNS, **changes}))
    out = ["--out", str(folder / "out"), "--results", str(folder / "results.json")]
    return ["analyze", "dimension", str(folder / "small.yaml"), *out, "--low", "4", "--seeds", "2"]


def test_the_search_runs_each_point_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = {"name": "intrinsic", "dim": 99, "matrix": "dense"}
    command = [*write(tmp_path, method=method), "--share", "0.7", "--within", "0.5"]
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    full = sum(results["full"]["accuracy"]) / 2
    mean = {p["values"]["method.dim"]: sum(p["accuracy"]) / 2 for p in results["points"]}
    assert results["dimension"] == min(d for d, a in mean.items() if a >= 0.7 * full)
    assert results["falls short"] == max(d for d, a in mean.items() if a < 0.7 * full)
    assert 4 <= results["falls short"] < results["dimension"] <= 1.5 * results["falls short"]
    assert results["parameters"] == results["full"]["params"]
    printed = capsys.readouterr().out
    assert f"d = {results['dimension']:,} of {results['parameters']:,} parameters reaches 70 %" in printed
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "runs", "dimension.md", "dimension.html", "dimension.json", "dimension.png"
    }  # fmt: skip
    assert f"--share 0.7 --low 4 --within 0.5 --seeds 2 --out {out}" in (out / "dimension.md").read_text()
    runs = sorted(out.glob("runs/*"))
    assert len(runs) == 2 * (1 + len(mean))
    assert yaml.safe_load((runs[-1] / "config.yaml").read_text())["method"]["matrix"] == "dense"

    # Again, after a run was lost: that one is run, no other.
    before = {path: (path / "summary.json").stat().st_mtime_ns for path in runs}
    (runs[0] / "summary.json").unlink()
    assert main([*command, "--quiet"]) == 0
    after = {path: (path / "summary.json").stat().st_mtime_ns for path in runs}
    assert {path for path in runs if before[path] != after[path]} == {runs[0]}
    assert json.loads((tmp_path / "results.json").read_text()).keys() == results.keys()


def test_what_cannot_be_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*write(tmp_path), "--quiet"]
    for wrong, message in {
        "--high=3": "--low: expected at most 3 (--high and the parameters), got 4",
        "local.lr=1e30": "dimension: full, seed 0 failed, so nothing can be compared with it: client",
        "method=tokp": "method.name: unknown 'tokp'",
    }.items():
        assert main([*command, wrong]) == 2
        assert message in capsys.readouterr().err
    for wrong in ("--share=0", "--within=x", "--share=1.1"):
        with pytest.raises(SystemExit):
            main([*command, wrong])
        assert "expected a number above 0, at most 1" in capsys.readouterr().err


def test_no_dimension_reaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*write(tmp_path), "--quiet", "--high", "4", "--share", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["dimension"], results["falls short"]) == (None, 4)
    assert "No d up to 4 reaches 100 %" in capsys.readouterr().out
    verdict = RULES["dimension"](Results([results]), at_most=0.1)
    assert verdict is not None
    assert not verdict.held
    found = {**results, "dimension": 4, "parameters": 41, "falls short": None}
    for at_most, held in ((0.1, True), (0.09, False)):
        verdict = RULES["dimension"](Results([found]), at_most=at_most)
        assert verdict is not None
        assert verdict.held == held
        assert verdict.figures.startswith("d = 4 of 41 (9.8 %): ")


@pytest.mark.mpi
@pytest.mark.slow
def test_ranks_search_alike(tmp_path: Path, openmpi: Mpi) -> None:
    done = openmpi(2, "-m", "fedmpi", *write(tmp_path), "--share", "0.7", "--within", "0.5", "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    assert main([*write(alone), "--share", "0.7", "--within", "0.5", "--quiet"]) == 0
    several, one = (json.loads((p / "results.json").read_text()) for p in (tmp_path, alone))
    assert several["dimension"] == one["dimension"]
    assert [p["label"] for p in several["points"]] == [p["label"] for p in one["points"]]
