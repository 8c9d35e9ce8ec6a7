"""The report: what it shows is what the runs' folders say, and a folder that says nothing is named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi.analysis.legend import apart, setting
from fedmpi.analysis.report import report
from fedmpi.cli import main
from fedmpi.errors import ConfigError, DataError

from .conftest import SMALL

ROUNDS = 6
PARAMS, COHORT = 1000, 4
FULL = 4 * PARAMS * COHORT  # bytes a round and direction, uncompressed


def write_run(
    folder: Path, method: str = "dense", up: int = FULL, *, seed: int = 0, bias: float = 0.0, **summary: Any
) -> dict[str, Any]:
    """A run's folder as the engine writes it; returns its summary."""
    folder.mkdir(parents=True)
    config = {"method": {"name": method}, "rounds": ROUNDS, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    accuracy = None
    with (folder / "metrics.jsonl").open("w") as file:
        for t in range(ROUNDS):
            accuracy = 0.5 + 0.05 * t + bias if t % 2 else None
            line = {"round": t, "loss": 1.0, "accuracy": accuracy, "upload_bytes": up, "download_bytes": FULL}
            file.write(json.dumps(line) + "\n")
    sent, full = up * ROUNDS, FULL * ROUNDS
    summary = {
        "method": method,
        "accuracy": accuracy,
        "rounds": ROUNDS,
        "upload_bytes": sent,
        "download_bytes": full,
        "upload_ratio": full / sent if sent else None,
        "download_ratio": 1.0,
        "total_ratio": 2 * full / (sent + full),
        "messages": COHORT * ROUNDS,
        "seconds": 1.25,
        "seed": seed,
        "ranks": 1,
        "comm": "one process",
        **summary,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def cells(text: str, markdown: bool = False) -> list[dict[str, str]]:
    """The first table's rows by header; in text, columns are as wide as the rule below the header says."""
    lines = text.splitlines()
    if markdown:
        table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    lines = lines[: lines.index("")]
    ends = [i + 1 for i, c in enumerate(lines[1]) if c == "-" and lines[1][i + 1 : i + 2] != "-"]
    spans = list(zip([0, *ends], ends, strict=False))
    rows = [[line[a:b].strip() for a, b in spans] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def png_size(path: Path) -> tuple[int, ...]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_the_tables_show_the_summaries(tmp_path: Path) -> None:
    summaries = {
        "dense": write_run(tmp_path / "dense"),
        "signsgd": write_run(tmp_path / "signsgd", "signsgd", 504),
        "lookback": write_run(tmp_path / "lookback", "lookback", FULL // 7 * 3, scalars=9, bias=0.011),
    }
    text = report([tmp_path / name for name in summaries], tmp_path / "out")
    document = (tmp_path / "out" / "report.md").read_text()
    for rows in (cells(text), cells(document, markdown=True)):
        assert [row["run"] for row in rows] == list(summaries)
        for row, summary in zip(rows, summaries.values(), strict=True):
            for direction in ("upload", "download", "total"):
                shown, exact = row[f"{direction} ratio"], summary[f"{direction}_ratio"]
                assert shown == f"{exact:.{2 if exact < 9.995 else 1}f}x"
            assert row["accuracy"] == f"{100 * summary['accuracy']:.2f} %"
            assert (row["method"], row["seed"], row["rounds"]) == (summary["method"], "0", str(ROUNDS))
            assert row["seconds"] == "1.2"
        assert [row["scalars"] for row in rows] == ["-", "-", "37.50 %"]
        assert [row["upload"] for row in rows][:2] == ["96 kB", "3.02 kB"]
    assert "31.7x" in text
    assert "over seeds" not in text
    assert png_size(tmp_path / "out" / "report.png") == (1200, 525)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.md",
        "report.png",
    ]


def test_commands_that_make_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a b"))
    write_run(Path("runs/mpi"), ranks=4, comm="Open MPI v5.0.8")
    write_run(Path("runs/threads"), ranks=3, comm="threads")
    text = report([Path("runs/a b"), Path("runs/mpi"), Path("runs/threads")])
    written = "runs/report/report.png, runs/report/report.md, runs/report/report.html"  # beside the runs
    assert text.endswith(f"Written: {written}")
    commands = Path("runs/report/report.md").read_text().split("```")[3].splitlines()
    assert commands == [
        "sh",
        "fedmpi train 'runs/a b/config.yaml'",
        "mpirun -n 4 fedmpi train runs/mpi/config.yaml",
        "fedmpi train runs/threads/config.yaml --local-ranks 3",
        "fedmpi report 'runs/a b' runs/mpi runs/threads --out runs/report",
    ]
    # A second time with a glob: the report itself is no run, and a run given twice is one.
    again = report([*sorted(Path("runs").iterdir()), tmp_path / "runs" / "mpi"])
    assert again == text


def test_seeds_are_averaged(tmp_path: Path) -> None:
    for seed, bias in enumerate((0.00, 0.02, 0.04)):
        write_run(tmp_path / f"topk-{seed}", "topk", 500, seed=seed, bias=bias)
    write_run(tmp_path / "dense")
    write_run(tmp_path / "dense-again")  # the same seed: no second draw
    text = report(sorted(tmp_path.iterdir()), tmp_path / "out")
    single, _, mean = text.partition("Mean ± standard error over seeds:\n\n")
    assert len(cells(single)) == 5
    (row,) = cells(mean)
    assert (row["run"], row["seed"]) == ("topk-0 .. topk-2", "3 seeds")
    assert row["accuracy"] == "77.00 % ± 1.15 %"  # 2 points / √3
    assert row["upload ratio"] == "32.0x", "no ± 0"
    # A seed that ran twice weighs as much as the others.
    write_run(tmp_path / "topk-2-again", "topk", 500, seed=2, bias=0.04)
    runs = [path for path in sorted(tmp_path.iterdir()) if path.name.startswith("topk")]
    (row,) = cells(report(runs, tmp_path / "out").partition("seeds:\n\n")[2])
    assert (row["seed"], row["accuracy"]) == ("3 seeds", "77.00 % ± 1.15 %")


def test_a_legend_says_what_differs() -> None:
    """The method with the options that were chosen, then other keys; a name only where nothing else tells two apart."""
    topk = {
        "name": "topk",
        "ratio": 0.05,
        "k": None,
        "feedback": True,
        "values": "float32",
        "indices": "packed",
    }
    over = {"name": "lookback", "threshold": 0.5, "inner": {"name": "dense"}}
    base = {
        "data": {"name": "digits"},
        "model": {"name": "fcn", "hidden": 50},
        "clients": 40,
        "cohort": 20,
        "seed": 0,
    }
    one, two, three = (
        {**base, "method": m, "server": {"lr": lr}} for m, lr in ((topk, None), (over, None), (over, 0.2))
    )
    assert apart([one, two], ["a", "b"]) == ["topk(ratio=0.05, feedback=True)", "lookback(threshold=0.5)"]
    assert apart([two, three], ["a", "b"]) == ["a", "server.lr=0.2"]
    assert apart([one, {**one, "seed": 5}], ["a", "b"]) == ["a", "b"]
    assert apart([one, one, two], ["a", "b", "c"])[:2] == [
        f"topk(ratio=0.05, feedback=True) [{n}]" for n in "ab"
    ]
    assert setting([one, two]) == "digits, fcn(hidden=50), 40 clients, 20 a round"
    assert setting([one, {**two, "clients": 41}]) == "digits, fcn(hidden=50)"
    own = {"name": "mine:ENTRY", "size": 3}
    assert apart([{"method": own}, {"method": topk}], ["a", "b"])[0] == "mine:ENTRY(size=3)", (
        "nothing is imported"
    )


def test_a_report_in_other_formats(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "topk")
    write_run(tmp_path / "b")
    pictures = []
    for _ in range(2):
        report([tmp_path / "a", tmp_path / "b"], tmp_path / "out", "svg")
        pictures.append((tmp_path / "out" / "report.svg").read_bytes())
    assert pictures[0] == pictures[1]
    assert b"<svg" in pictures[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "rounds: 6" in page
    with pytest.raises(ConfigError, match="--format: expected one of png, svg, pdf, got 'gif'"):
        report([tmp_path / "a"], tmp_path / "out", "gif")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "1" / "run", tmp_path / "y" / "1" / "run", tmp_path / "y" / "2" / "run"]
    for folder in [*folders, tmp_path / "other"]:
        write_run(folder)
    text = report([*folders, tmp_path / "other"], tmp_path / "out")
    assert [row["run"] for row in cells(text)] == ["x/1/run", "y/1/run", "2/run", "other"]


def test_nothing_evaluated_and_nothing_sent(tmp_path: Path) -> None:
    write_run(tmp_path / "_silent $x$|y", up=0, accuracy=float("nan"))
    metrics = tmp_path / "_silent $x$|y" / "metrics.jsonl"
    lines = [json.loads(line) | {"accuracy": None} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = cells(report([metrics.parent], tmp_path / "out"))
    assert (row["accuracy"], row["upload"], row["upload ratio"], row["total ratio"]) == (
        "-",
        "0 B",
        "-",
        "2.00x",
    )
    assert "| _silent $x$\\|y | dense |" in (tmp_path / "out" / "report.md").read_text()
    png_size(tmp_path / "out" / "report.png")


def test_a_real_run_can_be_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["train", "small.yaml", "--out", "runs/real", "--quiet", "method.name=lookback"]) == 0
    assert main(["report", "runs/real"]) == 0
    (row,) = cells(capsys.readouterr().out)
    summary = json.loads(Path("runs/real/summary.json").read_text())
    assert row["upload ratio"] == f"{summary['upload_ratio']:.2f}x"
    assert row["scalars"] == f"{100 * summary['scalars'] / summary['messages']:.2f} %"


def wrong(folder: Path, out: Path | None = None) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        report([folder], out)
    assert not (folder.parent / "report").exists()
    return str(caught.value)


def test_folders_that_are_no_finished_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run, metrics, summary = runs / "a", runs / "a" / "metrics.jsonl", runs / "a" / "summary.json"
    assert "runs/b: expected a run's folder, there is none" in wrong(runs / "b")
    write_run(run)
    assert "config.yaml: expected a run's folder, got a file" in wrong(run / "config.yaml")
    assert f"runs is no run: it has no config.yaml; there are runs inside it: {run}" in wrong(runs)

    good = {path: path.read_text() for path in (metrics, summary, run / "config.yaml")}
    lines = good[metrics].splitlines(keepends=True)

    def damaged(path: Path, text: str) -> str:
        path.write_text(text)
        message = wrong(run)
        path.write_text(good[path])
        return message

    cut = "".join(lines[:2]) + lines[2][:20]
    assert f"{metrics}, line 3: not JSON, cut off or damaged (EOF" in damaged(metrics, cut)
    assert f"{metrics}, line 2: not JSON" in damaged(metrics, lines[0] + "\n" + "".join(lines[1:]))
    assert f"{metrics}, line 1: accuracy: Field required" in damaged(
        metrics, '{"round": 0, "upload_bytes": 3, "download_bytes": 3}\n'
    )
    assert f"{metrics}: expected 6 lines, a line a round, got 5" in damaged(metrics, "".join(lines[:5]))
    assert f"{summary}: not JSON" in damaged(summary, good[summary][:-1])
    assert f"{summary}: messages: Input should be a valid integer" in damaged(
        summary, good[summary].replace('"messages": 24', '"messages": "many"')
    )
    assert "config.yaml is not YAML" in damaged(run / "config.yaml", "a: [")
    assert "config.yaml: expected a mapping of keys, got list" in damaged(run / "config.yaml", "[]")

    summary.unlink()
    metrics.write_text(cut)
    message = wrong(run)
    assert (
        f"{run} is unfinished: it has no summary.json, and 2 of 6 rounds; it is still in progress or was"
        in message
    )
    metrics.unlink()
    assert "and 0 of 6 rounds" in wrong(run)


def test_an_out_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert f"--out: cannot write to {tmp_path / 'file'}: File exists" in wrong(
        tmp_path / "a", tmp_path / "file"
    )
    with pytest.raises(DataError, match="expected the folders of runs, got none"):
        report([], tmp_path)


def test_piped_lines_are_whole(tmp_path: Path) -> None:
    write_run(tmp_path / ("long-name-" * 12))
    done = subprocess.run(
        [sys.executable, "-m", "fedmpi", "report", str(tmp_path / ("long-name-" * 12))],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = cells(done.stdout)
    assert row["run"] == "long-name-" * 12
    assert row["total ratio"] == "1.00x"
