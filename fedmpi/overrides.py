"""A configuration before it is checked: a YAML file, the file that it starts from, and key.path=value overrides."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.validation import got, read_yaml, yaml_value


def read(path: Path, depth: int = 0) -> Any:
    """What a YAML file holds, over what its base holds.

    Raises:
      ConfigError: one of them cannot be read, or the chain of bases has no end.
    """
    with suppress(OSError, ValueError):  # a name that no file can have: read_yaml says so
        if not path.exists():
            raise ConfigError(
                f"config: cannot read {got(str(path))}: no such file, seen from {Path.cwd()}; fedmpi init writes "
                f"configs/quickstart.yaml and more"
            )
    values = read_yaml(path, "config")
    if not isinstance(values, dict) or "base" not in values:
        return values
    if depth == 8:
        raise ConfigError(f"base: {path} is the ninth file of a chain (does one name itself?)")
    base = values.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"base: expected a file's path, got {got(base)}, in {path}")
    return merge(read(path.parent / base, depth + 1), values)


def merge(base: Any, over: Any) -> Any:
    """``over`` laid over ``base``, key by key; what has a name (a method, a model) replaces as a whole."""
    if not isinstance(base, dict) or not isinstance(over, dict) or "name" in over:
        return over
    return base | {key: merge(base.get(key), value) for key, value in over.items()}


def override(values: Any, text: str) -> None:
    """Set ``key.path=value`` in ``values``.

    Raises:
      ConfigError: it is no such thing, or leads through a value that has no keys.
    """
    path, equals, after = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override: expected key.path=value, got {got(text)}")
    value = yaml_value(after, f"override {path}=")
    _put(values, keys, value, text)


def lay(values: Any, changes: Mapping[str, Any]) -> None:
    """Lay a mapping from Python over ``values``: keys may be paths (``"server.lr"``); what has a name replaces as a
    whole, other mappings go key by key.

    Raises:
      ConfigError: a path leads through a value that has no keys.
    """
    for path, value in changes.items():
        *outer, last = path.split(".")
        if outer or not isinstance(value, Mapping) or not isinstance(values, dict):
            _put(values, [*outer, last], value, f"{path}={value}")
        else:
            before = values.get(last)
            values[last] = merge({"name": before} if isinstance(before, str) else before, dict(value))


def _put(values: Any, keys: list[str], value: Any, text: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.get(key) if isinstance(values, dict) else None
        if inner is None:
            inner = {}
        elif isinstance(inner, str):
            inner = {"name": inner}  # model: cnn, then model.hidden=64
        elif not isinstance(inner, dict):
            raise ConfigError(
                f"override: expected {'.'.join(keys[: depth + 1])} to have keys inside, got {got(inner)}, in "
                f"{got(text)}"
            )
        values[key] = inner
        values = inner
    values[keys[-1]] = value
