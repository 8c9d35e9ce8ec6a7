"""Numbers that go wrong: rejected, clipped, voted down; zero gradients and clients without data."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import config
from fedmpi.comm import Comm, run_ranks, solo
from fedmpi.config import ServerConfig
from fedmpi.engine.clients import cohort
from fedmpi.engine.ordered import Ordered
from fedmpi.engine.rounds import Simulation
from fedmpi.engine.run import run
from fedmpi.engine.summary import summary
from fedmpi.errors import ConfigError, NumericalError
from fedmpi.methods import METHODS
from fedmpi.tasks.data import Split

from .codecs import codec, context
from .conftest import JOBS, SMALL, Mpi
from .jobs.runs import both_ends_agree

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
        return lines, simulation.topology.parameters(), found["upload_bytes"]

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
    assert torch.allclose(without.topology.parameters(), theta, rtol=0, atol=1e-6)
    assert without.upload_bytes == uploaded


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
    assert bool(simulation.topology.parameters().isfinite().all())
    assert simulation.ledger.upload.tolist().count(0) == 1


def test_what_an_exact_sum_cannot_hold_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(REJECT)
    theta = simulation.topology.parameters()
    monkeypatch.setattr("fedmpi.engine.sums.LARGEST", 1e-3)
    assert simulation.round(0)["rejected"] == 4
    assert torch.equal(simulation.topology.parameters(), theta)
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
        before = simulation.topology.parameters().clone()
        seen = int(simulation.topology.state["version"])
        start = server.view(simulate(values).topology.parameters()) if t == 0 else views[seen]
        if t in (1, 2):
            poison(simulation, range(4))
        line = simulation.round(t)
        simulation.data = good
        state = simulation.topology.state
        if t in (1, 2):
            assert (line["clients"], line["rejected"], line["upload_bytes"]) == (0, 2, 0)
            assert line["loss"] is None
            assert torch.equal(simulation.topology.parameters(), before)
        else:
            assert line["clients"] == 2
            assert not torch.equal(simulation.topology.parameters(), before)
        if "varying" in name:  # clients change their subspace with the epoch, whatever came of its last round
            assert int(state["epoch"]) == (t + 1) // 2
        views.setdefault(seen, start)
        now = int(state["version"])
        views[now] = server.reconcile(copy.deepcopy(start), server.download(state, seen), now)
    now = int(simulation.topology.state["version"])
    for seen, view in views.items():
        caught_up = server.reconcile(view, server.download(simulation.topology.state, seen), now)
        assert torch.equal(server.parameters(caught_up), simulation.topology.parameters()), seen
        for shared, value in server.shared(caught_up).items():
            assert torch.equal(value, server.shared(simulation.topology.state)[shared])


def test_a_second_pass_without_a_usable_message_undoes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate({**REJECT, "method": SOME["powersgd"]})
    up, before = simulation.method.up, dict(simulation.topology.state)
    monkeypatch.setattr(
        "fedmpi.engine.updates.fits", lambda codec, *rest: torch.full((len(rest[-1]),), codec is not up)
    )
    assert simulation.round(0)["rejected"] == 4
    after = simulation.topology.state
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
        return simulation.topology.parameters()

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
    digest = hashlib.sha256(alone.topology.parameters().numpy().tobytes()).hexdigest()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    done = mpi(3, str(JOBS / "poison.py"), str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert lines == [f"rank {r}: rejected {alone.counts['rejected']}, {digest}" for r in range(3)]


def test_data_parallel_training_stops() -> None:
    values = {**SMALL, "mode": "data_parallel", "on_bad_update": "reject", "local": {"lr": 0.1}}
    with pytest.raises(ConfigError, match=r"on_bad_update: expected stop .* with mode: data_parallel"):
        config.parse({**values, "cohort": None})


# Clipping.


def spy_means(simulation: Simulation) -> list[torch.Tensor]:
    means: list[torch.Tensor] = []
    finish = simulation.method.server.finish

    def spy(state: Any, mean_S: torch.Tensor, round: Any) -> Any:
        means.append(mean_S)
        return finish(state, mean_S, round)

    simulation.method.server.finish = spy  # type: ignore[method-assign]
    return means


def test_longer_gradients_are_shortened_and_counted() -> None:
    plain, clipped = simulate(SMALL), simulate({**SMALL, "clip": {"norm": 0.9}})
    clients = cohort(plain.config, plain.partition, 0)
    weights = plain.partition.sizes[clients].double()
    update = plain.trainer.train(plain.topology.parameters(), plain.data.train, plain.partition, clients, 0)
    norms = update.g_CD.double().norm(dim=1)
    assert bool((norms > 0.9).any())
    factors = (0.9 / norms).clamp(max=1)
    expected = ((weights / weights.sum() * factors)[:, None] * update.g_CD).sum(0)
    means = spy_means(clipped)
    line = clipped.round(0)
    assert torch.allclose(means[0].double(), expected, atol=1e-6)
    assert line["clipped"] == int((norms > 0.9).sum()) == summary(clipped)["clipped"]


def test_clipping_counts_once_in_two_passes_and_leaves_short_ones() -> None:
    values = {**SMALL, "method": SOME["powersgd"]}
    assert simulate({**values, "clip": {"norm": 1e-3}}).round(0)["clipped"] == 4
    far, plain = simulate({**values, "clip": {"norm": 1e6}}), simulate(values)
    assert far.round(0)["clipped"] == 0
    plain.round(0)
    assert torch.equal(far.topology.parameters(), plain.topology.parameters())


# Trimmed mean and median.


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12), st.floats(0, 0.49), st.sampled_from(["median", "trimmed_mean"]), st.integers(0, 99)
)
def test_ordered_sums_against_numpy(clients: int, trim: float, rule: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(clients, 7)).astype(np.float32)
    rows[rng.integers(clients)] *= 1e6
    total = Ordered(ServerConfig.model_validate({"aggregate": rule, "trim": trim}), 7, clients)
    for part in torch.from_numpy(rows).split(3):
        total.add(part, torch.ones(len(part), dtype=torch.float64))
    if rule == "median":
        expected = np.median(rows.astype(np.float64), axis=0)
    else:
        cut = math.floor(trim * clients + 1e-9)
        expected = np.sort(rows.astype(np.float64), axis=0)[cut : clients - cut].mean(0)
    assert np.allclose(total.value().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_ordered_sums_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpi.engine.ordered._BLOCK_VALUES", 10)
    v_CS = torch.arange(35.0).view(5, 7).flip(0)
    total = Ordered(ServerConfig.model_validate({"aggregate": "median"}), 7, 5)
    total.add(v_CS, torch.ones(5))
    assert torch.equal(total.value(), torch.arange(14.0, 21.0))


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("dense", "median"),
        ("bf16", "trimmed_mean"),
        ({"name": "topk", "ratio": 0.9}, "trimmed_mean"),
        ("lookback", "median"),
    ],
)
def test_a_few_wrong_clients_hardly_matter(method: Any, rule: str) -> None:
    """Two of eight send ten thousand times too much, in the wrong direction."""
    server = {"aggregate": rule, "trim": 0.3}
    values = {**SMALL, "clients": 8, "cohort": None, "partition": "iid", "topology": "aggregator"}
    values |= {"method": method, "rounds": 8, "reproducible": True}
    values |= {"local": {"lr": 0.3, "steps": 2, "batch": 20}, "evaluate_every": 8}

    def accuracy(values: dict[str, Any], comm: Comm) -> tuple[float, torch.Tensor]:
        simulation = simulate(values, comm)
        train = simulation.trainer.train

        def attack(theta: Any, data: Any, partition: Any, clients_C: torch.Tensor, *rest: Any) -> Any:
            update = train(theta, data, partition, clients_C, *rest)
            return update._replace(g_CD=torch.where(clients_C[:, None] < 2, -1e4, 1.0) * update.g_CD)

        simulation.trainer.train = attack  # type: ignore[method-assign]
        for t in range(8):
            simulation.round(t)
        return simulation.accuracy, simulation.topology.parameters()

    attacked, theta = accuracy({**values, "server": server}, solo())
    assert attacked > 0.8 > 0.5 > accuracy(values, solo())[0]
    for _, theirs in run_ranks(2, lambda comm: accuracy({**values, "server": server}, comm), timeout=60):
        assert torch.equal(theirs, theta)


@pytest.mark.parametrize("name", ["signsgd", "fetchsgd", "powersgd", "intrinsic", "prune of clients"])
def test_what_cannot_be_ordered_is_named(name: str) -> None:
    method = {**SOME, **CASES}[name]
    values = {**SMALL, "method": method, "topology": "aggregator", "server": {"aggregate": "median"}}
    with pytest.raises(ConfigError, match=r"server.aggregate: median needs a method whose message decodes"):
        simulate(values)


@pytest.mark.parametrize("changes", [{"topology": "allreduce"}, {"mode": "data_parallel", "cohort": None}])
def test_ranks_that_add_up_before_they_meet_cannot_order(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"server.aggregate: expected mean with topology: allreduce, whose"):
        config.parse({**SMALL, "local": {"lr": 1.0}, **changes, "server": {"aggregate": "median"}})


# Clients without data, gradients of zeros.


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
            theta = simulation.topology.parameters().clone()
            line = simulation.round(t)
            assert line["empty"] == int((sizes[called] == 0).sum())
            assert line["clients"] <= 2 - line["empty"]
            if line["empty"] == 2:
                nobody += 1
                assert torch.equal(simulation.topology.parameters(), theta)
        assert simulation.ledger.upload[sizes == 0].sum() == 0
        both_ends_agree(simulation)
        return nobody, simulation.topology.parameters().tolist(), summary(simulation)["empty"]

    alone = main(solo())
    assert alone[0] > 0
    assert run_ranks(3, main, timeout=60) == [alone] * 3


def test_data_parallel_training_needs_samples_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = {"name": "dirichlet", "alpha": 1e-3, "minimum": 0}
    values = {**SMALL, "mode": "data_parallel", "cohort": None, "local": {"lr": 0.1}, "partition": partition}
    with pytest.raises(ConfigError, match=r"partition.minimum: expected at least 1 with mode: data_parallel"):
        simulate({**values, "clients": 20})


def test_a_zero_gradient_is_sent_in_full_by_look_back() -> None:
    """ρ and α have no value where either vector is zero; nothing that is not a number comes of it."""
    up = codec("lookback", 5, threshold=1.0)
    zero, g = torch.zeros(1, 5), torch.tensor([[1.0, -2.0, 0.0, 3.0, 0.5]])
    state, peer = ({n: v[None] for n, v in made.items()} for made in (up.init(), up.init_peer()))
    scalars: list[int] = []
    steps: list[Callable[[], torch.Tensor]] = [lambda: g, lambda: zero, lambda: g, lambda: 2 * g]
    for t, step in enumerate(steps):
        message, state = up.compress(step(), state, context(1, t))
        v, peer = up.decompress(message, peer, context(1, t))
        scalars.append(int(message.arrays["scalar"]))
        assert torch.equal(v, step())
        assert torch.equal(state["lookback"], peer["lookback"])
    assert scalars == [0, 0, 0, 1]


def test_a_look_back_coefficient_that_no_float32_holds_is_not_sent() -> None:
    up = codec("lookback", 3, threshold=1.0)
    state = {n: v[None] for n, v in up.init().items()}
    _, state = up.compress(torch.full((1, 3), 1e-20), state, context(1))
    message, after = up.compress(torch.full((1, 3), 1e20), state, context(1, 1))
    assert int(message.arrays["scalar"]) == 0
    v, _ = up.decompress(message, state, context(1, 1))
    assert torch.equal(v, torch.full((1, 3), 1e20))
    assert torch.equal(after["lookback"], v)


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_a_sign_vector_of_zeros_is_coins(vote: str) -> None:
    up = codec("signsgd", 4096, vote=vote)
    message, _ = up.compress(torch.zeros(2, 4096), {}, context(2))
    again, _ = up.compress(torch.zeros(2, 4096), {}, context(2))
    v, _ = up.decompress(message, {}, context(2))
    if vote == "mean":
        assert not bool(v.any()), "their scale is zero, too"
        return
    assert torch.equal(message.arrays["signs"], again.arrays["signs"])
    assert v.abs().unique().tolist() == [1]
    assert bool((v.float().mean(1).abs() < 0.08).all())
    assert not torch.equal(v[0], v[1]), "each client has its own"
