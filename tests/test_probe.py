"""A model whose training depends on more than its parameters and the batch, or that does not fit, is named at once."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmpi import config
from fedmpi.engine import parts, probe
from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks import objectives
from fedmpi.tasks.data import Data, Split
from fedmpi.tasks.metrics import Measures, measures
from fedmpi.tasks.models import MODELS, build, check_supported
from fedmpi.tasks.objectives import OBJECTIVES

from .test_models import DIGITS, SHAPES, small

X = torch.linspace(-1, 1, 120).view(20, 6).sin()
CLASSES = Data("mine", Split(X, torch.arange(20) % 3), Split(X, torch.arange(20) % 3), 3)
VALUES = Data("mine", Split(X, X[:, :1]), Split(X, X[:, :1]), 1)


def measured(loss: str, data: Data) -> Measures:
    return measures(OBJECTIVES[loss], data)


class Net(nn.Module):
    """One affine map ``l`` and what a test adds."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], out: int = 3, **parts: Any) -> None:
        super().__init__()
        self.l = nn.Linear(6, out)
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


def remembers(net: Any, x: Tensor) -> Tensor:
    """Running means that are neither a buffer nor called so, used in evaluation alone."""
    if net.training:
        net.level = 0.9 * net.level + 0.1 * x.mean(0)
        return net.l(x)  # type: ignore[no-any-return]
    return net.l(x - net.level)  # type: ignore[no-any-return]


def hidden(net: Any, x: Tensor) -> Tensor:
    """The same where nothing looks: in a list."""
    if net.training:
        net.box[0] = 0.9 * net.box[0] + 0.1 * x.mean()
        return net.l(x)  # type: ignore[no-any-return]
    return net.l(x - net.box[0])  # type: ignore[no-any-return]


def counts(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return net.l(x)  # type: ignore[no-any-return]


def sequence(x: Tensor) -> Tensor:
    return x[:, None].expand(-1, 4, -1)


SPECTRAL = nn.utils.parametrizations.spectral_norm
DRAWS: dict[str, Callable[[], nn.Module]] = {
    "functional dropout": lambda: Net(lambda net, x: net.l(F.dropout(x, 0.1, net.training))),
    "before a last layer of zeros": lambda: Net(
        lambda net, x: net.last(F.dropout(net.l(x), 0.1, net.training)), last=zero(nn.Linear(3, 3))
    ),
    "a draw in a thousand": lambda: Net(
        lambda net, x: net.l(x) + (float(torch.rand(()) < 1e-3) if net.training else 0)
    ),
    "noise": lambda: Net(lambda net, x: net.l(x + torch.randn_like(x) * net.training)),
    "in a recurrent layer": lambda: Net(
        lambda net, x: net.l(net.r(sequence(x))[0][:, -1]), r=nn.LSTM(6, 6, 2, dropout=0.1, batch_first=True)
    ),
    "in attention": lambda: Net(
        lambda net, x: net.l(net.a(*[sequence(x)] * 3)[0][:, -1]),
        a=nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True),
    ),
    "Python's": lambda: Net(lambda net, x: net.l(x) * (random.random() < 2 if net.training else 1)),
    "NumPy's": lambda: Net(lambda net, x: net.l(x) + (np.random.rand() if net.training else 0)),  # noqa: NPY002
}


_GENERATOR = np.random.default_rng(0)
DRAWS |= {
    "NumPy's, held by the model": lambda: Net(
        lambda net, x: net.l(x) + (net.own.random() if net.training else 0), own=np.random.default_rng(0)
    ),
    "Python's, held by the model": lambda: Net(
        lambda net, x: net.l(x) + (net.own.random() if net.training else 0), own=random.Random(0)
    ),
    "torch's, held by the model": lambda: Net(
        lambda net, x: net.l(x * (torch.rand(6, generator=net.own) > 0.5) if net.training else x),
        own=torch.Generator(),
    ),
    "NumPy's, of the module": lambda: Net(
        lambda net, x: net.l(x) + (_GENERATOR.random() if net.training else 0)
    ),
}


