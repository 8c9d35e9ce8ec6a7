"""The first seconds of a run: a signal that comes before it listens, a rank that never comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpi import start

from .conftest import JOBS, SMALL, Mpi, write_config


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
