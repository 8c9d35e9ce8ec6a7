"""What long vectors take: memory of codecs and servers, one encoding a rank, downloads that are only counted."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from fedmpi.bench import rounds, size
from fedmpi.engine import rounds as engine
from fedmpi.engine.ledger import Bytes
from fedmpi.methods import METHODS

from .softmax import simulate

PEAKS = """
import json
import torch
from fedmpi.bench import size
torch.set_num_threads(1)
print(json.dumps([row._asdict() for row in size._codings(1 << 23, 1) if row.unit == "D"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_codec_or_server_takes_more_than_three_vectors() -> None:
    """At 2^23 numbers, each in memory that comes and goes by itself."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["case"].split(":")[0] for row in rows} == set(size.CODINGS)
    assert {row["case"]: row["value"] for row in rows if row["value"] > 3} == {}
    made = {row["case"]: row["value"] for row in rows}
    assert 0.9 <= made["dense: server, peak"] <= 1.2, "the new parameters are counted"


def test_a_rank_encodes_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few clients it trains at a time: with the mean's bytes and, but for last bits, its parameters."""
    found: dict[int, Any] = {}
    for values in (1, 1 << 22):
        monkeypatch.setattr(engine, "_CHUNK_VALUES", values)
        simulation = simulate(
            method={"name": "intrinsic", "dim": 40}, local={"lr": 0.1, "steps": 2, "batch": 8}
        )
        encoded, up = [], simulation.method.up
        compress = up.compress
        monkeypatch.setattr(up, "compress", lambda g, *a: (encoded.append(len(g)), compress(g, *a))[1])  # noqa: B023
        lines = [simulation.round(t) for t in range(3)]
        assert encoded == [1, 1, 1]
        found[values] = lines, simulation.replica.parameters()
    (single, theta_1), (together, theta_n) = found.values()
    torch.testing.assert_close(theta_1, theta_n)
    for a, b in zip(single, together, strict=True):
        assert a["upload_bytes"] == b["upload_bytes"]
        assert a["loss"] == pytest.approx(b["loss"])


OPTIONS = [
    *({"name": name, **METHODS[name].example} for name in ("dense", "topk", "fetchsgd", "signsgd", "prune")),
    {"name": "prune", "keep": 0.3, "mask_from": "dense", "inner": {"name": "topk", "ratio": 0.05}},
    {"name": "prune", "mask_from": "client", "inner": {"name": "rtopk", "k": 12}},
    {"name": "topk", "ratio": 0.9},
]


@pytest.mark.parametrize("method", OPTIONS, ids=str)
def test_downloads_are_counted_as_they_would_be_sent(method: dict[str, Any]) -> None:
    simulation = simulate(method=method, cohort=2)
    server = simulation.method.server
    start = server.view(simulation.replica.parameters().clone())
    for t in range(8):
        simulation.round(t)
        state = simulation.replica.state
        versions = range(int(state["version"]) + 1)
        counted = [Bytes.of(message) for message in server.sizes(state, versions)]
        assert counted == [Bytes.of(server.download(state, seen)) for seen in versions]
    view = server.reconcile(start, server.download(state, 0), int(state["version"]))
    assert server.sizes(view, []) == [], "of whoever has only a view, and serves nobody"


def test_rounds_by_hand_are_the_engines() -> None:
    """With all clients in all rounds, and a batch of all their samples, no order is left to chance."""
    for k, method in ((None, {"name": "dense"}), (200, {"name": "topk", "k": 200, "feedback": True})):
        like = rounds.simulation(3, 5, 3, {"steps": 2, "batch": 5}, model="linear", method=method)
        bare = size.ByHand(like, k)
        rounds.Engine(like).rounds(3)
        bare.rounds(3)
        torch.testing.assert_close(bare.theta_D, like.replica.parameters(), rtol=1e-4, atol=1e-6)


def test_what_the_bench_says() -> None:
    rows = [
        size.Measured("codings", "qsgd: encode", 6.0, "memcpy", 15),
        size.Measured("hooks", "bf16", 3, "x", 1.2),
    ]
    found = size.Sizes({"parameters": "2^20"}, rows)
    assert found.missed() == ["hooks: bf16"]
    assert "MISSED" in found.text().splitlines()[-1]
    assert [row["met"] for row in json.loads(found.json())["rows"]] == [True, False]


def test_a_peak_counts_memory_that_was_freed_before() -> None:
    """malloc keeps some of it, which the next vector takes."""
    freed = [torch.ones(1 << 20) for _ in range(40)]
    del freed
    assert size.peak(lambda: torch.ones(1 << 24)) in (None, pytest.approx(1 << 26, rel=0.1))