@pytest.mark.parametrize("case", DRAWS)
def test_models_that_draw_are_found(case: str) -> None:
    traits = probe.look("mine", DRAWS[case](), measured("cross_entropy", CLASSES), CLASSES)
    assert traits.draws
    assert traits.changes == ()


def averages(net: Any, x: Tensor) -> Tensor:
    """Running means in a buffer that is not called so, assigned and not written to, used in evaluation alone."""
    if net.training:
        net.level = 0.9 * net.level + 0.1 * x.mean(0)
        return net.l(x)  # type: ignore[no-any-return]
    return net.l(x - net.level)  # type: ignore[no-any-return]


def test_buffers_that_change_are_found() -> None:
    model = Net(lambda net, x: net.s(x), s=SPECTRAL(nn.Linear(6, 3)))
    model.register_buffer("fixed", torch.arange(9))
    found = probe.look("mine", model, measured("cross_entropy", CLASSES), CLASSES)
    names = {f"s.parametrizations.weight.0.{name}" for name in ("_u", "_v")}
    assert set(found.changes) == names
    assert found.alone
    model = Net(averages)
    model.register_buffer("level", torch.zeros(6))
    assert probe.look("mine", model, measured("cross_entropy", CLASSES), CLASSES) == probe.Traits(("level",))
    model = Net(lambda net, x: net.l(net.b(x)), b=nn.BatchNorm1d(6))
    found = probe.look("mine", model, measured("cross_entropy", CLASSES), CLASSES)
    assert found.changes == ("b.running_mean", "b.running_var", "b.num_batches_tracked")
    assert not found.alone


def compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced: nn.Module = torch.jit.trace(nn.Linear(6, 3), X[:2])
    return traced


