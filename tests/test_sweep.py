"""Sweeps: every point of the grid is run once, what failed is named, and the report is of all that is finished."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi.analysis import grid
from fedmpi.analysis.sweep import slurm_array
from fedmpi.cli import main
from fedmpi.errors import ConfigError

from .conftest import SMALL, Mpi

# Runs of a fifth of a second.
TINY = {
    **SMALL,
    "rounds": 2,
    "evaluate_every": 1,
    "local": {"lr": 0.1, "steps": 1, "batch": 20},
    "checkpoint": {"rounds": 1},
}
OVER: dict[str, Any] = {
    "seeds": 2,
    "cases": {"δ = 0.9": {"method": {"name": "lookback", "threshold": 0.9}}},
    "over": {"local.steps": [1, 2, 3]},
}


def write(folder: Path, over: dict[str, Any], config: dict[str, Any] = TINY) -> list[str]:
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    (folder / "over.yaml").write_text(yaml.safe_dump(over, allow_unicode=True, sort_keys=False))
    out = ["--out", str(folder / "out"), "--results", str(folder / "results.json")]
    return ["sweep", str(folder / "small.yaml"), str(folder / "over.yaml"), *out]


def summaries(out: Path) -> dict[str, float]:
    """When each finished run ended, by its folder's name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/summary.json")}


def test_a_sweep_runs_each_point_once_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = write(tmp_path, OVER)
    assert main(command) == 0
    out = tmp_path / "out"
    first = summaries(out)
    names = [f"δ-=-0.9-steps={n}-seed{s}" for s in (0, 1) for n in (1, 2, 3)]
    assert sorted(first) == sorted(names)

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == {}
    assert [point["label"] for point in results["points"]] == [f"δ = 0.9, steps={n}" for n in (1, 2, 3)]
    for point, name in zip(results["points"], names, strict=False):
        runs = [json.loads((out / "runs" / f"{name[:-1]}{s}" / "summary.json").read_text()) for s in (0, 1)]
        for key in ("accuracy", "upload_bytes", "total_ratio"):
            assert point[key] == pytest.approx([run[key] for run in runs], rel=1e-5)
        assert (point["seeds"], point["rounds"]) == ([0, 1], 2)
    printed = capsys.readouterr()
    assert "run 6/6: δ = 0.9, steps=3, seed 1, about" in printed.err
    row = next(line for line in printed.out.splitlines() if line.startswith("δ = 0.9, steps=2"))
    accuracy = [100 * a for a in results["points"][1]["accuracy"]]
    assert f"{statistics.fmean(accuracy):.2f} % ± {statistics.stdev(accuracy) / 2**0.5:.2f} %" in row

    files = {path.name for path in out.iterdir()}
    assert files == {
        "runs", "report.md", "report.html", "report.json", "accuracy.png", "accuracy-by-steps.png"
    }  # fmt: skip
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 2
    assert "`local.steps`" in (out / "report.md").read_text()

    # A second time, after one run was interrupted and another was made from other settings: one goes on from its
    # checkpoint (its lines, times included, stay), the other starts anew.
    metrics = [out / "runs" / names[i] / "metrics.jsonl" for i in (1, 5)]
    before = [path.read_text() for path in metrics]
    (out / "runs" / names[1] / "summary.json").unlink()
    other = out / "runs" / names[5] / "config.yaml"
    other.write_text(other.read_text().replace("rounds: 2", "rounds: 3"))
    assert main(command) == 0
    again = summaries(out)
    assert {name for name in names if again[name] != first[name]} == {names[1], names[5]}
    assert [path.read_text() == text for path, text in zip(metrics, before, strict=True)] == [True, False]
    assert json.loads((tmp_path / "results.json").read_text())["points"][1]["seeds"] == [0, 1]


