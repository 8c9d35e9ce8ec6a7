"""Files that may be anything are read without waiting, and no further than they may be long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedmpi.analysis import grid
from fedmpi.analysis.sweep import _state, points
from fedmpi.comm import run_ranks
from fedmpi.comm.local import solo
from fedmpi.config import parse
from fedmpi.errors import CheckpointError, DataError
from fedmpi.integrations import folder
from fedmpi.plain_file import NotPlainError, read_plain

from .conftest import SMALL
from .test_hook_folder import job_of


def test_pipes_devices_folders_and_long_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "file") == read_plain(tmp_path / "link", 5) == b"12345"
    for path, what in {tmp_path / "pipe": "pipe", Path("/dev/zero"): "device", tmp_path: "a folder"}.items():
        with pytest.raises(NotPlainError, match=what):
            read_plain(path)
    with pytest.raises(NotPlainError, match="5 bytes"):
        read_plain(tmp_path / "file", 4)
    if (endless := Path("/proc/self/maps")).exists():  # says that it is empty
        with pytest.raises(NotPlainError, match="more than 10 bytes"):
            read_plain(endless, 10)
    with pytest.raises(OSError, match="symbolic link"):
        read_plain(tmp_path / "link", links=False)


def test_a_sweep_waits_for_no_pipe_in_a_run_s_folder(tmp_path: Path) -> None:
    job = grid.Job("one", "", {}, 0, parse(SMALL), tmp_path)
    os.mkfifo(tmp_path / "config.yaml")
    assert _state(job, solo()) == "new"
    (tmp_path / "summary.json").write_text('{"rounds": 1e')
    with pytest.raises(DataError, match=r"summary\.json: not JSON"):
        points([job])


def test_a_pipe_is_no_hook_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fedmpi-rank1.pt")

    def run(comm: object) -> str:
        with pytest.raises(CheckpointError) as error:
            folder.load(job_of(comm), tmp_path)  # type: ignore[arg-type]
        return str(error.value)

    assert len(said := set(run_ranks(2, run, timeout=30))) == 1
    assert "fedmpi-rank1.pt: expected a plain file, got a device or pipe" in said.pop()