REFUSED = {
    "a generator of its own": (
        lambda: Net(lambda net, x: net.l(x) + (np.random.default_rng().random() if net.training else 0)),
        "two passes in training over the same samples give different outputs",
    ),
    "compiled": (
        compiled,
        "expected a module of Python's",
    ),
    "draws in evaluation": (
        lambda: Net(lambda net, x: F.dropout(net.l(x), 0.5)),
        "its output in evaluation is random; expected random numbers in training alone",
    ),
    "a step in forward": (
        lambda: Net(
            lambda net, x: net.l(F.embedding((x > 0).long(), net.e, max_norm=0.1).sum(1)),
            e=nn.Parameter(torch.ones(2, 6)),
        ),
        "its forward changes the parameter e; expected that steps alone do: leave out max_norm",
    ),
    "running means": (lambda: Net(remembers, level=torch.zeros(6)), "changes its attribute level"),
    "hidden running means": (
        lambda: Net(hidden, box=[torch.zeros(())]),
        "its output in evaluation is another",
    ),
    "a counter": (lambda: Net(counts, calls=0), "changes its attribute calls"),
    "functional batch norm": (
        lambda: Net(lambda net, x: net.l(F.batch_norm(x, None, None, training=True))),
        "Expected more than 1 value per channel .*with 1 of 4 samples.*; .*let batch norm keep running statistics",
    ),
    "a batch's mean": (
        lambda: Net(lambda net, x: net.l(x - x.mean(0))),
        "its output for a sample depends on the other samples of the batch",
    ),
    "the size of the batch": (lambda: Net(lambda net, x: net.l(x) / len(x)), "depends on the other samples"),
    "squeeze": (lambda: Net(lambda net, x: net.l(x).squeeze()), "got \\(3,\\) \\(with 1 of 4 samples\\)"),
    "a dict": (
        lambda: Net(lambda net, x: {"logits": net.l(x)}),
        "returned a dict of logits, expected a tensor",
    ),
    "a tuple": (lambda: Net(lambda net, x: (net.l(x), x)), "returned a tuple, expected a tensor of float32"),
    "float64": (
        lambda: Net(lambda net, x: net.l(x).double()),
        r"tensor of torch\.float64 .* end with \.float\(\)",
    ),
    "too few classes": (
        lambda: Net(lambda net, x: net.l(x)[:, :2]),
        r"expected an output of shape \(4, at least 3 classes\) for 4 samples .* got \(4, 2\)",
    ),
    "a class a token": (lambda: Net(lambda net, x: net.l(sequence(x))), r"got \(4, 4, 3\)"),
    "another input": (
        lambda: Net(lambda net, x: net.l(x[:, :5])),
        r"fails on training samples of shape \(4, 6\) and torch.*: mat1 and mat2 .*\(.*test_probe\.py:\d+\)$",
    ),
    "no gradient": (lambda: Net(lambda net, x: net.l(x).detach()), "no gradient reaches its parameters"),
    "sparse gradients": (
        lambda: Net(
            lambda net, x: net.l(net.e((3 + 3 * x).long()).sum(1)), e=nn.Embedding(9, 6, sparse=True)
        ),
        r"the gradient of parameter e\.weight is sparse, expected a dense one; set sparse=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_must_not_do_is_named(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ConfigError, match=f"model mine: .*{message}") as caught:
        probe.look("mine", model, measured("cross_entropy", CLASSES), CLASSES)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


ACCEPTED: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: Net(lambda net, x: net.l(x)),
    "more outputs": lambda: Net(lambda net, x: net.l(x), out=5),
    "a draw for nothing": lambda: Net(lambda net, x: (torch.rand(()), net.l(x))[1]),
    "dropout of rate 0": lambda: Net(lambda net, x: net.l(F.dropout(x, 0.0))),
    "layers in place": lambda: Net(lambda net, x: net.l(x.relu_())),
    "filled once": lambda: Net(lambda net, x: (setattr(net, "seen", x.shape[1]), net.l(x))[1], seen=0),
    "spectral norm": lambda: Net(lambda net, x: net.s(x), s=SPECTRAL(nn.Linear(6, 3))),
    "running means in a buffer": lambda: Net(lambda net, x: net.l(net.b(x)), b=nn.BatchNorm1d(6)),
    "weight norm": lambda: Net(
        lambda net, x: net.w(x), w=nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    ),
}


@pytest.mark.parametrize("case", [*ACCEPTED, "a counter", "a dict", "NumPy's"])
def test_a_look_leaves_everything_as_it_was(case: str) -> None:
    model = {**ACCEPTED, **DRAWS}[case]() if case not in REFUSED else REFUSED[case][0]()
    model.train()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    x = CLASSES.train.x.clone()
    try:
        probe.look("mine", model, measured("cross_entropy", CLASSES), CLASSES)
    except ConfigError:
        assert case in REFUSED
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (repr(np.random.get_state()), random.getstate()) == states[1:]  # noqa: NPY002
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(CLASSES.train.x, x)
    assert model.training
    assert getattr(model, "calls", 0) == getattr(model, "seen", 0) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_fedmpi_passes(name: str) -> None:
    shape, loss = SHAPES.get(name, DIGITS), "cross_entropy"
    x, y = torch.linspace(-1, 99, 5 * math.prod(shape)).view(5, *shape).sin(), torch.arange(5)
    if name in ("encoder", "decoder"):
        x = torch.arange(60).view(5, 12) % 29
        x[2, 5:], x[3, 1:], x[4, 8:] = -1, -1, -1
    if name == "decoder":
        y, loss = x.where(x >= 0, -100), "next_token"
    if name == "unet":
        y, loss = torch.arange(320).view(5, 8, 8) % 10, "pixels"
    data = Data(name, Split(x, y), Split(x, y), 10)
    probe.look(name, small(name), measured(loss, data), data)


def test_values_have_the_targets_shape() -> None:
    """(B,) against (B, 1) is broadcast to (B, B): it once showed an accuracy of 119.10 %; it is meant as (B, 1)."""
    probe.look("mine", Net(lambda net, x: net.l(x), out=1), measured("squared_error", VALUES), VALUES)
    probe.look("mine", Net(lambda net, x: net.l(x)[:, 0], out=1), measured("squared_error", VALUES), VALUES)
    for forward in (lambda net, x: net.l(x)[:, :, None], lambda net, x: net.l(x).expand(-1, 2)):
        with pytest.raises(ConfigError, match=r"expected an output of shape \(4, 1\) for 4 samples"):
            probe.look("mine", Net(forward, out=1), measured("squared_error", VALUES), VALUES)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_are_numbered_from_0(part: str, wrong: int) -> None:
    y = CLASSES.train.y.clone()
    y[7] = -100
    ignored = CLASSES._replace(**{part: Split(X, y)})
    objectives.check_data(OBJECTIVES["cross_entropy"], ignored)
    y[9] = wrong
    with pytest.raises(
        DataError, match=rf"mine: {part}\.y: expected classes from 0 to 2 \(or -100.*, got {wrong};"
    ):
        objectives.check_data(OBJECTIVES["cross_entropy"], ignored)
    with pytest.raises(DataError, match=rf"{part}\.y: expected targets that count"):
        objectives.check_data(
            OBJECTIVES["cross_entropy"], CLASSES._replace(**{part: Split(X, torch.full((20,), -100))})
        )


def test_targets_of_another_kind_are_told_how_to_fit() -> None:
    with pytest.raises(ConfigError, match=r"y\.flatten\(\) takes the second away"):
        objectives.check("cross_entropy", torch.zeros(5, 1, dtype=torch.int64))
    objectives.check("squared_error", torch.zeros(5))
    values = VALUES._replace(test=Split(X, X[:, :1] / 0))
    with pytest.raises(DataError, match=r"test\.y: expected finite targets"):
        objectives.check_data(OBJECTIVES["squared_error"], values)


def test_parameters_have_values_on_the_cpu() -> None:
    for layer, message in (
        (nn.LazyLinear(3), "parameter weight is without a shape yet"),
        (nn.Linear(6, 3, device="meta"), "parameter weight is on the device meta"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_supported(layer)


OWN = """
import torch
from fedmpi.tasks.data import Data, Split
x = torch.arange(80.0).view(40, 2) % 5
y = (x[:, 0] > x[:, 1]).long()

def load(folder, kind):
    if kind == "dataset":
        return torch.utils.data.TensorDataset(x, y)
    if kind == "fails":
        return Data("mine", Split(x, y), Split(x, y), len(nothing))
    part = {"pixels": (x.byte(), y), "one": (x, torch.tensor(1)), "names": (x, x.numpy().astype(str)),
        "nan": (x / 0, y), "groups": (x, y, x)}.get(kind, (x, y))
    part = Split(*part)
    return Data("mine", part, part, "two" if kind == "classes" else 2)

def build(shape, classes):
    return torch.nn.Linear(3, classes)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


def test_own_data_that_does_not_fit_are_named(mine: str) -> None:
    from fedmpi.tasks.data import load

    for kind, error, message in (
        (
            "dataset",
            ConfigError,
            r"returned a TensorDataset, expected load\(.*; return the pair \(training set",
        ),
        ("fails", ConfigError, rf"data\.name: .*NameError: name 'nothing' is not defined \({mine}\.py:11\)$"),
        ("names", DataError, r"train\.y: expected a tensor or an array of numbers, .* got a ndarray of <U"),
        ("pixels", DataError, r"train\.x: expected .*, got torch\.uint8; .* \.float\(\) / 255 \(pixels\)"),
        ("one", DataError, r"train\.y: expected a tensor, a row a sample .* got a single number"),
        ("nan", DataError, r"train\.x: expected finite numbers"),
        ("groups", DataError, r"train\.groups: expected torch\.int64, got torch\.float32"),
        ("classes", DataError, r"classes: expected an integer of at least 1, got 'two'"),
    ):
        with pytest.raises(error, match=message):
            load(f"{mine}:load", kind=kind)


def test_own_code_is_looked_at_before_a_run(mine: str) -> None:
    values = {
        "data": {"name": f"{mine}:load", "kind": "good"},
        "clients": 4,
        "rounds": 1,
        "local": {"lr": 0.1},
        "method": "dense",
    }
    run = config.parse({**values, "model": f"{mine}:build"})
    with pytest.raises(ConfigError, match=rf"model {mine}:build: its forward fails on .*mat1 and mat2"):
        parts.load(run)
    Path(f"{mine}_b.py").write_text("import torch\n\n\nnone_such\n")
    with pytest.raises(ConfigError, match=rf"importing {mine}_b failed: NameError: .* \({mine}_b\.py:4\)$"):
        build(f"{mine}_b:build", (2,), 2, 0)
