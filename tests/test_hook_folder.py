"""A folder holds every rank's hook state; all ranks save, load or give up together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fedmpi
from fedmpi.comm import run_ranks
from fedmpi.comm.base import Comm
from fedmpi.errors import CheckpointError, CommError, ConfigError
from fedmpi.integrations import folder
from fedmpi.integrations.job import Job

from .jobs.fuzz_states import SETTINGS, SHAPES, same, step

METHOD = {"name": "topk", "ratio": 0.3, "feedback": True}


def job_of(comm: Comm, steps: int = 0) -> Job:
    job = Job(SHAPES, METHOD, comm, SETTINGS)
    for t in range(steps):
        step(job, comm.rank, t)
    return job


def saved(path: Path, ranks: int = 2, steps: int = 3) -> list[dict[str, Any]]:
    def run(comm: Comm) -> dict[str, Any]:
        job = job_of(comm, steps)
        folder.save(job, path)
        return job.state_dict()

    return run_ranks(ranks, run)


def loaded(places: list[Path]) -> list[dict[str, Any]]:
    """What ranks have that load, each from the folder that it sees."""

    def run(comm: Comm) -> dict[str, Any]:
        job = job_of(comm)
        assert folder.load(job, places[comm.rank])
        return job.state_dict()

    return run_ranks(len(places), run, timeout=30)


def refused(places: list[Path]) -> str:
    def run(comm: Comm) -> str:
        job = job_of(comm, 1)
        with pytest.raises(CheckpointError) as error:
            folder.load(job, places[comm.rank])
        assert job.state_dict()["step"] == 1
        return str(error.value)

    told = run_ranks(len(places), run, timeout=30)
    assert len(set(told)) == 1, "every rank says the same"
    return told[0]


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_a_folder_brings_every_rank_back(tmp_path: Path) -> None:
    expected = saved(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == ["fedmpi-rank0.pt", "fedmpi-rank1.pt"]
    assert all(map(same, loaded([tmp_path / "a" / "b"] * 2), expected))


def test_other_numbers_of_ranks_go_on_whoever_sees_a_file(tmp_path: Path) -> None:
    saved(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    for places in (["two"] * 3, ["empty", "two", "empty"], ["two"]):
        with pytest.warns(UserWarning, match=f"is loaded by rank 0 of {len(places)}: residuals"):
            found = loaded([tmp_path / place for place in places])
        for state in found:
            assert state["step"] == 3
            assert not state["groups"][0]["state"]["residual"].any()


def test_a_folder_without_states_starts_afresh(tmp_path: Path) -> None:
    def run(comm: Comm) -> dict[str, Any]:
        job = job_of(comm, 2)
        fedmpi.accelerate.resume(job, str(tmp_path / "nothing"))
        return job.state_dict()

    with pytest.warns(UserWarning, match=r"nothing has no fedmpi-rank<r>\.pt: .* starts afresh") as warned:
        found = run_ranks(2, run)
    assert len(warned) == 1, "on rank 0 alone"
    for state in found:
        assert state["step"] == 0
        assert not state["groups"][0]["state"]["residual"].any()


def test_files_that_do_not_belong_together_are_refused_on_all_ranks(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "later", steps=4)

    def with_rank_1(name: str, data: bytes | None) -> list[Path]:
        path = tmp_path / name
        shutil.copytree(tmp_path / "a", path)
        (path / "fedmpi-rank1.pt").unlink()
        if data is not None:
            (path / "fedmpi-rank1.pt").write_bytes(data)
        return [path] * 2

    whole = (tmp_path / "a" / "fedmpi-rank1.pt").read_bytes()
    later = (tmp_path / "later" / "fedmpi-rank1.pt").read_bytes()
    assert "step: rank 0's has 3, rank 1's has 4" in refused(with_rank_1("ahead", later))
    told = refused(with_rank_1("lost", None))
    assert told.endswith("expected those of all 2 ranks, or none to start afresh")
    assert "fedmpi-rank1.pt is missing on rank 1" in told
    for name, data in (("cut", whole[:700]), ("empty", b""), ("noise", b"\x80\x02noise"), ("zip", b"PK\3\4")):
        told = refused(with_rank_1(name, data))
        assert f"{name}/fedmpi-rank1.pt: expected a file that fedmpi saved, got {len(data)} bytes" in told
    other = tmp_path / "other.pt"
    torch.save([1, 2], other)
    assert "expected what state_dict() returned, got [1, 2]" in refused(
        with_rank_1("list", other.read_bytes())
    )
    torch.save(Path, other)  # code is not run
    assert "expected a file that fedmpi saved" in refused(with_rank_1("code", other.read_bytes()))


def test_a_rank_that_cannot_save_is_named_on_all(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file")
    saved(tmp_path / "good")

    def run(comm: Comm) -> str:
        job = job_of(comm, 1)
        with pytest.raises(
            (CheckpointError, CommError), match=r"full/fedmpi-rank1\.pt: cannot be written: "
        ) as e:
            folder.save(job, tmp_path / ("full" if comm.rank == 1 else "good"))
        return str(e.value)

    run_ranks(2, run, timeout=30)
    assert names(tmp_path / "good") == ["fedmpi-rank0.pt", "fedmpi-rank1.pt"]


def test_fewer_ranks_remove_what_more_ranks_left(tmp_path: Path) -> None:
    saved(tmp_path, ranks=3)
    expected = saved(tmp_path, ranks=2, steps=4)
    assert names(tmp_path) == ["fedmpi-rank0.pt", "fedmpi-rank1.pt"]
    assert all(map(same, loaded([tmp_path] * 2), expected))


def test_register_takes_an_accelerator_and_a_hook_s_state() -> None:
    class Fake:
        def register_save_state_pre_hook(self, hook: Any) -> None: ...

        register_load_state_pre_hook = register_save_state_pre_hook

    with pytest.raises(ConfigError, match=r"accelerator: expected an accelerate\.Accelerator, got int"):
        fedmpi.accelerate.register(3, run_ranks(1, job_of)[0])
    with pytest.raises(ConfigError, match=r"state: expected what fedmpi\.ddp\.attach returned, got dict"):
        fedmpi.accelerate.register(Fake(), {})
