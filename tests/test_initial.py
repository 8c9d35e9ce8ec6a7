"""A run starts from a file of values: an earlier run's, anybody's of the same model, on every rank the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmpi import config
from fedmpi.comm import run_ranks, solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.tasks.models import MODELS, build

from .interrupted import SAVED, only, train

MODULE = """
from torch import nn

class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.a, self.out = nn.Linear(64, 64), nn.Linear(64, classes)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.a(self.norm(x.flatten(1)))))

def build(shape, classes):
    return Tied(classes)

def own(shape, classes, init="mine"):
    net = Tied(classes)
    net.named = init
    return net
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_of_initial.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "mine_of_initial"


def test_every_model_can_start_from_a_file() -> None:
    assert all("init" in row.options.model_fields for row in MODELS.values())


def test_a_run_starts_where_another_ended(tmp_path: Path, mine: str) -> None:
    """With batch norm's buffers and tied weights, at more ranks."""
    values = {**SAVED, "model": f"{mine}:build", "rounds": 3}
    train(values, tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    parsed = config.parse({**values, "seed": 9, "model": {"name": f"{mine}:build", "init": str(file)}})
    assert config.parse(parsed.plain()) == parsed

    def begin(comm: Any) -> dict[str, Tensor]:
        made = Simulation(parsed, comm)
        return dict(made.trainer.load(made.replica.parameters()).state_dict())

    expected = load_file(file)
    for found in (begin(solo()), *run_ranks(2, begin)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_tied_weights_need_one_name_and_other_precisions_are_taken(tmp_path: Path, mine: str) -> None:
    values = {
        name: value.clone() for name, value in build(f"{mine}:build", (64,), 10, 5).state_dict().items()
    }
    halves = {n: v.half() if v.is_floating_point() else v for n, v in values.items() if n != "b.weight"}
    save_file(halves, tmp_path / "a.safetensors")
    found = build(f"{mine}:build", (64,), 10, 6, init=str(tmp_path / "a.safetensors"))
    assert found.a.weight is found.b.weight
    assert torch.equal(found.b.weight, values["a.weight"].half().float())
    assert torch.equal(found.out.bias, values["out.bias"].half().float())


def test_an_own_models_own_option_is_its_own(mine: str) -> None:
    assert build(f"{mine}:own", (64,), 10, 5, init="x").named == "x"


def test_a_file_that_does_not_fit_is_named(tmp_path: Path, mine: str) -> None:
    def refused(message: str, tensors: dict[str, Tensor] | None = None, name: str = "linear") -> None:
        path = tmp_path / "a.safetensors"
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(ConfigError, match=message):
            build(name, (64,), 10, 0, init=str(path))

    good = {n: v.clone() for n, v in build("linear", (64,), 10, 0).state_dict().items()}
    weight, bias = list(good)
    refused("model.init: .*a.safetensors: expected a file, there is none in")
    refused(f"expected the tensors of model linear, it lacks 1: {bias}, …", {weight: good[weight]})
    refused(
        "expected the tensors of model linear, it has 1 others: 'extra', …", good | {"extra": good[bias] + 0}
    )
    refused(rf"{bias}: expected \(10,\) of torch.float32, got \(9,\)", good | {bias: torch.zeros(9)})
    refused(
        rf"{bias}: expected \(10,\) of torch.float32, got .* of torch.int64",
        good | {bias: torch.zeros(10).long()},
    )
    refused(f"{bias}: expected finite numbers", good | {bias: torch.full((10,), torch.nan)})
    tied = {n: v.clone() for n, v in build(f"{mine}:build", (64,), 10, 0).state_dict().items()}
    tied["b.weight"] += 1
    refused("expected one value of a.weight, b.weight, which are tied, got several", tied, f"{mine}:build")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    refused("expected safetensors")
    for word, message in (
        ("model.pt", r"expected the path of a \.safetensors file, got .*pretrained, the name"),
        (
            "pretrained",
            r"no pretrained values of model linear here; save those .* set model\.init: FILE, or let",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            build("linear", (64,), 10, 0, init=word)


def test_a_resumed_run_has_the_same_file(tmp_path: Path) -> None:
    model = build("linear", (1, 8, 8), 10, 1)
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for i, path in enumerate(paths):
        save_file({n: v + i for n, v in model.state_dict().items()}, path)
    at = tmp_path / "here.safetensors"
    values = {**SAVED, "model": {"name": "linear", "init": str(at)}, "checkpoint": {"rounds": 1, "keep": 9}}

    at.write_bytes(Path(paths[0]).read_bytes())
    train(values, tmp_path / "run")
    only(tmp_path / "run", 2)
    at.write_bytes(Path(paths[1]).read_bytes())
    with pytest.raises(
        ConfigError, match=r"--resume: model\.init is not what .*; go on with the same file, or"
    ):
        train(values, tmp_path / "run", resume=True)
