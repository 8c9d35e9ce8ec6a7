"""Numbers that go wrong: rejected or clipped; clients without data."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi import config
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.engine.clients import cohort
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.engine.summary import summary
from fedmpi.errors import ConfigError, NumericalError
from fedmpi.methods import METHODS
from fedmpi.tasks.data import Split

from .codecs import means
from .conftest import JOBS, SMALL, Mpi, write_config
from .jobs.runs import both_ends_agree
from .softmax import assert_same_sums

REJECT = {**SMALL, "on_bad_update": "reject", "reproducible": True}
TOPK = {"name": "topk", "feedback": True, "ratio": 0.05}
SOME: dict[str, Any] = {
    "dense": "dense",
    "topk": TOPK,
    "signsgd": "signsgd",
    "lookback over topk": {"name": "lookback", "threshold": 0.9, "inner": TOPK},
    "fetchsgd": {"name": "fetchsgd", "rows": 3, "columns": 40, "k": 20},
    "powersgd": {"name": "powersgd", "rank": 2, "feedback": True},
}
BAD = 4  # the client that goes wrong


def poison(simulation: Simulation, clients: Iterable[int], value: float = math.nan) -> None:
    """From now on these clients' data hold ``value``."""
    train = simulation.data.train
    x = train.x.clone()
    for client in clients:
        x[simulation.partition.of(client)] = value
    simulation.data = simulation.data._replace(train=Split(x, train.y))


