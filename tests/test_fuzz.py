"""Damaged inputs of every kind end in a named error, or are accepted and are what was meant."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from .jobs import fuzz, fuzz_data, fuzz_messages
from .jobs.outcomes import fuzz as here

# How many of 100 inputs end in either way at least: else the changes are too rough, or change nothing.
LEAST = 2


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_a_hundred_inputs_of_a_kind(name: str) -> None:
    kind = importlib.import_module(f"tests.jobs.fuzz_{name}")
    less = {
        "messages": partial(fuzz_messages.prepare, specs=fuzz_messages.SPECS[:1]),
        "data": partial(fuzz_data.prepare, texts=False),  # transformers takes seconds to import
    }
    outcome = here(SimpleNamespace(prepare=less.get(name, kind.prepare)), 100, seed=7)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.tried == 100
    assert min(outcome.refused, outcome.taken) >= LEAST


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", fuzz.KINDS)
def test_thousands_of_inputs_of_a_kind(name: str) -> None:
    """In processes that may not take much memory, and are killed if an input takes too long."""
    n = fuzz.inputs(name)
    outcome = fuzz.apart(name, n, seed=1)
    assert not outcome.wrong, "\n".join(outcome.wrong[:20])
    assert outcome.tried == n
    assert min(outcome.refused, outcome.taken) >= n * LEAST / 100


def test_the_thousands_are_enough() -> None:
    counts = [fuzz.inputs(name) for name in fuzz.KINDS]
    assert min(counts) >= 5_000
    assert sum(counts) >= 100_000
    files = {path.stem for path in Path(fuzz.__file__).parent.glob("fuzz_*.py")}
    assert files == {f"fuzz_{name}" for name in (*fuzz.KINDS, "broken")}, "each kind is tried"


def test_what_goes_wrong_is_counted_and_named() -> None:
    """A crash, a hang, an end without a word, a traceback, an error without words: and the inputs after it go on."""
    ways = ("taken", "refused", "no words", "crash", "hang", "exit", "traceback")
    seed = next(
        s for s in range(10**6) if {random.Random(f"{s} {i}").choice(ways) for i in range(7)} == {*ways}
    )
    drawn = [random.Random(f"{seed} {i}").choice(ways) for i in range(7)]
    outcome = fuzz.apart("broken", 7, seed, patience_s=10)
    assert (outcome.taken, outcome.refused, outcome.tried) == (1, 1, 7)
    said = {
        way: next(why for why in outcome.wrong if f"input {drawn.index(way)} of seed {seed}" in why)
        for way in ways[2:]
    }
    assert "the process ended with -11: it is a" in said["crash"]
    assert "no end after 10 s" in said["hang"]
    assert "the process ended with 0" in said["exit"]
    assert "TypeError: 'PosixPath' object is not subscriptable (fuzz_broken.py:" in said["traceback"]
    assert "an error of 0 characters" in said["no words"]


def test_the_command_names_its_kinds() -> None:
    command = [sys.executable, fuzz.__file__, "messages", "letters"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "expected some of messages, downloads, checkpoints, configs, data, states, got letters" in done.stderr
    )
