"""Parts of a model that travel by methods of their own in one message, buffers, and models that draw random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fedmpi import config, plan, random
from fedmpi.comm import solo
from fedmpi.engine.apart import Apart
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.method import Round
from fedmpi.methods import parse
from fedmpi.methods.play import play

from . import nets
from .conftest import SMALL, model_hash
from .interrupted import only, outcome, train

NET = {**SMALL, "model": {"name": "tests.nets:build"}, "local": {"lr": 0.05, "steps": 2, "batch": 8}}
SAVED = {**NET, "reproducible": True, "checkpoint": {"rounds": 2, "keep": 9}}
TOPK = {"name": "topk", "ratio": 0.2, "feedback": True}
# PowerSGD's two passes beside a majority vote, look-back, a subspace that turns, exact norms and averaged buffers.
SIX = {
    "method": {"name": "lookback", "threshold": 0.5, "inner": TOPK},
    "parts": [
        {"match": "norm.*", "travels": "exact"},
        {"match": "first.weight", "travels": {"name": "powersgd", "rank": 1, "feedback": True}},
        {"match": "middle.*", "travels": {"name": "signsgd"}},
        {"match": "last.weight", "travels": {"name": "intrinsic", "dim": 16, "schedule": "time_varying"}},
    ],
}


def simulation(**changes: Any) -> Simulation:
    return Simulation(config.parse({**NET, **changes}), solo())


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
def test_six_parts_are_one_message_at_any_number_of_ranks(topology: str, tmp_path: Path) -> None:
    values = {**SAVED, **SIX, "topology": topology}
    runs = {n: (tmp_path / str(n), train(values, tmp_path / str(n), ranks=n)) for n in (1, 2, 3)}
    one, expected = runs[1]
    for out, summary in runs.values():
        assert model_hash(out) == model_hash(one)
        for name in ("upload_bytes", "download_bytes", "accuracy"):
            assert summary[name] == expected[name]
    whole = outcome(runs[3][0])
    only(runs[3][0], 2)
    train(values, runs[3][0], ranks=2, resume=True)
    assert outcome(runs[3][0]) == whole


def test_the_parts_of_a_message_are_as_long_as_each_alone() -> None:
    made = simulation(**SIX)
    sent: list[dict[str, int]] = []

    def see(seen: Any) -> None:
        sizes: dict[str, int] = {}
        for name, array in seen.message.arrays.items():
            part = name.partition(".")[0]
            sizes[part] = sizes.get(part, 0) + array.nbytes // seen.message.clients
        sent.append(sizes)

    made.passes.observe = see
    made.round(0)
    first, last = sent[0], sent[-1]
    assert first == {"powersgd": 4 * 12}, "P of a (12, 64) layer at rank 1"
    assert last["exact"] == 4 * 24
    assert last["powersgd"] == 4 * 64
    assert last["signsgd"] == 20  # 156 votes, and a bit that says that no row is without gradient
    assert last["intrinsic"] == 4 * 16
    assert last["buffers"] == 4 * 24
    assert last["counters"] == 4 * 2
    assert set(last) == {"exact", "powersgd", "signsgd", "intrinsic", "lookback", "buffers", "counters"}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("method", [TOPK, "signsgd", {"name": "powersgd", "rank": 1}, "qsgd"], ids=str)
def test_a_part_gives_what_it_gives_alone(method: Any, exact: bool) -> None:
    """The first layer by a method, from equal gradients, with the last one frozen or exact beside it."""
    common = {"reproducible": exact, "model": {"name": "fcn", "hidden": 8}, "method": method}
    made = [simulation(**common, parts=[{"match": "out.*", "travels": way}]) for way in ("frozen", "exact")]
    g_CX = random.normal(random.key(9), 6 * made[1].spec.size).view(6, -1)
    gradients = made[1].spec.views(g_CX)
    for of in made:
        own = torch.cat([gradients[name].flatten(1) for name in of.spec.names], 1)
        of.trainer.train = _given(of, own)  # type: ignore[method-assign]
        for t in range(3):
            of.round(t)
    alone, beside = (of.spec.views(of.replica.parameters()) for of in made)
    assert set(alone) == {"hidden.weight", "hidden.bias"}
    assert all(torch.equal(value, beside[name]) for name, value in alone.items())


def test_a_round_in_one_process_counts_votes_beside_numbers() -> None:
    """play(): the sum of votes, the mean of numbers, the least change of a counter."""
    tensors = plan.Tensors({"a": (2, 3), "b": (2,)}, {"n": ()}, frozenset({"n"}), frozenset())
    method = plan.make(tensors, parse("signsgd"), [plan.Rule(match="b", travels="exact")]).method
    g_CX = torch.tensor([[1.0, 3, *[5.0] * 6, -1], [2.0, 4, *[5.0] * 6, -2], [6.0, 5, *[-5.0] * 6, 0]])
    done = play(method, g_CX, {}, method.server.init(torch.zeros(9)), Round(0, 0, 1.0))[-1]
    assert done.mean_S.tolist() == [3, 4, *[1] * 6, *done.v_CS[:, 8:-1].sum(0).tolist(), -2]
    state = method.server.finish(done.state, done.mean_S, done.ctx.round)
    assert state["theta"].tolist() == [-3, -4, *[-1] * 6, 2]


def _given(of: Simulation, g_CD: Tensor) -> Any:
    """Training that computes these gradients, whoever trains."""
    train = of.trainer.train

    def given(x_X: Tensor, data: Any, partition: Any, clients_C: Tensor, *rest: Any) -> Any:
        return train(x_X, data, partition, clients_C, *rest)._replace(g_CD=g_CD[clients_C])

    return given


def test_batch_norm_is_averaged_as_a_plain_loop_does() -> None:
    """Three rounds of FedAvg over the whole state dict, weighted by samples; counters by their largest."""
    made = simulation(cohort=6, model={"name": "tests.nets:build", "p": 0.0}, rounds=3)
    plain = nets.build((1, 8, 8), 10, p=0.0)
    assert isinstance(plain, nets.Net)
    plain.load_state_dict(nets.build((1, 8, 8), 10, p=0.0).state_dict())
    start = made.spec.views(made.replica.parameters())
    state = {name: start[name].clone() for name in plain.state_dict()}
    sizes = made.partition.sizes.double()
    for t in range(3):
        states = []
        for client in range(6):
            plain.load_state_dict(state)
            plain.train()
            optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
            index = made.partition.of(client)
            for step in range(2):
                chosen = made.trainer._orders.batch(index, min(8, len(index)), client, t, step)
                optimizer.zero_grad()
                F.cross_entropy(plain(made.data.train.x[chosen]), made.data.train.y[chosen]).backward()
                optimizer.step()
            states.append({name: value.clone() for name, value in plain.state_dict().items()})
        weights = (sizes / sizes.sum()).tolist()
        state = {
            name: sum(w * s[name] for w, s in zip(weights, states, strict=True))  # type: ignore[misc]
            if value.is_floating_point()
            else torch.stack([s[name] for s in states]).amax(0)
            for name, value in states[0].items()
        }
        made.round(t)
    got = made.spec.views(made.replica.parameters())
    for name, value in state.items():
        torch.testing.assert_close(got[name], value.float(), rtol=1e-4, atol=1e-5)
    assert float(got["steps"]) == float(got["norm.num_batches_tracked"]) == 6


def test_the_saved_model_loads_strictly(tmp_path: Path) -> None:
    values = {
        **SAVED,
        "parts": [{"match": "middle.*", "travels": "frozen"}, {"match": "norm.bias", "travels": "local"}],
    }
    train({**values, "client_test": 0.2}, tmp_path)
    model, fresh = (nets.build((1, 8, 8), 10) for _ in range(2))
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert isinstance(model, nets.Net)
    assert int(model.steps) == 10, "two steps a round; who came least has seen fewer"
    made = simulation(**values, client_test=0.2)
    assert "middle.weight" not in made.spec.names
    assert isinstance(fresh, nets.Net)
    held = load_file(tmp_path / "model.safetensors")["middle.weight"]
    assert torch.equal(held, made.trainer.model.state_dict()["middle.weight"])


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
def test_local_parts_stay_with_their_clients(topology: str, tmp_path: Path) -> None:
    """The same at any number of ranks, and after a resume at another; nothing of them travels."""
    rules = [{"match": "norm.*", "travels": "local"}, {"match": "last.*", "travels": "local"}]
    values = {**SAVED, "topology": topology, "parts": rules, "client_test": 0.25}
    summaries = [train(values, tmp_path / str(n), ranks=n) for n in (1, 3)]
    assert outcome(tmp_path / "1") == outcome(tmp_path / "3")
    assert summaries[0]["upload_bytes"] == summaries[0]["messages"] * 4 * (64 * 12 + 12 + 12 * 12 + 12 + 1)
    whole = outcome(tmp_path / "3")
    only(tmp_path / "3", 2)
    train(values, tmp_path / "3", ranks=2, resume=True)
    assert outcome(tmp_path / "3") == whole


def test_each_client_goes_on_with_its_own() -> None:
    made = simulation(
        cohort=6,
        evaluate_every=1,
        client_test=0.25,
        parts=[{"match": "last.*", "travels": "local"}],
        on_bad_update="reject",
    )
    made.round(0)
    ids = torch.arange(6)
    kept = made.own.get(ids)["local"]
    assert len(kept.unique(dim=0)) == 6
    update = made.trainer.train(
        made.replica.parameters(), made.data.train, made.partition, ids, 1, None, {"local": kept}
    )
    made.round(1)
    assert torch.equal(made.own.get(ids)["local"], update.kept["local"])
    assert 0 <= made.measures["client_worst"] <= made.measures["client_accuracy"] <= 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"match": "lats.*", "travels": "exact"}]}, r"parts\.match: 'lats\.\*' fits none of"),
        ({"parts": [{"match": "< x", "travels": "exact"}]}, 'parts.match: expected "< 1024"'),
        ({"parts": [{"match": "last.*", "travels": "local"}]}, "expected client_test"),
        ({"parts": [{"match": "*", "travels": "frozen"}]}, "expected a parameter that travels"),
        ({"parts": [{"match": "last.*", "travels": "topq"}]}, "topq"),
        ({"parts": [{"match": "buffers", "travels": "topk"}]}, "does not go with the buffer"),
        ({"local": {"lr": 0.05, "batch": 1}}, "batch norm takes two or more a step"),
        ({"client_test": 0.001}, "expected a share that leaves some client a sample"),
        (
            {"server": {"aggregate": "median"}, "topology": "aggregator"},
            "server.aggregate: median does not work with",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation(**changes).round(0)


def test_a_buffer_that_changes_later_is_named() -> None:
    made = simulation(model={"name": "tests.nets:build"}, parts=[])
    made.trainer.model.register_buffer("later", torch.zeros(2))
    apart = Apart(made.trainer.model, made.plan)
    x_X = made.replica.parameters()
    start = apart.begin(x_X)
    made.trainer.model.later += 1  # type: ignore[operator]
    with pytest.raises(
        ConfigError, match=r"its buffer later changed in training.*match: later, travels: exact"
    ):
        apart.end(x_X, torch.zeros_like(start), start)


def test_rules_take_the_first_that_fits() -> None:
    tensors = plan.Tensors.of(nets.build((64,), 10), ("norm.running_mean", "steps"))
    rules = [
        plan.Rule.model_validate(rule)
        for rule in (
            {"match": "biases", "travels": "exact"},
            {"match": "norms", "travels": "local"},
            {"match": "< 150", "travels": "signsgd"},
            {"match": "first.*", "travels": "frozen"},
        )
    ]
    made = plan.make(tensors, parse("topk"), rules)
    assert {p.name: p.spec.names for p in made.parts} == {
        "exact": ("first.bias", "norm.bias", "middle.bias", "last.bias"),
        "signsgd": ("middle.weight", "last.weight"),
        "buffers": ("norm.running_mean",),
        "counters": ("steps",),
    }
    assert made.local.names == ("norm.weight",)
    assert made.frozen == {"first.weight"}
