"""What clients keep between rounds: rows apart, in memory or mapped from disk, taken back when a rank is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config, machine
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.store import ClientStore, MappedStore
from fedmpi.errors import ConfigError

from .conftest import SMALL
from .jobs.runs import outcome


@pytest.mark.parametrize("kind", ["memory", "mmap"])
def test_a_store_keeps_rows_apart(kind: str, tmp_path: Path) -> None:
    def init() -> dict[str, torch.Tensor]:
        return {"a": torch.zeros(3), "h": torch.zeros((), dtype=torch.bfloat16), "b": torch.ones(0)}

    store = ClientStore(init) if kind == "memory" else MappedStore(init, 10, tmp_path)
    assert store.row == 14
    assert not list(tmp_path.iterdir()), "its files have no names"
    ids = torch.tensor([5, 2])
    state = store.get(ids)
    state["a"] += torch.tensor([[1.0], [2.0]])
    assert torch.equal(store.get(ids)["a"], torch.zeros(2, 3)), "a state that was not put back is not kept"
    store.put(ids, state)
    state["a"] += 7
    assert store.get(torch.tensor([2, 5, 9]))["a"][:, 0].tolist() == [2.0, 1.0, 0.0]


def test_what_is_forgotten_gives_its_place_back() -> None:
    store = ClientStore(lambda: {"a": torch.ones(2)})
    store._per_slab = 2
    ids = torch.tensor([7, 0, 5])
    for turn in range(4):
        store.put(ids + turn, {"a": torch.full((3, 2), float(turn + 2))})
        assert store.known.tolist() == sorted((ids + turn).tolist())
        assert store.get(torch.tensor([5 + turn, 99, 7 + turn]))["a"][:, 0].tolist() == [
            turn + 2,
            1,
            turn + 2,
        ]
        store.forget(torch.tensor([*(ids + turn).tolist(), 40, 1000]))
    assert len(store._slabs) == 2
    store.put(ids, {"a": torch.zeros(3, 2)})
    store.clear()
    assert not len(store.known)
    assert store.get(ids)["a"].tolist() == [[1, 1]] * 3


MEASURED = """
import torch
from fedmpi.engine.store import ClientStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def fill(size, clients):
    store = ClientStore(lambda: {"g": torch.zeros(size), "sent": torch.zeros((), dtype=torch.bool)})
    for i in range(0, clients, 500):
        ids = torch.arange(i, i + 500)
        store.put(ids, {"g": torch.ones(500, size), "sent": torch.ones(500, dtype=torch.bool)})
    return store

kept = [fill(1000, 500)]  # what torch takes for itself; freed, its memory would be taken again unseen
for size, clients in ((10, 100_000), (1000, 10_000)):
    before = resident()
    kept.append(fill(size, clients))
    print(resident() - before, kept[-1].need(clients, clients))
"""


def test_what_a_store_says_that_it_needs_is_what_it_takes() -> None:
    """Of small rows too: once 20,000 clients of 10 numbers took 29 MB, and 0.8 were said."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        taken, said = map(int, line.split())
        assert taken / 1.5 <= said <= taken * 1.5


def test_the_two_stores_are_the_same_run(tmp_path: Path) -> None:
    values = {
        **SMALL,
        "method": {"name": "lookback", "inner": {"name": "topk", "feedback": True, "ratio": 0.1}},
    }
    mapped = outcome({**values, "store": "mmap", "store_folder": str(tmp_path)}, solo())
    assert mapped["sha256"] == outcome(values, solo())["sha256"]


@settings(deadline=None, max_examples=50)
@given(
    mapped=st.booleans(),
    steps=st.lists(st.one_of(st.none(), st.lists(st.integers(0, 5), unique=True)), max_size=20),
    data=st.data(),
)
def test_a_store_goes_back_by_two_marks(
    mapped: bool, steps: list[list[int] | None], data: st.DataObject
) -> None:
    """``steps``: None marks, a list puts new states of those clients."""

    def init() -> dict[str, torch.Tensor]:
        return {"a": torch.zeros(2)}

    store = MappedStore(init, 6, Path(tempfile.gettempdir())) if mapped else ClientStore(init)
    store._per_slab = 2  # so that a few clients take several slabs
    held: list[dict[int, float]] = [{}]
    now: dict[int, float] = {}
    store.mark()
    for n, step in enumerate(steps, 1):
        if step is None:
            store.mark()
            held.append(dict(now))
        elif step:
            store.put(torch.tensor(step), {"a": torch.full((len(step), 2), float(n))})
            now |= dict.fromkeys(step, float(n))
    marks = data.draw(st.integers(0, min(2, len(held))))
    store.rewind(marks)
    expected = held[-marks] if marks else now
    assert store.known.tolist() == sorted(expected)
    assert store.get(torch.arange(6))["a"][:, 0].tolist() == [expected.get(c, 0.0) for c in range(6)]


def test_a_run_whose_state_would_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpi.engine.store._available_memory", lambda: 10_000)
    values = {**SMALL, "method": {"name": "topk", "feedback": True}}
    with pytest.raises(
        ConfigError, match=r"client state needs up to 15\.6 kB of memory, 10 kB are free; ways out"
    ):
        Simulation(config.parse(values), solo())  # 6 clients x 650 numbers
    assert Simulation(config.parse({**values, "store": "mmap"}), solo()).memory.startswith(
        "client state needs"
    )
    assert Simulation(config.parse({**values, "method": "dense"}), solo()).memory == ""
    with pytest.raises(ConfigError, match="store_folder: cannot use /nowhere: No such file"):
        Simulation(config.parse({**values, "store": "mmap", "store_folder": "/nowhere"}), solo())


@pytest.mark.parametrize(
    ("said", "expected"),
    [("MemTotal: 90 kB\nMemAvailable:  7 kB\n", 7 * 1024), ("MemTotal: 90 kB\n", None), (None, None)],
)
def test_free_memory_is_what_linux_says_or_all_that_there_is(
    said: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is not None:
        (tmp_path / "meminfo").write_text(said)
    monkeypatch.setattr(machine, "Path", lambda path: {"/proc/meminfo": tmp_path / "meminfo"}[path])
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.available_memory() == (everything if expected is None else expected)
