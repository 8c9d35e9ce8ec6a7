"""A user's own model and data by import path, and what is shown of who holds what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmpi import config, methods
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError, DataError
from fedmpi.method import Method
from fedmpi.methods.base import MeanServer
from fedmpi.methods.dense import Dense
from fedmpi.optimizers import Optimizer
from fedmpi.spec import Spec
from fedmpi.tasks.data import load
from fedmpi.tasks.models import build
from fedmpi.tasks.partitions import divide, split

from .conftest import SMALL, write_config

MODULE = """
import torch
from torch import nn
from fedmpi.tasks.data import Data, Split

def load(folder, samples=40, wrong=False):
    x = torch.arange(samples * 2.0).view(samples, 2) % 5
    y = (x[:, 0] > x[:, 1]).long()
    split = Split(x, y[:-1] if wrong else y, torch.arange(samples) // 10)
    return Data("mine", split, split, 2)

def build(shape, classes, hidden=3):
    return nn.Sequential(nn.Linear(*shape, hidden), nn.Tanh(), nn.Linear(hidden, classes))

def text(shape, classes):
    return "a model"

number = 4
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder; a name of its own, because Python keeps what it has imported."""
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_own_model_and_data_train(mine: str) -> None:
    parsed = config.parse(
        SMALL
        | {
            "data": {"name": f"{mine}:load", "samples": 50},
            "model": {"name": f"{mine}:build", "hidden": 4},
            "partition": "natural",
            "clients": 5,
        }
    )
    assert config.parse(parsed.plain()) == parsed
    simulation = Simulation(parsed, solo())
    assert simulation.spec.size == 2 * 4 + 4 + 4 * 2 + 2
    assert simulation.partition.sizes.tolist() == [10] * 5
    assert simulation.round(0)["loss"] > 0
    state = torch.get_rng_state()
    first, second = (build(f"{mine}:build", (2,), 2, 5).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_own_method_trains_alone_and_inside_a_wrapper() -> None:
    """configs/own.py's, which tests/test_conformance.py takes through all properties."""
    own = {"name": "configs.own:SIGN", "feedback": True}
    for method in (own, {"name": "lookback", "threshold": 0.5, "inner": own}):
        parsed = config.parse(SMALL | {"method": method})
        assert config.parse(parsed.plain()) == parsed
        assert Simulation(parsed, solo()).round(0)["upload_bytes"] > 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "none_such:SIGN"}, "method.name: cannot import 'none_such:SIGN'"),
        (
            {"name": "configs.own:SIGM"},
            "method.name: cannot import .* 'SIGM'.* to a fedmpi.methods.base.Entry",
        ),
        (
            {"name": "configs.own:load"},
            "method.name: configs.own:load is a function, expected a fedmpi.methods",
        ),
        ({"name": "configs.own:SIGN", "ratio": 1}, "method.ratio: unknown key; .*valid: name, feedback"),
        (
            {"name": "prune", "keep": 0.1, "inner": {"name": "configs.own:SIGN"}},
            "method.inner: prune does not go over configs.own:SIGN; valid: topk",
        ),
    ],
)
def test_own_method_that_does_not_fit_is_named(method: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.parse(method)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("none_such:build", {}, "cannot import 'none_such:build'"),
        ("{}:bild", {}, r"cannot import .* has no attribute 'bild'"),
        ("{}:number", {}, "is a int, expected a function build"),
        ("{}:build", {"hiden": 3}, r"does not take what it is given .*'hiden'.*expected build\(shape"),
        ("{}:text", {}, "returned a str, expected build"),
    ],
)
def test_own_models_that_cannot_be(mine: str, path: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(path.format(mine), (2,), 2, 0, **options)


def test_own_data_that_cannot_be(mine: str) -> None:
    with pytest.raises(ConfigError, match="returned a str, expected load"):
        load(f"{mine}:text", classes=2)
    with pytest.raises(DataError, match=r"train\.y: expected a tensor, a row a sample .*, got 39"):
        load(f"{mine}:load", wrong=True)


def test_ten_thousand_clients_of_one_class_and_five_images() -> None:
    """The intrinsic compression paper's CIFAR-10 setting, section 5."""
    y = torch.arange(50_000) % 10
    partition = split("labels", y, 10_000, 3, labels_per_client=1)
    assert partition.sizes.unique().tolist() == [5]
    held = y[partition.index_N].view(10_000, 5)
    assert torch.equal(held, held[:, :1].expand(-1, 5))


def test_natural_keeps_groups_together() -> None:
    groups = torch.tensor([7, 3, 7, 9, 3, 4, 4, 4, 9, 7])
    y = torch.zeros(10, dtype=torch.int64)
    four, two = (split("natural", y, n, 5, groups) for n in (4, 2))
    assert all(len(groups[four.of(c)].unique()) == 1 for c in range(4))
    assert four.index_N.sort().values.tolist() == list(range(10))
    assert [len(groups[two.of(c)].unique()) for c in range(2)] == [2, 2]
    with pytest.raises(ConfigError, match="clients: expected at most 4"):
        split("natural", y, 5, 5, groups)
    with pytest.raises(
        ConfigError, match=r"expected data that say whose each sample is, .*; for any data: iid, power$"
    ):
        split("natural", y, 2, 5)


def test_power_law_sizes() -> None:
    y = torch.zeros(10_000, dtype=torch.int64)
    partition = split("power", y, 100, 5, exponent=1.0, minimum=2)
    sizes = partition.sizes.sort(descending=True).values
    assert int(sizes.sum()) == 10_000
    assert sizes.min() >= 2
    want = 9_800 / torch.arange(1, 101) / (1 / torch.arange(1, 101)).sum() + 2
    assert (sizes - want).abs().max() <= 1.01
    assert partition.index_N.sort().values.equal(torch.arange(10_000))
    assert split("power", y, 100, 5, exponent=0.0).sizes.unique().tolist() == [100]
    with pytest.raises(ConfigError, match="minimum: expected at most 100"):
        split("power", y, 100, 5, minimum=101)


def test_label_partitions_need_labels() -> None:
    for name in ("labels", "dirichlet"):
        with pytest.raises(ConfigError, match=f"partition {name}: expected data with a class a sample"):
            split(name, torch.zeros(9, 2), 3, 1)
    assert split("iid", torch.zeros(9, 2), 3, 1).sizes.tolist() == [3, 3, 3]


def test_data_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    path = write_config(tmp_path, SMALL)
    assert (
        main(
            [
                "data",
                "show",
                path,
                "partition={name: labels, labels_per_client: 2}",
                "--plot",
                str(tmp_path / "p.png"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "digits, partition labels: 6 clients, 1437 samples" in said
    assert "classes a client: 2 (6 clients)" in said
    train = load("digits").train
    mine = train.y[divide("labels", train, 6, 3, labels_per_client=2).of(0)].bincount(minlength=10)
    row = "  ".join(f"{k}: {n}" for k, n in enumerate(mine.tolist()) if n)
    assert f"     0  {int(mine.sum()):7}  {row}\n" in said
    assert Image.open(tmp_path / "p.png").size[0] > 500
    assert main(["data", "show", path, "--plot", str(tmp_path / "none" / "p.png")]) == 2
    assert "--plot: cannot write to" in capsys.readouterr().err


def test_a_method_written_for_an_older_fedmpi_says_what_was_renamed() -> None:
    up, server = Dense(Spec(("w",), ((3,),))), MeanServer(Spec(("w",), ((3,),)), Optimizer())
    with pytest.raises(
        ConfigError, match=r"expected a tuple of compressors, .* is Method\(\(up,\), server, decoder\)"
    ):
        Method(up, server)  # type: ignore[arg-type]
    for old, new in (("first", "between"), ("memory", "Decoder.memory"), ("gradient", "Decoder.direction")):
        with pytest.raises(ConfigError, match=rf"Mine\.{old}: this is now .*{new}"):
            type("Mine", (MeanServer,), {old: lambda self: None})
