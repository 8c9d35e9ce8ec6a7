"""Files, bases and overrides. What is refused, and how, is in tests/test_errors.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedmpi import config, methods
from fedmpi.errors import ConfigError

from .conftest import SMALL

CONFIGS = Path(__file__).parent.parent / "configs"
# Grids of sweeps and the list of claims are no configurations: tests/test_claims.py reads them.
OTHERS = ("*.over.yaml", "claims.yaml")
SHIPPED = sorted(p for p in CONFIGS.rglob("*.yaml") if not any(map(p.match, OTHERS)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    loaded = config.load(path)
    assert config.parse(loaded.plain()) == loaded, "the resolved form reads back as the same"


def test_overrides_are_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "method": "topk"}))
    loaded = config.load(path, ["method.ratio=0.1", "local.lr=1e-3", "cohort=0.5", "server.lr=2"])
    assert loaded.method == methods.parse({"name": "topk", "ratio": 0.1})
    assert (loaded.local.lr, loaded.cohort_size, loaded.server_lr(0)) == (0.001, 3, 2.0)
    assert config.load(path, ["method={name: dense}"]).method.name == "dense"
    assert config.load(path, ["cohort=null"]).cohort_size == 6


def test_a_base_is_overlaid_and_named_parts_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**SMALL, "method": {"name": "topk", "ratio": 0.5}}))
    (tmp_path / "sub" / "c.yaml").write_text("base: ../base.yaml\nlocal: {lr: 0.3}\nmethod: {name: dense}\n")
    loaded = config.load(tmp_path / "sub" / "c.yaml")
    assert (loaded.local.lr, loaded.local.steps, loaded.method.name) == (0.3, 2, "dense")
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ConfigError, match="does one name itself"):
        config.load(tmp_path / "loop.yaml")


def test_a_configuration_that_says_little_is_what_its_checkpoint_says() -> None:
    """Each default stands with all its options, as it comes back from a file: else a run could not be resumed."""
    little = {
        "data": "digits",
        "model": "linear",
        "clients": 6,
        "local": {"lr": 0.1},
        "rounds": 2,
        "method": "dense",
    }
    parsed = config.parse(little)
    assert config.parse(parsed.plain()).plain() == parsed.plain()
