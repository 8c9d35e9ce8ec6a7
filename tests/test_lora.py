"""Adapters: they alone are trained and travel, and the saved model is the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedmpi import config
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError
from fedmpi.tasks.data import Data, Split
from fedmpi.tasks.dataset import default_folder
from fedmpi.tasks.models import build

from .conftest import SMALL, model_hash
from .interrupted import train

TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
LORA = {"rank": 2, "targets": ["value", "dense"]}


def sentences(folder: Path) -> Data:
    """Which of two words occurs more often."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 30, (120, 10), generator=generator)
    y = ((x == 3).sum(1) + (x > 15).sum(1) > 5).long()
    return Data("sentences", Split(x[:90], y[:90]), Split(x[90:], y[90:]), 2)


def values(**lora: Any) -> dict[str, Any]:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    pytest.importorskip("peft")
    model = {"name": "encoder", "settings": TINY, "lora": {**LORA, **lora}}
    return {
        **SMALL,
        "data": f"{__name__}:sentences",
        "model": model,
        "partition": "iid",
        "rounds": 3,
        "local": {"lr": 0.5, "steps": 2, "batch": 10},
        "reproducible": True,
    }


def adapters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze_a", [False, True])
def test_only_adapters_train_and_travel(freeze_a: bool, tmp_path: Path) -> None:
    given = values(freeze_a=freeze_a)
    summary = train(given, tmp_path / "1")
    train(given, tmp_path / "2", ranks=2)
    assert model_hash(tmp_path / "1") == model_hash(tmp_path / "2")
    made = Simulation(config.parse(given), solo())
    named, start = adapters(made.trainer.model), made.trainer.load(made.replica.parameters()).state_dict()
    kinds = {"lora_B", "out"} | (set() if freeze_a else {"lora_A"})
    assert {next(kind for kind in ("lora_A", "lora_B", "out") if kind in name) for name in named} == kinds
    # Two layers with maps 8 → 8, 8 → 8, 8 → 16 and 16 → 8: 80 numbers in A, as many in B; the last map has 2·8 + 2.
    size = 2 * 80 * (1 if freeze_a else 2) + 18
    assert summary["params"] == size
    assert summary["upload_bytes"] == 4 * size * summary["messages"]
    saved = load_file(tmp_path / "1" / "model.safetensors")
    assert {name for name, value in saved.items() if not torch.equal(value, start[name])} == set(named)
    model = build("encoder", (10,), 2, 0, settings=TINY, lora={**LORA, "freeze_a": freeze_a})
    model.load_state_dict(saved, strict=True)


def test_averages_of_b_are_exact_where_a_is_frozen() -> None:
    """The mean of clients' B A is the mean B times A; with both trained it is not."""
    apart = {}
    for freeze_a in (False, True):
        made = Simulation(config.parse({**values(freeze_a=freeze_a), "cohort": 6}), solo())
        for t in range(3):
            made.round(t)
        x_X, ids = made.replica.parameters(), torch.arange(6)
        update = made.trainer.train(x_X, made.data.train, made.partition, ids, 3)
        weights = made.partition.sizes.double() / made.partition.sizes.sum()

        def product(x: Tensor) -> Tensor:
            tensors = dict(made.trainer.load(x).named_parameters())  # noqa: B023 - called at once
            b = next(name for name in tensors if "value.lora_B" in name)
            return (tensors[b] @ tensors[b.replace("lora_B", "lora_A")]).detach().double()

        lr = made.config.local.lr
        after = [x_X - lr * g for g in update.g_CD]
        mean = sum(w * product(x) for w, x in zip(weights, after, strict=True))
        of_mean = product(sum(float(w) * x for w, x in zip(weights, after, strict=True)))  # type: ignore[arg-type]
        apart[freeze_a] = float((mean - of_mean).norm() / of_mean.norm())
    assert apart[True] < 1e-6
    assert apart[False] > 1e-4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"lora": {"targets": ["keys"]}},
            r"model encoder\.lora\.targets: expected ends of the names .*query, key",
        ),
        ({"lora": {"rank": 0}}, "greater than 0"),
        ({"lora": {}, "train": "head"}, r"model encoder\.lora: expected none with train: head"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(model: dict[str, Any], message: str) -> None:
    values()
    with pytest.raises(ConfigError, match=message):
        build("encoder", (10,), 2, 0, settings=TINY, **model)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_minilm_learns(tmp_path: Path) -> None:
    """The configuration that is shipped: less than a hundredth travels, and it is better than the commoner class."""
    values()
    if not all((default_folder() / name).is_dir() for name in ("minilm", "movie-reviews")):
        pytest.skip("fedmpi data fetch minilm, movie-reviews: not fetched")
    path = Path(__file__).parent.parent / "configs" / "clients" / "minilm-lora.yaml"
    parsed = config.load(path, ["rounds=20", "evaluate_every=20", "data.limit=2000", "data.length=20"])
    summary = train(parsed.plain(), tmp_path)
    assert summary["params"] < 100_000
    assert summary["accuracy"] > 0.6
