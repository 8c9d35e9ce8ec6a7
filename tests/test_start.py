"""The first seconds of a run: a signal that comes before it listens, a rank that never comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpi import start

from .conftest import JOBS, SMALL, Mpi, find_mpi, write_config


@pytest.mark.parametrize("place", ["import", "load", "shaken"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_the_first_round_ends_with_75(
    place: str, number: int, tmp_path: Path, openmpi: Mpi
) -> None:
    """One rank of two gets it while it imports, loads or waits; both end, having written nothing."""
    if (place == "load") is (number == signal.SIGTERM):
        path, out = write_config(tmp_path, SMALL), tmp_path / "run"
        done = openmpi(2, str(JOBS / "early.py"), f"1 {number} {place}", "train", path, "--out", str(out))
        assert done.returncode == os.EX_TEMPFAIL, done.stderr
        assert (
            done.stderr.count("stopped by a signal before its first round: nothing is lost, start it again")
            == 1
        )
        assert "continue with:\nfedmpi" not in done.stderr
        assert not out.exists()


def test_handlers_stand_before_the_imports(tmp_path: Path) -> None:
    """The module that sets them up takes nothing in that takes time, and the entry points take it first."""
    code = (
        "import sys; sys.argv = ['fedmpi', 'train']; import fedmpi.start, signal, os; "
        "os.kill(os.getpid(), signal.SIGUSR1); "
        "print(fedmpi.start.asked(), *(name in sys.modules for name in ('torch', 'argparse', 'fedmpi.cli')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]


def test_other_commands_keep_what_signals_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with start.remembering("methods"):
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with start.remembering("train"):
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR1)
        assert start.asked()
    assert not start.asked()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def check_never_comes(mpi: Mpi, number: int, said: str, folder: Path, *options: str) -> None:
    path = write_config(folder, {**SMALL, "timeout": 8})  # those who come have loaded by then
    command = [str(mpi.prefix / "bin" / "mpiexec"), *options, "-n", "3", sys.executable]
    done = subprocess.run(
        [*command, str(JOBS / "early.py"), f"1 {number} none", "train", path, "--out", str(folder / "run")],
        env=mpi.env, capture_output=True, text=True, errors="replace", timeout=100, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode, done.stderr
    assert done.stderr.count(f"s for the ranks to connect: rank 1 {said}; ending all ranks\n") == 1, (
        done.stderr
    )
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "has ended"), (signal.SIGSTOP, "is stopped")],
    ids=["killed", "stopped"],
)
def test_a_rank_that_never_connects_ends_the_others(
    number: int, said: str, tmp_path: Path, openmpi: Mpi
) -> None:
    check_never_comes(openmpi, number, said, tmp_path, "--with-ft", "ulfm")


@pytest.mark.slow
def test_a_rank_that_never_connects_ends_the_others_with_mpich(tmp_path: Path) -> None:
    check_never_comes(find_mpi("mpich"), signal.SIGSTOP, "is stopped", tmp_path)


@pytest.mark.slow  # tests/test_guard.py has ranks below shells without their imports
def test_a_slow_rank_below_a_shell_has_not_ended(tmp_path: Path) -> None:
    """MPICH names no job: its ranks were known by their parent, and a job whose ranks a script starts was killed."""
    mpi, path = find_mpi("mpich"), write_config(tmp_path, {**SMALL, "rounds": 1, "timeout": 1})
    script = '[ "$PMI_RANK" = 1 ] && sleep 6; "$@"; code=$?; exit $code'
    command = [str(mpi.prefix / "bin" / "mpiexec"), "-n", "2", "sh", "-c", script, "sh", sys.executable, "-m"]
    done = subprocess.run(
        [*command, "fedmpi", "train", path, "--out", str(tmp_path / "run")],
        env=mpi.env, capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
