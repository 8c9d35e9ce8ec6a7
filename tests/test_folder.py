"""A run's folder is one run's: made with a name of its own, locked while the run lasts, and not overwritten unasked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine import folder
from fedmpi.engine.folder import Claim
from fedmpi.engine.run import run
from fedmpi.errors import ConfigError

from .conftest import SMALL, metrics, write_config
from .interrupted import SAVED, train

TINY: dict[str, Any] = {**SMALL, "rounds": 2}


def test_runs_of_one_second_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the first has not written anything yet."""
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, TINY)
    monkeypatch.setattr(folder.time, "strftime", lambda *_: "20300101-000000")
    for seed in range(3):
        assert main(["train", path, f"seed={seed}", "--quiet"]) == 0
    stem = f"{Path(path).stem}-20300101-000000"
    for seed, name in enumerate((stem, f"{stem}-2", f"{stem}-3")):
        out = tmp_path / "runs" / name
        assert json.loads((out / "summary.json").read_text())["seed"] == seed
        assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == seed
    assert folder.fresh(Path("runs"), Path(path).stem).name == f"{stem}-4"
    monkeypatch.undo()


def test_a_run_that_fails_at_once_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, {**TINY, "data": {"name": "mnist", "folder": str(tmp_path / "none")}})
    assert main(["train", path, "--quiet"]) == 2
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_newest_folder_is_the_last_of_its_second(tmp_path: Path) -> None:
    for name in (
        "a-20300101-000000-9",
        "a-20300101-000000-10",
        "a-20291231-235959-11",
        "a-b-20310101-000000",
    ):
        (tmp_path / name).mkdir()
    found = folder.last(tmp_path, "a")
    assert found is not None
    assert found.name == "a-20300101-000000-10"
    assert folder.last(tmp_path, "c") is None
    assert folder.last(tmp_path / "none", "a") is None


def test_a_folder_in_use_is_refused_until_its_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is held in the middle of its run, as on a frozen machine; a second run in its folder is refused, with
    and without what would otherwise let it begin there. Killed, it has given the folder back."""
    out = tmp_path / "run"
    path = write_config(tmp_path, {**SAVED, "rounds": 10**6})
    first = subprocess.Popen([sys.executable, "-m", "fedmpi", "train", path, "--out", str(out), "--quiet"])
    try:
        while len(metrics(out) if (out / "metrics.jsonl").exists() else ()) < 4:
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(folder, "_PATIENCE", 0.1)
        before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
        names = rf"{out} is in use by another run \(.*process {first.pid} on .*, since 20.*\)"
        for how in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(ConfigError, match=names):
                run(config.parse(TINY), solo(), out, quiet=True, **how)
        assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    finally:
        first.kill()
        first.wait()
    with pytest.raises(
        ConfigError, match="holds an interrupted run; continue it with --resume, or replace it"
    ):
        run(config.parse(TINY), solo(), out, quiet=True)
    assert run(config.parse(TINY), solo(), out, quiet=True, overwrite=True)["rounds"] == 2
    assert not list((out / "checkpoints").iterdir())


def test_a_finished_run_is_kept_unless_it_shall_be_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "run", write_config(tmp_path, TINY)
    assert main(["train", path, "--out", str(out), "--quiet"]) == 0
    before = (out / "summary.json").read_bytes()
    assert main(["train", path, "seed=5", "--out", str(out), "--quiet"]) == 2
    assert f"--out: {out} holds a finished run; name another folder, or replace" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == before
    assert main(["train", path, "seed=5", "--out", str(out), "--quiet", "--overwrite"]) == 0
    assert json.loads((out / "summary.json").read_text())["seed"] == 5
    for wrong in (["--overwrite"], ["--overwrite", "--out", str(out), "--resume"]):
        assert main(["train", path, "--quiet", *wrong]) == 2
        assert "--overwrite: expected" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    out, lock = tmp_path / "run", tmp_path / "run" / ".lock"
    out.mkdir()
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(ConfigError, match=f"--out: cannot write to {out}"):
        run(config.parse(TINY), solo(), out, quiet=True)
    assert not (tmp_path / "elsewhere").exists()


def test_a_new_rank_0_takes_a_lost_ones_lock_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the file system keeps a lost machine's lock, its heir goes on without; a stranger's is respected."""
    monkeypatch.setattr(folder, "_INHERITANCE", 0.1)
    lost, heir = Claim(), Claim()
    lost.take(tmp_path, solo())
    heir.note(tmp_path)
    heir.take(tmp_path, solo())
    assert "still locked by the lost rank" in capsys.readouterr().err
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    with pytest.raises(ConfigError, match="is in use by another run"):
        heir.take(tmp_path, solo())
    lost.release()
    heir.take(tmp_path, solo())
    heir.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    train(TINY, tmp_path / "run")
    assert "file system without locks (No locks available)" in capsys.readouterr().err