def simulate(values: dict[str, Any], comm: Comm | None = None) -> Simulation:
    torch.set_num_threads(1)
    return Simulation(config.parse(values), comm or solo())


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        pytest.param(name, topology, marks=[pytest.mark.slow] if (i + j) % 2 else [])
        for i, name in enumerate(SOME)
        for j, topology in enumerate(("allreduce", "aggregator"))
    ],
)
def test_one_poisoned_client_does_not_poison_the_model(
    name: str, topology: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is as if its messages had been lost, on any number of ranks, and it keeps what it had."""
    values = {**REJECT, "method": SOME[name], "topology": topology}

    def main(comm: Comm) -> tuple[list[dict[str, Any]], torch.Tensor, int]:
        simulation = simulate(values, comm)
        fresh = simulation.clients.get(torch.tensor([BAD])) if not simulation.clients.empty else {}
        poison(simulation, [BAD])
        lines = [simulation.round(t) for t in range(5)]
        after = simulation.clients.get(torch.tensor([BAD])) if not simulation.clients.empty else {}
        assert all(torch.equal(after[n], fresh[n]) for n in fresh)
        both_ends_agree(simulation)
        assert int(simulation.ledger.upload[BAD]) == 0
        found = summary(simulation)
        assert found["rejected"] == sum(line["rejected"] for line in lines) > 0
        assert found["messages"] == 20 - found["rejected"]
        return lines, simulation.replica.parameters(), found["upload_bytes"]

    lines, theta, uploaded = main(solo())
    parsed, partition = config.parse(values), simulate(values).partition
    for t, line in enumerate(lines):
        assert line["rejected"] == int(BAD in cohort(parsed, partition, t).tolist())
        assert line["clients"] == 4 - line["rejected"]
        assert math.isfinite(line["loss"])
    for other, theirs, sent in run_ranks(3, main, timeout=60):
        assert torch.equal(theirs, theta)
        assert sent == uploaded
        assert [line["loss"] for line in other] == [line["loss"] for line in lines]

    monkeypatch.setattr("fedmpi.engine.rounds.survivors", lambda config, called, t: called[called != BAD])
    without = simulate({**values, "on_bad_update": "stop"})
    for t in range(5):
        assert without.round(t)["loss"] == pytest.approx(lines[t]["loss"], rel=1e-6)
    assert torch.allclose(without.replica.parameters(), theta, rtol=0, atol=1e-6)
    assert without.bytes["upload"] == uploaded


@pytest.mark.parametrize("name", ["topk", "lookback over topk", "powersgd", "fp16"])
def test_a_message_that_is_not_a_number_is_rejected(name: str) -> None:
    """The gradient is one, but what the client still has to send is not (fp16 sends a number all the same, and would
    keep none); several clients share a call."""
    method = SOME.get(name, {"name": name, "feedback": True})
    simulation = simulate({**REJECT, "method": method, "reproducible": False, "cohort": None})
    assert simulation.chunk > 5
    one = torch.tensor([BAD])
    state = simulation.clients.get(one)
    (residual,) = (n for n in state if n.endswith("residual"))
    state[residual][0, 7] = math.inf
    simulation.clients.put(one, state)
    lines = [simulation.round(t) for t in range(2)]
    assert [line["rejected"] for line in lines] == [1, 1]
    assert torch.equal(simulation.clients.get(one)[residual], state[residual])
    assert bool(simulation.replica.parameters().isfinite().all())
    assert simulation.ledger.upload.tolist().count(0) == 1


def test_what_an_exact_sum_cannot_hold_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(REJECT)
    theta = simulation.replica.parameters()
    monkeypatch.setattr("fedmpi.meet.sums.LARGEST", 1e-3)
    assert simulation.round(0)["rejected"] == 4
    assert torch.equal(simulation.replica.parameters(), theta)
    with pytest.raises(NumericalError, match="reproducible: expected weighted values"):
        simulate({**REJECT, "on_bad_update": "stop"}).round(0)


def cases() -> dict[str, Any]:
    found = {}
    for name, entry in METHODS.items():
        found[name] = {"name": name, **entry.example}
        found |= {f"{name} {variant}": found[name] | more for variant, more in entry.variants.items()}
    found["lookback clustered over time-varying"] = {
        "name": "lookback",
        "keep": "clustered",
        "inner": {"name": "intrinsic", "dim": 64, "schedule": "time_varying"},
    }
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_a_round_without_a_usable_update_does_nothing(name: str) -> None:
    """Rounds 1 and 2 of epochs of two are lost, so an end of an epoch and a start; clients catch up all the same."""
    values = {**REJECT, "method": CASES[name], "clients": 4, "cohort": 2, "sampling": "epoch_shuffle"}
    simulation = simulate(values)
    server, good = simulation.method.server, simulation.data
    views = {}
    for t in range(5):
        before = simulation.replica.parameters().clone()
        seen = int(simulation.replica.state["version"])
        start = server.view(simulate(values).replica.parameters()) if t == 0 else views[seen]
        if t in (1, 2):
            poison(simulation, range(4))
        line = simulation.round(t)
        simulation.data = good
        state = simulation.replica.state
        if t in (1, 2):
            assert (line["clients"], line["rejected"], line["upload_bytes"]) == (0, 2, 0)
            assert line["loss"] is None
            assert torch.equal(simulation.replica.parameters(), before)
        else:
            assert line["clients"] == 2
            assert not torch.equal(simulation.replica.parameters(), before)
        if "varying" in name:  # clients change their subspace with the epoch, whatever came of its last round
            assert int(state["epoch"]) == (t + 1) // 2
        views.setdefault(seen, start)
        now = int(state["version"])
        views[now] = server.reconcile(copy.deepcopy(start), server.download(state, seen), now)
    now = int(simulation.replica.state["version"])
    for seen, view in views.items():
        caught_up = server.reconcile(view, server.download(simulation.replica.state, seen), now)
        assert torch.equal(server.parameters(caught_up), simulation.replica.parameters()), seen
        for shared, value in server.shared(caught_up).items():
            assert torch.equal(value, server.shared(simulation.replica.state)[shared])


def test_a_second_pass_without_a_usable_message_undoes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate({**REJECT, "method": SOME["powersgd"]})
    up, before = simulation.method.up, dict(simulation.replica.state)
    monkeypatch.setattr(
        "fedmpi.engine.updates.fits", lambda codec, *rest: torch.full((len(rest[-1]),), codec is not up)
    )
    assert simulation.round(0)["rejected"] == 4
    after = simulation.replica.state
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("schedule", ["static", "time_varying"])
def test_other_ranks_follow_an_aggregator_that_got_nothing(schedule: str) -> None:
    method = {"name": "intrinsic", "dim": 64, "schedule": schedule}
    values = {**REJECT, "method": method, "clients": 4, "cohort": 2, "topology": "aggregator"}

    def main(comm: Comm) -> torch.Tensor:
        simulation = simulate(values, comm)
        good = simulation.data
        for t in range(5):
            if t in (1, 2):
                poison(simulation, range(4))
            simulation.round(t)
            simulation.data = good
        return simulation.replica.parameters()

    alone = main(solo())
    assert all(torch.equal(theirs, alone) for theirs in run_ranks(3, main, timeout=60))


def test_a_round_that_did_nothing_is_said_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Simulation.__init__

    def poisoned(self: Simulation, *arguments: Any) -> None:
        init(self, *arguments)
        poison(self, range(6))

    monkeypatch.setattr(Simulation, "__init__", poisoned)
    summary = run(config.parse({**REJECT, "rounds": 2}), solo(), tmp_path / "out")
    assert (summary["rejected"], summary["messages"], summary["upload_ratio"]) == (8, 0, None)
    said = capsys.readouterr()
    assert "round 1: no message that counts, the model stays as it was" in said.err + said.out
    assert '"loss": null' in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("name", SOME)
def test_processes_reject_alike(name: str, topology: str, mpi: Mpi, tmp_path: Path) -> None:
    values = {**REJECT, "method": SOME[name], "topology": topology}
    alone = simulate(values)
    poison(alone, [BAD])
    for t in range(5):
        alone.round(t)
    digest = hashlib.sha256(alone.replica.parameters().numpy().tobytes()).hexdigest()
    done = mpi(3, str(JOBS / "poison.py"), write_config(tmp_path, values))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert lines == [f"rank {r}: rejected {alone.counts['rejected']}, {digest}" for r in range(3)]


def test_data_parallel_training_stops() -> None:
    values = {**SMALL, "mode": "data_parallel", "on_bad_update": "reject", "local": {"lr": 0.1}}
    with pytest.raises(ConfigError, match=r"on_bad_update: expected stop .* with mode: data_parallel"):
        config.parse({**values, "cohort": None})


# Clipping.


def test_longer_gradients_are_shortened_and_counted() -> None:
    plain, clipped = simulate(SMALL), simulate({**SMALL, "clip": {"norm": 0.9}})
    clients = cohort(plain.config, plain.partition, 0)
    weights = plain.partition.sizes[clients].double()
    update = plain.trainer.train(plain.replica.parameters(), plain.data.train, plain.partition, clients, 0)
    norms = update.g_CD.double().norm(dim=1)
    assert bool((norms > 0.9).any())
    factors = (0.9 / norms).clamp(max=1)
    expected = ((weights / weights.sum() * factors)[:, None] * update.g_CD).sum(0)
    got = means(clipped)
    line = clipped.round(0)
    assert torch.allclose(got[0].double(), expected, atol=1e-6)
    assert line["clipped"] == int((norms > 0.9).sum()) == summary(clipped)["clipped"]


def test_clipping_counts_once_in_two_passes_and_leaves_short_ones() -> None:
    values = {**SMALL, "method": SOME["powersgd"]}
    assert simulate({**values, "clip": {"norm": 1e-3}}).round(0)["clipped"] == 4
    far, plain = simulate({**values, "clip": {"norm": 1e6}}), simulate(values)
    assert far.round(0)["clipped"] == 0
    plain.round(0)
    assert_same_sums(far.replica.parameters(), plain.replica.parameters(), terms=2 * 1437)


# Clients without data.


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize("method", ["dense", "lookback", "signsgd"])
def test_a_client_without_samples_sends_nothing(method: str, topology: str) -> None:
    values = {**REJECT, "method": method, "topology": topology, "clients": 60, "cohort": 2, "dropout": 0.3}
    values |= {"partition": {"name": "dirichlet", "alpha": 0.01, "minimum": 0}, "on_bad_update": "stop"}

    def main(comm: Comm) -> tuple[Any, ...]:
        simulation = simulate(values, comm)
        sizes, nobody = simulation.partition.sizes, 0
        assert int((sizes == 0).sum()) > 10
        for t in range(8):
            called = cohort(simulation.config, simulation.partition, t)
            theta = simulation.replica.parameters().clone()
            line = simulation.round(t)
            assert line["empty"] == int((sizes[called] == 0).sum())
            assert line["clients"] <= 2 - line["empty"]
            if line["empty"] == 2:
                nobody += 1
                assert torch.equal(simulation.replica.parameters(), theta)
        assert simulation.ledger.upload[sizes == 0].sum() == 0
        both_ends_agree(simulation)
        return nobody, simulation.replica.parameters().tolist(), summary(simulation)["empty"]

    alone = main(solo())
    assert alone[0] > 0
    assert run_ranks(3, main, timeout=60) == [alone] * 3


def test_data_parallel_training_needs_samples_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = {"name": "dirichlet", "alpha": 1e-3, "minimum": 0}
    values = {**SMALL, "mode": "data_parallel", "cohort": None, "local": {"lr": 0.1}, "partition": partition}
    with pytest.raises(ConfigError, match=r"partition.minimum: expected at least 1 with mode: data_parallel"):
        simulate({**values, "clients": 20})
