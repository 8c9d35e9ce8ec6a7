"""Models: sizes, initial values, options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.tasks.models import MODELS, build, check_supported, initialize
from fedmpi.tasks.objectives import OBJECTIVES

DIGITS, FASHION = (1, 8, 8), (1, 28, 28)
KEY = random.key(7, stream="model")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "options", "parameters"),
    [
        ("linear", DIGITS, {}, 650),
        ("linear", FASHION, {}, 7_850),
        ("fcn", DIGITS, {}, 3_760),
        ("fcn", FASHION, {}, 39_760),
        ("fcn", FASHION, {"hidden": 200}, 159_010),
        ("cnn", DIGITS, {}, 13_706),
        ("cnn", FASHION, {}, 105_866),
        ("cnn", (3, 32, 32), {"channels": [4, 8], "hidden": 16}, 8_786),
    ],
)
def test_sizes_and_outputs(
    name: str, shape: tuple[int, ...], options: dict[str, Any], parameters: int
) -> None:
    model = build(name, shape, 10, KEY, **options)
    assert count(model) == parameters
    assert model(torch.zeros(3, *shape)).shape == (3, 10)
    assert all(p.is_leaf and p.requires_grad and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_are_a_function_of_the_key_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (build(name, DIGITS, 10, key).state_dict() for key in (KEY, KEY, KEY + 1))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_golden_values() -> None:
    """The same numbers on any machine and in any later version."""
    weight = build("fcn", DIGITS, 10, KEY).get_parameter("hidden.weight")
    assert weight[0, :4].tolist() == GOLDEN_WEIGHTS
    u = random.uniform(random.key(KEY, stream="hidden.weight"), 4)
    assert torch.equal(weight[0, :4], (2 * u - 1) / 8)


GOLDEN_WEIGHTS = [-0.04071663320064545, 0.08400243520736694, 0.028157606720924377, -0.0007667094469070435]


@pytest.mark.parametrize(("name", "fan_in"), [("conv1", 9), ("conv2", 144), ("hidden", 1568), ("out", 64)])
def test_the_distribution_is_torchs(name: str, fan_in: int) -> None:
    """Mean, deviation and bounds of U(±1/√fan_in), each within 5 standard errors."""
    model = build("cnn", FASHION, 10, KEY)
    for values in (model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")):
        scaled, n = values.detach().double() * math.sqrt(fan_in), values.numel()
        assert scaled.abs().max() <= 1
        assert abs(scaled.mean()) < 5 / math.sqrt(3 * n)
        assert abs(scaled.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    torch_own = nn.Conv2d(16, 32, 3)
    nn.init.kaiming_uniform_(torch_own.weight, a=math.sqrt(5))
    assert torch_own.weight.abs().max().item() == pytest.approx(1 / 12, rel=0.01)


def test_norm_layers_and_layers_without_a_rule() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4))
    for p in model.parameters():
        nn.init.constant_(p, 9)
    initialize(model, KEY)
    for layer in model[1:]:
        assert layer.weight.tolist() == [1] * 4
        assert layer.bias.tolist() == [0] * 4
    with pytest.raises(
        ConfigError, match=r"module 1 \(Bilinear\): no rule for the initial values of weight, bias"
    ):
        initialize(nn.Sequential(nn.ReLU(), nn.Bilinear(2, 2, 2)), KEY)
    initialize(nn.Linear(3, 2, bias=False), KEY)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("fnc", DIGITS, {}, r"unknown model 'fnc'; did you mean 'fcn'\? valid: linear, fcn, cnn"),
        (
            "fcn",
            DIGITS,
            {"hiden": 3},
            r"model fcn\.hiden: unknown key; did you mean 'hidden'\? valid: hidden",
        ),
        ("fcn", DIGITS, {"hidden": 0}, r"model fcn\.hidden: .*greater than 0, got 0"),
        ("fcn", DIGITS, {"hidden": "50"}, r"model fcn\.hidden: .*integer, got '50'"),
        ("fcn", DIGITS, {"hidden": True}, r"model fcn\.hidden: .*integer, got True"),
        ("cnn", DIGITS, {"channels": [16]}, r"model cnn\.channels"),
        ("cnn", DIGITS, {"channels": [16, "a"]}, r"model cnn\.channels\.1: .*integer, got 'a'"),
        ("cnn", (64,), {}, r"expected inputs \(channels, height ≥ 4, width ≥ 4\), got \(64,\)"),
        ("cnn", (1, 3, 8), {}, r"got \(1, 3, 8\)"),
        ("linear", DIGITS, {"hidden": 3}, r"model linear\.hidden: unknown key"),
    ],
)
def test_what_cannot_be_built_is_named(
    name: str, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, shape, 10, KEY, **options)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_statistics_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"module 1\.0 \({type(layer).__name__}\).*GroupNorm"):
        check_supported(nn.Sequential(nn.ReLU(), nn.Sequential(layer)))


def test_every_model_is_supported_and_learns_under_vmap() -> None:
    x, y = torch.randn(5, 6, *DIGITS), torch.randint(10, (5, 6))
    objective = OBJECTIVES["cross_entropy"]
    for name in MODELS:
        model = build(name, DIGITS, 10, KEY)
        check_supported(model)
        parameters = {n: p.detach().expand(5, *p.shape) for n, p in model.named_parameters()}

        def loss(
            p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, model: nn.Module = model
        ) -> torch.Tensor:
            return objective.loss(torch.func.functional_call(model, p, (x,)), y)

        gradients = torch.func.vmap(torch.func.grad(loss))(parameters, x, y)
        model.zero_grad()
        objective.loss(model(x[2]), y[2]).backward()
        for n, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(gradients[n][2], p.grad)


def test_objective() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.0]])
    y = torch.tensor([0, 2, 0])
    loss, correct, _ = OBJECTIVES["cross_entropy"]
    want = (
        -sum(
            math.log(math.exp(row[i]) / sum(map(math.exp, row)))
            for row, i in zip(logits.tolist(), y.tolist(), strict=True)
        )
        / 3
    )
    assert loss(logits, y).item() == pytest.approx(want)
    assert correct(logits, y).item() == 2
    assert correct(logits, y).dtype == torch.int64
