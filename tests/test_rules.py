"""Clients' rules against plain torch: twenty rounds, ‖θ − θ_ref‖ small beside what training changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.batches import local_steps
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError

from . import nets
from .conftest import SMALL
from .interrupted import check_the_same

ROUNDS = 20
RUN = {
    **SMALL,
    "model": {"name": "fcn", "hidden": 8},
    "rounds": ROUNDS,
    "local": {"lr": 0.05, "steps": 3, "batch": 10},
    "evaluate_every": ROUNDS,
}
Weights = dict[str, Tensor]


def simulation(changes: dict[str, Any]) -> Simulation:
    local = {**RUN["local"], **changes.get("local", {})}
    return Simulation(config.parse({**RUN, **changes, "local": local}), solo())


class Reference:
    """Federated averaging by torch alone, over the state dict of one model.

    Attributes:
      x: what all share; ``own``: what each client keeps of it instead.
      memory: whatever a step needs to keep, by client.
    """

    def __init__(
        self, of: Simulation, model: nn.Module, keeps: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.of, self.model, self.keeps = of, model, keeps
        start = of.trainer.load(of.replica.parameters()).state_dict()
        self.x: Weights = {name: value.clone() for name, value in start.items()}
        self.start = {name: value.clone() for name, value in self.x.items()}
        self.own: dict[int, Weights] = {}
        self.memory: dict[int, Any] = {}

    def batches(self, client: int, t: int) -> list[tuple[Tensor, Tensor]]:
        of, index = self.of, self.of.partition.of(client)
        size = min(10, len(index))
        steps = int(local_steps(of.config.local, torch.tensor(len(index))))
        chosen = [of.trainer._orders.batch(index, size, client, t, step) for step in range(steps)]
        return [(of.data.train.x[i], of.data.train.y[i]) for i in chosen]

    def client(self, client: int, t: int, optimizer: Any, extra: Any = None) -> Weights:
        """The state dict after a client's steps."""
        self.model.load_state_dict({**self.x, **self.own.get(client, {})})
        self.model.train()
        made = optimizer(self.model.parameters())
        if client in self.memory and isinstance(self.memory[client], dict) and "state" in self.memory[client]:
            made.load_state_dict(self.memory[client])
        for x, y in self.batches(client, t):
            made.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            if extra is not None:
                loss = loss + extra(self.model, client)
            loss.backward()
            made.step()
        self.last = made
        after = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.own[client] = {name: value for name, value in after.items() if self.keeps(name)}
        return after

    def average(self, states: list[Weights], weights: list[float]) -> Weights:
        return {
            name: self.start[name]
            if self.keeps(name)
            else sum(w * s[name] for w, s in zip(weights, states, strict=True))  # type: ignore[misc]
            if value.is_floating_point()
            else torch.stack([s[name] for s in states]).amax(0)
            for name, value in states[0].items()
        }

    def near(self, share: float = 1e-4) -> None:
        got = self.of.trainer.load(self.of.replica.parameters()).state_dict()
        far = moved = 0.0
        for name, value in self.x.items():
            if value.is_floating_point() and not self.keeps(name):
                far += float((got[name].double() - value.double()).square().sum())
                moved += float((value.double() - self.start[name].double()).square().sum())
        assert far**0.5 <= share * moved**0.5, (far**0.5, moved**0.5)


def fcn(of: Simulation) -> nn.Module:
    from fedmpi.tasks import models

    return models.build("fcn", (1, 8, 8), 10, 0, hidden=8)


def sgd(**options: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, **options)


def run(of: Simulation, reference: Reference, optimizer: Any, extra: Any = None) -> None:
    """FedAvg of both."""
    for t in range(ROUNDS):
        call = of.call(t)
        states = [reference.client(client, t, optimizer, extra) for client in call.clients.tolist()]
        reference.x = reference.average(states, call.weights.tolist())
        of.round(t)


