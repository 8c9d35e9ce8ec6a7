"""Convolutions with their channels last: other memory, the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmpi import plan, random
from fedmpi.comm import solo
from fedmpi.engine.layout import Layout
from fedmpi.engine.trainer import Trainer
from fedmpi.local import Local
from fedmpi.spec import Spec
from fedmpi.tasks import models
from fedmpi.tasks.data import Data, Split
from fedmpi.tasks.metrics import measures
from fedmpi.tasks.objectives import OBJECTIVES
from fedmpi.tasks.partitions import Partition

MODELS = {"cnn": (1, 8, 8), "lenet": (3, 32, 32), "linear": (1, 8, 8), "unet": (3, 16, 16)}


def built(name: str) -> tuple[torch.nn.Module, Spec]:
    model = models.build(name, MODELS[name], 10, random.key(0, stream="model"))
    return model, Spec.of(model)


def numbers(name: str, count: int) -> Tensor:
    return random.normal(random.key(1, stream=name), count)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str) -> None:
    model, spec = built(name)
    layout, x_D = Layout(model, spec), numbers("x", spec.size)
    inside_D = layout.inside(x_D)
    own, views = layout.views(inside_D), spec.views(x_D)
    assert all(torch.equal(own[n], views[n]) for n in spec.names)
    assert torch.equal(layout.outside(inside_D, torch.empty_like(x_D)), x_D)
    assert torch.equal(inside_D, x_D) == (name == "linear")


def test_parameters_are_its_views() -> None:
    model, spec = built("cnn")
    theta_D, grad_D = numbers("θ", spec.size), torch.zeros(spec.size)
    layout = Layout(model, spec)
    layout.bind(theta_D, grad_D)
    kernels = [p for p in model.parameters() if p.dim() == 4]
    assert all(p.stride()[1] == 1 for p in kernels)
    model(torch.ones(2, 1, 8, 8)).sum().backward()
    assert grad_D.count_nonzero()
    for p, view in zip(model.parameters(), layout.views(grad_D).values(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, view)


def test_large_models_and_frozen_kernels_lie_as_they_are() -> None:
    model = models.build("resnet9", (3, 32, 32), 10, random.key(0, stream="model"))
    assert not Layout(model, Spec.of(model)).last
    model, _ = built("cnn")
    model.conv1.weight.requires_grad_(False)
    assert list(Layout(model, Spec.of(model)).last) == ["conv2.weight"]


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"accumulate": 2}, {"weight_decay": 0.1}],
    ids=["plain", "momentum and decay", "accumulated", "decay"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_training_is_that_of_a_plain_loop(options: dict[str, Any], masked: bool) -> None:
    """Σ g of three steps, and what is evaluated and pooled, against torch on a model that lies as torch has it."""
    torch.set_num_threads(1)
    model, spec = built("cnn")
    local = Local.model_validate({"lr": 0.1, "steps": 3, "batch": None, **options})
    trainer = Trainer(model, plan.make(plan.Tensors.of(model)), OBJECTIVES["cross_entropy"], local, seed=3)
    theta_D = 0.1 * numbers("θ", spec.size)
    frozen_D = numbers("mask", spec.size) > 0 if masked else None
    x, y = numbers("images", 6 * 64).view(6, 1, 8, 8), torch.arange(6)
    part, client = Partition(torch.arange(6), torch.tensor([0, 6])), torch.tensor([0])

    (g_D,), (loss,), *_ = trainer.train(theta_D, Split(x, y), part, client, 0, frozen_D)

    plain, _ = built("cnn")
    parameters = dict(plain.named_parameters())
    for n, value in spec.views(theta_D.clone()).items():
        parameters[n].data = value
    velocity_D = torch.zeros_like(theta_D)
    sum_D, losses = torch.zeros_like(theta_D), []
    for _ in range(3):
        plain.zero_grad()
        parts = [F.cross_entropy(plain(x[i]), y[i]) for i in torch.arange(6).chunk(local.accumulate)]
        torch.stack(parts).mean().backward()
        losses.append(sum(part.item() for part in parts) / len(parts))
        now_D = spec.flatten(dict(plain.named_parameters()))
        step_D = spec.flatten({n: p.grad for n, p in plain.named_parameters() if p.grad is not None})
        step_D += local.weight_decay * now_D
        if frozen_D is not None:
            step_D[frozen_D] = 0
        velocity_D = local.momentum * velocity_D + step_D
        sum_D += velocity_D
        for n, value in spec.views(now_D - local.lr * velocity_D).items():
            parameters[n].data = value.clone()
    torch.testing.assert_close(g_D, sum_D, rtol=1e-4, atol=1e-5)
    assert float(loss) == pytest.approx(sum(losses) / 3, rel=1e-5)

    with torch.no_grad():
        for n, value in spec.views(theta_D).items():
            parameters[n].data = value
        expected = float((plain(x).argmax(1) == y).float().mean())
    split = Split(x, y)
    found = trainer.evaluate(
        measures(OBJECTIVES["cross_entropy"], Data("", split, split, 10)), theta_D, split, 4, solo()
    )
    assert found["accuracy"] == pytest.approx(expected)
