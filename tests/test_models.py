"""Models: sizes, initial values, options."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmpi import random
from fedmpi.comm import run_ranks
from fedmpi.errors import ConfigError
from fedmpi.tasks.dataset import IGNORE, PAD
from fedmpi.tasks.metrics import METRICS, Task
from fedmpi.tasks.models import MODELS, build, check_supported, initialize
from fedmpi.tasks.objectives import OBJECTIVES, check, squared_hinge

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
        ("cnn4", FASHION, {}, 467_818),
        ("lenet", (3, 32, 32), {}, 62_006),  # Network 2 of the crucial-gradients paper, Table 3
        ("resnet9", (3, 32, 32), {}, 6_570_880),  # intrinsic gradient compression, section 5
        # 11,173,962 as usual for small pictures, with 4,800 biases more and 1,792 of the shortcuts' norms less.
        ("resnet18", (3, 32, 32), {}, 11_176_970),
        ("vgg19", (3, 32, 32), {}, 20_040_522),  # as usual with batch norm, which has as many
    ],
)
def test_sizes_and_outputs(
    name: str, shape: tuple[int, ...], options: dict[str, Any], parameters: int
) -> None:
    model = build(name, shape, 10, KEY, **options)
    assert count(model) == parameters
    assert model(torch.zeros(3, *shape)).shape == (3, 10)
    assert all(p.is_leaf and p.requires_grad and p.device.type == "cpu" for p in model.parameters())


TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
SMALL_OPTIONS: dict[str, Any] = {
    "resnet18": {"width": 8},
    "vgg19": {"width": 8},
    "unet": {"width": 4},
    "encoder": {"settings": TINY | {"intermediate_size": 8, "max_position_embeddings": 20}},
    "decoder": {"settings": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 20}},
}
SHAPES = {"lenet": FASHION, "encoder": (12,), "decoder": (12,)}
PICTURES = [name for name in MODELS if not MODELS[name].seeded]


def small(name: str, key: int = KEY) -> nn.Module:
    if MODELS[name].seeded:
        pytest.importorskip("transformers", reason="the extra hf is not installed")
    return build(name, SHAPES.get(name, DIGITS), 10, key, **SMALL_OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_are_a_function_of_the_key_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (small(name, key).state_dict() for key in (KEY, KEY, KEY + 1))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
    assert all(torch.equal(first[n], again[n]) for n in first)
    first = {n: v for n, v in first.items() if v.numel() == 1 or v.std() > 0}  # norms are 1 and 0
    assert first
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
            r"model fcn\.hiden: unknown key; did you mean 'hidden'\? valid: init, hidden",
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


@pytest.mark.parametrize("name", PICTURES)
def test_every_model_is_supported_and_learns_under_vmap(name: str) -> None:
    shape = SHAPES.get(name, DIGITS)
    x, y = torch.randn(3, 4, *shape), torch.randint(10, (3, 4))
    objective = OBJECTIVES["cross_entropy"]
    if name == "unet":
        y, objective = torch.randint(10, (3, 4, 8, 8)), OBJECTIVES["pixels"]
    model = small(name)
    check_supported(model)
    parameters = {n: p.detach().expand(3, *p.shape) for n, p in model.named_parameters()}

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return objective.loss(torch.func.functional_call(model, p, (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss))(parameters, x, y)
    model.zero_grad()
    objective.loss(model(x[2]), y[2]).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[n][2], p.grad, atol=1e-5, rtol=1e-3)


class TestLanguage:
    """The models of transformers, small ones with initial values."""

    def test_padding_changes_nothing(self) -> None:
        for name in ("encoder", "decoder"):
            model = small(name)
            check_supported(model)
            x = torch.tensor([[3, 5, 7, *[PAD] * 9], [1, 2, 3, 4, 5, 6, *[PAD] * 6]])
            alone, both = model(x[:1]), model(x)
            torch.testing.assert_close(alone[0], both[0, :3] if name == "decoder" else both[0])
            assert both.shape == ((2, 6, 30) if name == "decoder" else (2, 10)), (
                "cut to the longest of the batch"
            )

    def test_train_mode_draws_nothing(self) -> None:
        model = small("encoder").train()
        x = torch.randint(30, (4, 12))
        assert torch.equal(model(x), model(x))

    def test_a_saved_folder_is_read_back(self, tmp_path: Path) -> None:
        model = small("encoder")
        model.inner.save_pretrained(tmp_path / "saved")  # type: ignore[union-attr, operator]
        again = build("encoder", (12,), 10, KEY, pretrained=str(tmp_path / "saved"), train="head")
        for n, p in model.inner.named_parameters():  # type: ignore[union-attr, operator]
            assert torch.equal(p, again.inner.get_parameter(n))  # type: ignore[union-attr, operator]
        assert [n for n, p in again.named_parameters() if p.requires_grad] == ["out.weight", "out.bias"]

    @pytest.mark.parametrize(
        ("name", "shape", "options", "message"),
        [
            ("encoder", (1, 8, 8), {}, r"expected inputs of tokens \(length,\), got \(1, 8, 8\)"),
            (
                "encoder",
                (21,),
                SMALL_OPTIONS["encoder"],
                "it has 20 positions, .* have 21 tokens a sample; .* set data.length to 20",
            ),
            (
                "encoder",
                (8,),
                {"settings": {"hiden": 3}},
                r"settings\.hiden: unknown key; valid: .*hidden_size",
            ),
            ("encoder", (8,), {"architecture": "brt"}, "architecture: expected a model type of transformers"),
            (
                "decoder",
                (8,),
                {"pretrained": "/none/such"},
                r"pretrained: expected a folder .* got '/none/such'",
            ),
        ],
    )
    def test_what_cannot_be_built_is_named(
        self,
        name: str,
        shape: tuple[int, ...],
        options: dict[str, Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pytest.importorskip("transformers", reason="the extra hf is not installed")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ConfigError, match=message):
            build(name, shape, 2, KEY, **options)

    def test_a_token_outside_the_vocabulary(self) -> None:
        with pytest.raises(ConfigError, match="a vocabulary of 30, the data have token 30"):
            small("encoder")(torch.tensor([[3, 30]]))

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ConfigError, match=r"transformers is needed .* pip install 'fedmpi\[hf\]'"):
            build("encoder", (8,), 2, KEY)


def test_unet_and_resnet_shapes() -> None:
    assert small("unet")(torch.zeros(2, *DIGITS)).shape == (2, 10, 8, 8)
    with pytest.raises(ConfigError, match=r"expected height and width in multiples of 8 \(2\^depth\)"):
        build("unet", (3, 28, 28), 2, KEY)


def test_objective() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.0]])
    y = torch.tensor([0, 2, 0])
    loss = OBJECTIVES["cross_entropy"].loss
    want = (
        -sum(
            math.log(math.exp(row[i]) / sum(map(math.exp, row)))
            for row, i in zip(logits.tolist(), y.tolist(), strict=True)
        )
        / 3
    )
    assert loss(logits, y).item() == pytest.approx(want)
    assert METRICS["accuracy"].of(Task("classes", 3), logits, y).tolist() == [2, 3]


def test_squared_hinge() -> None:
    scores, y = torch.tensor([[2.0, -0.5, 0.0]]), torch.tensor([0])
    assert squared_hinge(scores, y).item() == pytest.approx(0 + 0.25 + 1)
    assert squared_hinge(scores, torch.tensor([1])).item() == pytest.approx(9 + 2.25 + 1)


def test_pixels_and_tokens_leave_out_what_does_not_count() -> None:
    logits = torch.randn(2, 3, 4, 5)
    y = torch.randint(3, (2, 4, 5))
    y[0, 1] = IGNORE
    keep = y != IGNORE
    want = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[keep], y[keep])
    torch.testing.assert_close(OBJECTIVES["pixels"].loss(logits, y), want)
    assert OBJECTIVES["pixels"].count(y) == 35
    logits[:, :, 0, 0] = torch.tensor([0.0, 9.0, 0.0])
    y[:, 0, 0] = torch.tensor([1, 2])
    one = logits[:, :, :1, :1], y[:, :1, :1]
    assert METRICS["accuracy"].of(Task("pixels", 3), *one).tolist() == [1, 2]

    words, x = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 4, 6], [IGNORE, 5, IGNORE, 6, IGNORE]])
    x[0, 4] = IGNORE  # the logits end a token sooner: nothing counts there
    token = OBJECTIVES["next_token"]
    rows = [(0, 0, 2), (0, 1, 3), (0, 2, 4), (1, 0, 5), (1, 2, 6)]
    want = -sum(words[b, t].log_softmax(0)[k] for b, t, k in rows) / 5
    torch.testing.assert_close(token.loss(words, x), want)
    assert token.count(x) == 5
    words[0, 1, 3] = 99
    words[1, 0, 4] = 99
    right = 1 + sum(int(words[b, t].argmax() == k) for b, t, k in rows[:1] + rows[2:3] + rows[4:])
    assert METRICS["accuracy"].of(Task("tokens", 7), words, x).tolist() == [right, 5]


def test_values_count_as_right_when_near() -> None:
    row = OBJECTIVES["squared_error"]
    out, y = torch.tensor([[0.5, 0.5], [0.1, 0.9]]), torch.tensor([[0.51, 0.6], [0.1, 0.9]])
    assert row.loss(out, y).item() == pytest.approx((0.01**2 + 0.1**2) / 4)
    assert METRICS["near"].of(Task("values", 2), out, y).tolist() == [3, row.count(y)] == [3, 4]


def test_an_objective_that_does_not_fit_the_targets_is_named() -> None:
    check("cross_entropy", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(
        ConfigError, match=r"loss: cross_entropy expects .* fitting: binary_cross_entropy, squared_error"
    ):
        check("cross_entropy", torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="fitting: pixels"):
        check("next_token", torch.zeros(3, 4, 4, dtype=torch.int64))


def test_threads_build_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of transformers: who builds first imports the model's module, and others would find half of it."""
    inside: list[int] = []
    most: list[int] = []

    def slow(shape: Any, classes: int, options: Any) -> nn.Module:
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()
        return nn.Linear(1, 1)

    monkeypatch.setitem(MODELS, "decoder", MODELS["decoder"]._replace(build=slow))
    run_ranks(4, lambda comm: build("decoder", (4,), 8, KEY))
    assert most == [1] * 8, "twice each: for its size, and for good"
