"""The process beside a rank that waits: whom it ends and whom not, tried with ranks that load nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedmpi.comm import guard

from .conftest import JOBS

# Elsewhere there is no /proc to look at the other ranks in, and the guard has its deadline only.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard looks at ranks in /proc")


def launched(folder: Path, timeout: str, *ranks: str, patience: str = "300.0") -> tuple[int, str, str]:
    """Exit code, how the ranks ended, and what was said, of a launcher that has Open MPI's name."""
    link, copied = folder / "prterun", folder / "guard.py"
    link.symlink_to(sys.executable)
    text = Path(guard.__file__).read_text()
    assert text.count("PATIENCE = 300.0") == 1
    copied.write_text(text.replace("PATIENCE = 300.0", f"PATIENCE = {patience}"))
    command = [str(link), "-I", "-S", str(JOBS / "guarded.py"), str(copied), timeout, *ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("command", "said"), [("kill -9 $$", "rank 1 has ended"), ("kill -STOP $$", "rank 1 is stopped")]
)
def test_a_rank_that_will_not_come_ends_the_job(command: str, said: str, tmp_path: Path) -> None:
    """Though the launcher, as with ULFM, goes on without it, and the guard got every signal that goes to all."""
    code, ended, text = launched(tmp_path, "0.5", "$WAIT 40", command)
    assert (code, ended) == (1, ""), text
    assert text.count(f"for the ranks to connect: {said}; ending all ranks") == 1, text


@pytest.mark.parametrize("timeout", ["", "0.5"])
def test_ranks_that_live_and_do_not_connect_have_a_deadline(timeout: str, tmp_path: Path) -> None:
    code, _, text = launched(tmp_path, timeout, "$WAIT 40", "sleep 40", patience="1.5")
    assert code == 1
    assert "rank 0 of 2 has waited for 2 s for the ranks to connect: not all have come" in text, text


@pytest.mark.parametrize(
    "other", ["sleep 3", "(sleep 3; :)", "bare sleep 3"], ids=["shell", "two shells", "without its variables"]
)
def test_a_slow_rank_is_left_alone(other: str, tmp_path: Path) -> None:
    assert launched(tmp_path, "0.5", "$WAIT 3", other) == (0, "0 0", "")


def test_a_job_that_was_suspended_is_left_alone(tmp_path: Path) -> None:
    """All its ranks are stopped, and go on later: nobody waits meanwhile."""
    ranks = (
        f"{command} & rank=$!; sleep 1; kill -STOP $rank; sleep 3; kill -CONT $rank; wait $rank"
        for command in ("$WAIT 2", "sleep 2")
    )
    assert launched(tmp_path, "0.1", *ranks) == (0, "0 0", "")