def test_a_failing_run_is_named_and_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = write(tmp_path, {"cases": {"wild": {"local.lr": 1e30}, "calm": {}, "broken": {"clients": 7}}})

    def bug(config: Any, *rest: Any, **options: Any) -> Any:
        if config.clients == 7:
            raise ZeroDivisionError("a bug")
        return run(config, *rest, **options)

    from fedmpi.analysis import sweep

    run = sweep.run
    monkeypatch.setattr(sweep, "run", bug)
    assert main([*command, "--quiet"]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [point["label"] for point in results["points"]] == ["calm"]
    assert results["failed"].keys() == {"wild, seed 0", "broken, seed 0"}
    assert "try a smaller local.lr" in results["failed"]["wild, seed 0"]
    assert results["failed"]["broken, seed 0"] == "ZeroDivisionError: a bug"
    printed = capsys.readouterr()
    assert "fedmpi: wild, seed 0 failed: client" in printed.err
    assert "Failed: 2 of 3 runs: wild, seed 0; broken, seed 0" in printed.out
    assert "| wild, seed 0 | client" in (tmp_path / "out" / "report.md").read_text()


def wrong(tmp_path: Path, over: Any, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*write(tmp_path, over), "--quiet"]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_a_wrong_grid_ends_before_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "over.yaml.sedes: unknown key; did you mean 'seeds'?" in wrong(tmp_path, {"sedes": 3}, capsys)
    assert "over.yaml.over: local.steps: expected at least one value" in wrong(
        tmp_path, {"over": {"local.steps": []}}, capsys
    )
    message = wrong(tmp_path, {"over": {"local.steps": [1, "x"]}}, capsys)
    assert "steps=x, seed 0: local.steps: expected a valid integer" in message
    assert "expected a mapping of keys, got list" in wrong(tmp_path, [], capsys)
    assert "several points are called 'a-b'" in wrong(tmp_path, {"cases": {"a b": {}, "a/b": {}}}, capsys)
    assert "OVER: cannot read" in capsys.readouterr().err or main(["sweep", "x.yaml", str(tmp_path)]) == 2
    assert main([*write(tmp_path, OVER), "--side-by-side", "2"]) == 2
    assert "--side-by-side: expected a number that divides the 1 ranks, got 2" in capsys.readouterr().err


def test_labels_tell_points_apart(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TINY))
    over = {"over": {"partition": ["iid", {"name": "labels", "labels_per_client": 3}], "local.lr": [1e-5]}}
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(over, sort_keys=False))
    jobs = grid.jobs(tmp_path / "c.yaml", grid.read(tmp_path / "o.yaml"), ["rounds=9"], tmp_path)
    assert [job.label for job in jobs] == [
        "partition=iid, lr=1e-05",
        "partition=labels(labels_per_client=3), lr=1e-05",
    ]
    assert [job.config.local.lr for job in jobs] == [1e-5, 1e-5]
    assert [job.config.partition.options for job in jobs] == [
        {"seed": None},
        {"seed": None, "labels_per_client": 3},
    ]
    assert {job.config.rounds for job in jobs} == {9}
    assert len({job.folder for job in jobs}) == 2


def test_slurm_arrays_share_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*write(tmp_path, {"seeds": [5, 6, 7]}), "--quiet"]
    for name, value in {"COUNT": "2", "MIN": "3", "STEP": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert main(command) == 0
    assert summaries(tmp_path / "out").keys() == {"base-seed6"}
    assert "2 of 3 runs are not finished: the task that finishes last reports" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert main(command) == 0
    assert summaries(tmp_path / "out").keys() == {"base-seed5", "base-seed6", "base-seed7"}
    assert json.loads((tmp_path / "results.json").read_text())["points"][0]["seeds"] == [5, 6, 7]
    assert slurm_array({}) == (0, 1)
    with pytest.raises(ConfigError, match="expected evenly spaced numbers, as in --array=0-1"):
        slurm_array({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2"})


@pytest.mark.mpi
def test_runs_side_by_side(tmp_path: Path, openmpi: Mpi) -> None:
    side_by_side(tmp_path, openmpi, ranks=2)


@pytest.mark.mpi
@pytest.mark.slow
def test_runs_side_by_side_in_groups(tmp_path: Path, mpi: Mpi) -> None:
    side_by_side(tmp_path, mpi, ranks=4)


def side_by_side(tmp_path: Path, mpi: Mpi, ranks: int) -> None:
    """Two groups; each run sees its own group only, and one that fails ends nobody."""
    over = {"seeds": 2, "cases": {"calm": {}, "wild": {"local.lr": 1e30}, "late": {"rounds": 3}}}
    done = mpi(ranks, "-m", "fedmpi", *write(tmp_path, over), "--side-by-side", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {point["label"]: point["seeds"] for point in results["points"]} == {"calm": [0, 1], "late": [0, 1]}
    assert results["failed"].keys() == {"wild, seed 0", "wild, seed 1"}
    for path in (tmp_path / "out").glob("runs/*/summary.json"):
        assert json.loads(path.read_text())["ranks"] == ranks // 2
    assert done.stderr.count("wild, seed 0 failed") == 1
