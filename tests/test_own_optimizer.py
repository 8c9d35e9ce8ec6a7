"""Clients that step by an optimizer named by its import path: as in plain torch, kept or not, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmpi import config
from fedmpi.errors import ConfigError

from .interrupted import check_the_same, train
from .test_rules import ROUNDS, RUN, Reference, fcn, run, simulation

RMSPROP = {"name": "torch.optim:RMSprop", "alpha": 0.9, "momentum": 0.5, "eps": 1e-3}
HERE = "tests.test_own_optimizer"


class Noisy(torch.optim.SGD):
    """Draws random numbers."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(torch.randn_like(p), alpha=0.01)
        super().step(closure)


class Counting(torch.optim.SGD):
    """Remembers something where nobody looks for it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        super().step(closure)


class Elsewhere(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad


def optimizer(lr: float = 0.01) -> Any:
    return lambda parameters: torch.optim.RMSprop(parameters, lr=lr, alpha=0.9, momentum=0.5, eps=1e-3)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_an_own_optimizer_steps_as_in_torch(mu: float) -> None:
    of = simulation({"local": {"lr": 0.01, "optimizer": RMSPROP, "mu": mu}})
    reference = Reference(of, fcn(of))

    def proximal(model: Any, client: int) -> Any:
        start = reference.x
        return mu / 2 * sum((p - start[name]).square().sum() for name, p in model.named_parameters())

    run(of, reference, optimizer(), proximal if mu else None)
    reference.near()


def test_its_memory_is_kept_by_each_client() -> None:
    of = simulation({"local": {"lr": 0.01, "optimizer": RMSPROP, "keep": True}})
    reference = Reference(of, fcn(of))
    for t in range(ROUNDS):
        call, states = of.call(t), []
        for client in call.clients.tolist():
            states.append(reference.client(client, t, optimizer()))
            reference.memory[client] = reference.last.state_dict()
        reference.x = reference.average(states, call.weights.tolist())
        of.round(t)
    reference.near()


@pytest.mark.parametrize(
    "local",
    [{"optimizer": RMSPROP, "keep": True, "clip": 1.0}, {"optimizer": f"{HERE}:Noisy"}],
    ids=["kept", "drawing"],
)
def test_the_same_at_any_number_of_ranks_and_after_a_resume(local: dict[str, Any], tmp_path: Path) -> None:
    values = {
        **RUN,
        "rounds": 4,
        "local": {**RUN["local"], **local},
        "method": {"name": "topk", "ratio": 0.2, "feedback": True},
        "reproducible": True,
        "checkpoint": {"rounds": 2, "keep": 9},
    }
    check_the_same(values, tmp_path)


def test_a_rank_s_own_optimizer_goes_on_from_round_to_round(tmp_path: Path) -> None:
    """Local updates by torch's AdamW are those by ours, at a rate that changes from step to step."""
    values = {**RUN, "mode": "data_parallel", "partition": "iid", "rounds": 6, "clients": 0, "cohort": None}
    models = {}
    for name, of in (("ours", "adamw"), ("torch", {"name": "torch.optim:AdamW", "weight_decay": 0.1})):
        local = {"lr": 0.01, "steps": 3, "batch": 10, "optimizer": of, "schedule": {"name": "linear"}}
        local |= {"weight_decay": 0.1} if name == "ours" else {}
        train({**values, "local": local}, tmp_path / name, ranks=2)
        models[name] = load_file(tmp_path / name / "model.safetensors")
    for name, value in models["torch"].items():
        torch.testing.assert_close(value, models["ours"][name], rtol=1e-3, atol=1e-4)


def test_pruned_parameters_stay_zero() -> None:
    method = {"name": "prune", "keep": 0.3, "inner": {"name": "topk", "ratio": 0.1}}
    of = simulation({"local": {"lr": 0.01, "optimizer": RMSPROP}, "method": method})
    for t in range(ROUNDS):
        of.round(t)
    theta_D = of.replica.parameters()
    assert int(theta_D.count_nonzero()) <= 0.31 * len(theta_D)


def test_a_run_writes_it_as_it_reads_it() -> None:
    parsed = config.parse({**RUN, "local": {"lr": 0.1, "optimizer": RMSPROP}})
    assert parsed.plain()["local"]["optimizer"] == RMSPROP
    assert config.parse(parsed.plain()) == parsed


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"optimizer": "torch.optim:LBFGS"}, r"torch\.optim:LBFGS: its step asks for a closure"),
        ({"optimizer": "torch.optim:SparseAdam"}, "SparseAdam: its step fails: .*dense gradients"),
        ({"optimizer": "torch.optim:Nonesuch"}, r"local\.optimizer: cannot import 'torch\.optim:Nonesuch'"),
        ({"optimizer": {"name": "torch.optim:Adam", "beta": 0.9}}, "does not take what it is given .*'beta'"),
        ({"optimizer": {"name": "torch.optim:Adam", "lr": 0.9}}, r"expected no lr beside local\.lr"),
        (
            {"optimizer": {"name": "torch.optim:SGD", "momentum": -1}},
            "torch.optim:SGD failed: ValueError: Invalid momentum",
        ),
        ({"optimizer": "torch.nn:Linear"}, "does not take what it is given"),
        ({"optimizer": "torch.optim:Adam", "momentum": 0.9}, "momentum: expected none with optimizer: torch"),
        (
            {"optimizer": "torch.optim:SGD", "keep": True},
            r"local\.keep: expected an optimizer with a memory, got torch\.optim:SGD without",
        ),
        (
            {"optimizer": f"{HERE}:Counting", "keep": True},
            r"local\.keep: .*Counting remembers param_groups\.k outside its state, expected it there; leave keep out",
        ),
        (
            {"optimizer": f"{HERE}:Elsewhere"},
            "Elsewhere: it puts parameters elsewhere, expected steps in place",
        ),
        ({"optimizer": "torch.optim:Adam", "fednova": True}, "fednova: expected optimizer: sgd"),
        ({"optimizer": "torch.optim:Adam", "scaffold": "exact"}, "scaffold: expected plain sgd"),
    ],
    ids=str,
)
def test_what_does_not_work_is_named(local: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation({"local": local})
