"""What a person sees of a run: a bar on a terminal, lines elsewhere. The terminals are real ones (a pty each)."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import pytest

from fedmpi.engine import progress
from fedmpi.engine.progress import Display, human
from fedmpi.tasks.metrics import METRICS


class Terminal:
    """A terminal that a test reads what was shown on."""

    def __init__(self) -> None:
        self.screen, inside = pty.openpty()
        self.file = os.fdopen(inside, "w")

    def shown(self) -> str:
        """All that was written so far; less than a terminal holds back."""
        self.file.flush()
        os.set_blocking(self.screen, False)
        parts = []
        while True:
            try:
                parts.append(os.read(self.screen, 1 << 16))
            except OSError:  # nothing more is there
                return b"".join(parts).decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.file.close()
    os.close(made.screen)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich looks at besides the file."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


def line(t: int, **changes: Any) -> dict[str, Any]:
    return {
        "round": t, "clients": 4, "upload_bytes": 1_500, "download_bytes": 20, "loss": 0.25, "accuracy": None,
    } | changes  # fmt: skip


def show(rounds: int, start: int = 0, **options: Any) -> None:
    display = Display("topk", rounds, **options)
    display.say("a sentence above [it]")
    display.say("")
    display.start(start, {"upload": 3_000, "download": 0}, {"accuracy": METRICS["accuracy"]})
    for t in range(start, rounds):
        display.round(line(t, accuracy=0.5 if t else None, loss=None if t == start else 0.25))
    display.close()


def test_a_terminal_has_a_bar_with_a_sentence_above(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    show(3)
    shown = terminal.shown()
    assert "a sentence above [it]\r\n" in shown
    assert shown.index("a sentence") < shown.rindex("3/3")
    assert "loss 0.2500 accuracy 50.0% up 7.5 kB down 60 B" in shown
    assert "round 3/3" not in shown, "no lines of a log beside the bar"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("where", ["terminal", "pipe", "gone"])
def test_a_rank_asks_where_its_launchers_output_goes(
    where: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Open MPI: stderr is a pipe, stdout a terminal of its own. The launcher is a process with an output of its own."""
    output: TextIO | int = terminal.file if where == "terminal" else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=output
    ) as launcher:
        if where == "gone":
            launcher.communicate(b"\n")
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setattr(sys, "stdout", terminal.file)
        show(2)
        if where != "gone":
            launcher.communicate(b"\n")
    said = capsys.readouterr().err
    assert ("2/2" in terminal.shown()) == (where == "terminal")
    assert ("round 2/2" in said) == (where != "terminal")


def test_a_log_has_the_first_and_last_round_and_one_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = Display("topk", 12)
    display.start(2, {"upload": 0, "download": 0})
    for t in range(2, 12):
        now[0] += 2.0
        display.round(line(t))
    display.close()
    said = capsys.readouterr().err.splitlines()
    assert [row.split()[1] for row in said] == ["3/12", "6/12", "9/12", "12/12"]
    assert said[1] == "round 6/12 loss 0.2500 up 6 kB down 80 B 2 clients/s 12 s left"


def test_the_time_left_is_that_of_the_last_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = Display("topk", 1000)
    display.start(0, {"upload": 0, "download": 0})
    for t in range(30):
        now[0] += 600.0 if t == 0 else 6.0 if t < 15 else 8.0
        display.round(line(t))
    display.close()
    said = capsys.readouterr().err.splitlines()
    assert "left" not in said[0], "the first round prepares: it tells nothing"
    assert said[1].endswith(" 1 h 39 min left")  # 998 rounds of 6 s
    assert said[-1].endswith(" 2 h 9 min left")  # 970 of 8 s


def test_what_is_not_enabled_shows_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    show(2, enabled=False)
    assert terminal.shown() == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (5e9, "5 GB"), (7e15, "7e+03 TB")],
)
def test_bytes_for_people(nbytes: float, said: str) -> None:
    assert human(nbytes) == said