ADAMW = {"lr": 0.01, "optimizer": "adamw", "weight_decay": 0.1}
CASES: dict[str, tuple[dict[str, Any], Any, float]] = {
    "momentum and decay": (
        {"momentum": 0.9, "weight_decay": 0.01},
        sgd(momentum=0.9, weight_decay=0.01),
        1e-4,
    ),
    "nesterov": ({"optimizer": "nesterov", "momentum": 0.9}, sgd(momentum=0.9, nesterov=True), 1e-4),
    "adamw": (ADAMW, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), 1e-3),
    "adam": (
        {**ADAMW, "optimizer": "adam"},
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        1e-3,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("together", [False, True])
def test_a_rule_is_torch_s(case: str, together: bool) -> None:
    local, optimizer, share = CASES[case]
    of = simulation({"local": local})
    of.trainer.together = together
    reference = Reference(of, fcn(of))
    run(of, reference, optimizer)
    reference.near(share)


def test_a_kept_memory_is_each_client_s() -> None:
    of = simulation({"local": {**ADAMW, "keep": True}})
    reference = Reference(of, fcn(of))
    for t in range(ROUNDS):
        call, states = of.call(t), []
        for client in call.clients.tolist():
            states.append(
                reference.client(client, t, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
            )
            reference.memory[client] = reference.last.state_dict()
        reference.x = reference.average(states, call.weights.tolist())
        of.round(t)
    reference.near(1e-3)


def test_fedprox() -> None:
    of = simulation({"local": {"mu": 0.5}})
    reference = Reference(of, fcn(of))

    def proximal(model: nn.Module, client: int) -> Tensor:
        return sum(  # type: ignore[return-value]
            0.25 * (p - reference.x[name]).square().sum() for name, p in model.named_parameters()
        )

    run(of, reference, sgd(), proximal)
    reference.near()


def test_scaffold() -> None:
    """Option II, with x averaged by samples; c moves by the mean change over all clients, whoever sent."""
    of = simulation({"local": {"scaffold": "exact"}})
    reference, clients = Reference(of, fcn(of)), 6
    model = reference.model
    c = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    own = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(clients)]
    for t in range(ROUNDS):
        call, states, changes = of.call(t), [], []
        for client in call.clients.tolist():
            model.load_state_dict(reference.x)
            batches = reference.batches(client, t)
            for x, y in batches:
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        assert p.grad is not None
                        p -= 0.05 * (p.grad - own[client][name] + c[name])
            after = {name: p.detach().clone() for name, p in model.named_parameters()}
            step = 0.05 * len(batches)
            new = {n: own[client][n] - c[n] + (reference.x[n] - p) / step for n, p in after.items()}
            states.append(after)
            changes.append({n: new[n] - own[client][n] for n in new})
            own[client] = new
        c = {n: c[n] + sum(change[n] for change in changes) / clients for n in c}
        reference.x = reference.average(states, call.weights.tolist())
        of.round(t)
    reference.near()
    kept = of.own.get(torch.arange(clients))["control"]
    expected = torch.stack([of.plan.trained.flatten(weights) for weights in own])
    assert float((kept - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("travels", [{"name": "topk", "ratio": 0.3}, {"name": "qsgd", "bits": 4}], ids=str)
def test_compressed_control_variates_stay_those_of_the_server(travels: dict[str, Any]) -> None:
    """c is the mean of all c_i, whatever of the changes arrives."""
    of = simulation({"local": {"scaffold": travels}})
    for t in range(ROUNDS):
        of.round(t)
    kept = of.own.get(torch.arange(6))["control"]
    c = of.replica.parameters()[of.plan.control]
    assert float(c.norm()) > 0.1
    assert float((kept.mean(0) - c).norm()) <= 1e-5 * float(c.norm())


def test_fednova() -> None:
    """Clients of different numbers of steps: x ← x − τ_eff η Σ p_i d_i, with d_i their mean directions."""
    of = simulation({"local": {"steps": None, "epochs": 1, "batch": 10, "momentum": 0.5, "fednova": True}})
    reference = Reference(of, fcn(of))
    for t in range(ROUNDS):
        call, moved, weights = of.call(t), [], []
        for client in call.clients.tolist():
            after = reference.client(client, t, sgd(momentum=0.5))
            tau = len(reference.batches(client, t))
            a = [(1 - 0.5 ** (tau - j)) / (1 - 0.5) for j in range(tau)]
            moved.append({name: (reference.x[name] - after[name]) / sum(a) for name in after})
            weights.append(sum(a))
        assert len(set(weights)) > 1, "all made as many steps: a test of nothing"
        tau_eff = sum(p * w for p, w in zip(call.weights.tolist(), weights, strict=True))
        step = reference.average(moved, call.weights.tolist())
        reference.x = {name: reference.x[name] - tau_eff * step[name] for name in step}
        of.round(t)
    reference.near()


def test_fedadam_with_the_paper_s_constants() -> None:
    server = {"optimizer": "adam", "lr": 0.01, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-3}
    of = simulation({"server": server})
    reference = Reference(of, fcn(of))
    m = {name: torch.zeros_like(value) for name, value in reference.x.items()}
    v = {name: torch.full_like(value, 1e-6) for name, value in reference.x.items()}
    for t in range(ROUNDS):
        call = of.call(t)
        states = [reference.client(client, t, sgd()) for client in call.clients.tolist()]
        mean = reference.average(states, call.weights.tolist())
        for name, x in reference.x.items():
            delta = mean[name] - x
            m[name] = 0.9 * m[name] + 0.1 * delta
            v[name] = 0.99 * v[name] + 0.01 * delta**2
            reference.x[name] = x + 0.01 * m[name] / (v[name].sqrt() + 1e-3)
        of.round(t)
    reference.near()


@pytest.mark.parametrize(
    ("match", "keeps"),
    [
        (
            [{"match": "norms"}, {"match": "buffers"}],
            lambda name: name.startswith("norm.") or name == "steps",
        ),
        ([{"match": "last.*"}], lambda name: name.startswith("last.")),
    ],
    ids=["FedBN", "FedPer"],
)
def test_fedbn_and_fedper(match: list[dict[str, str]], keeps: Callable[[str], bool]) -> None:
    rules = [{**rule, "travels": "local"} for rule in match]
    of = simulation({"model": {"name": "tests.nets:build", "p": 0.0}, "parts": rules, "client_test": 0.2})
    reference = Reference(of, nets.build((1, 8, 8), 10, p=0.0), keeps)
    run(of, reference, sgd())
    reference.near()


def test_rates_by_round() -> None:
    schedule = {"name": "linear", "warmup": 3}
    of = simulation({"local": {"schedule": schedule}})
    reference = Reference(of, fcn(of))
    for t in range(ROUNDS):
        call, lr = of.call(t), 0.05 * of.config.local.schedule.factor(t, ROUNDS)
        states = [
            reference.client(client, t, lambda p, lr=lr: torch.optim.SGD(p, lr=lr))
            for client in call.clients.tolist()
        ]
        reference.x = reference.average(states, call.weights.tolist())
        of.round(t)
    reference.near()


@pytest.mark.parametrize(
    "local",
    [{**ADAMW, "keep": True}, {"scaffold": {"name": "qsgd", "bits": 4}}, {"mu": 0.1, "clip": 0.5}],
    ids=["kept", "scaffold", "fedprox"],
)
def test_the_same_at_any_number_of_ranks_and_after_a_resume(local: dict[str, Any], tmp_path: Any) -> None:
    values = {
        **RUN,
        "rounds": 4,
        "local": {**RUN["local"], **local},
        "method": {"name": "topk", "ratio": 0.2, "feedback": True},
        "reproducible": True,
        "checkpoint": {"rounds": 2, "keep": 9},
    }
    for topology in ("allreduce", "aggregator"):
        check_the_same({**values, "topology": topology}, tmp_path / topology)
        if "scaffold" in local:
            summary = json.loads((tmp_path / topology / "3" / "summary.json").read_text())
            sent = 4 * 610 * summary["messages"] / summary["upload_bytes"]
            assert summary["params"] == 610, "control variates are none"
            assert summary["upload_ratio"] == pytest.approx(sent)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"optimizer": "nesterov"}, "momentum: expected one above 0"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum: expected none with optimizer: adamw"),
        ({"keep": True}, "keep: expected an optimizer with a memory"),
        ({"optimizer": "adamw", "fednova": True}, "fednova: expected optimizer: sgd"),
        ({"scaffold": "exact", "momentum": 0.9}, "scaffold: expected plain sgd"),
        ({"scaffold": "signsgd"}, "local.scaffold: expected a method whose messages are numbers"),
        ({"optimizer": "lamb"}, "optimizer"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(local: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation({"local": local})
