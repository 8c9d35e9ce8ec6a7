"""Options of look-back that cannot be. Its numerics are in tests/test_numerics.py."""

from __future__ import annotations

from typing import Any

import pytest

from fedmpi import config
from fedmpi.errors import ConfigError

from .conftest import SMALL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": {"name": "topk", "q": 1}}, "method.inner.q: unknown key"),
        ({"inner": "lookback"}, "method.inner: lookback does not go over lookback; valid: dense, signsgd"),
        ({"threshold": 2}, "method.threshold: expected less than or equal to 1, got 2"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse({**SMALL, "method": {"name": "lookback", **options}})
