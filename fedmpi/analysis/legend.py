"""Words for pictures: what runs have in common, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fedmpi.methods import METHODS

_APART = ("seed", "comm", "threads", "timeout", "checkpoint", "store", "store_folder", "test_batch")


def named(name: str, options: Mapping[str, Any]) -> str:
    """``topk(ratio=0.05, feedback=True)``: a method, model or partition and what was chosen of it."""
    given = {key: value for key, value in options.items() if key != "name" and value is not None}
    inside = [f"{key}={_value(value)}" for key, value in given.items()]
    return f"{name}({', '.join(inside)})" if inside else name


def _value(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return named(value["name"], value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def method(options: Mapping[str, Any]) -> str:
    """A method of a resolved configuration: its options but those that have their default value."""
    name = str(options.get("name", "?"))
    fields = METHODS[name].options.model_fields if name in METHODS else {}
    chosen = {}
    for key, value in options.items():
        default = fields[key].get_default(call_default_factory=True) if key in fields else None
        default = default.model_dump() if isinstance(default, BaseModel) else default
        if key not in fields or value != default:
            inner = isinstance(value, Mapping) and value.get("name") in METHODS
            chosen[key] = method(value) if inner else value
    switches_last = sorted(chosen.items(), key=lambda one: isinstance(one[1], bool))
    return named(name, dict(switches_last))


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Keys with dots, and their values in words; what has a name is one value."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if key == "method" and isinstance(value, Mapping):
            found[key] = method(value)
        elif isinstance(value, Mapping) and not isinstance(value.get("name"), str):
            found |= _flat(value, f"{before}{key}.")
        elif value is not None:
            found[before + key] = _value(value)
    return found


def apart(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """For each configuration what tells it from the others, the method first; ``names`` where nothing does."""
    flat = [{k: v for k, v in _flat(config).items() if k.split(".")[0] not in _APART} for config in configs]
    keys = dict.fromkeys(["method", *(key for one in flat for key in one)])
    differ = [key for key in keys if len({one.get(key) for one in flat}) > 1]
    words = [
        ", ".join(one[key] if key == "method" else f"{key}={one[key]}" for key in differ if key in one)
        for one in flat
    ]
    if not differ:
        return list(names)
    return [
        label if label and words.count(label) == 1 else f"{label} [{name}]" if label else name
        for label, name in zip(words, names, strict=True)
    ]


def common(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys that have the same value in all configurations."""
    first = configs[0]
    return {key: first[key] for key in first if all(key in one and one[key] == first[key] for one in configs)}


def setting(configs: Sequence[Mapping[str, Any]]) -> str:
    """What the runs have in common: "digits, fcn(hidden=50), 40 clients, 20 a round, dirichlet(alpha=1)"."""

    alike = common(configs)
    words = [_value(value) for key in ("data", "model") if (value := alike.get(key)) is not None]
    if alike.get("mode") == "data_parallel":
        return ", ".join([*words, "data-parallel"])
    if (clients := alike.get("clients")) is not None:
        words.append(f"{clients} clients")
        if (cohort := alike.get("cohort")) is not None:
            words.append(f"{cohort} a round")
    if (partition := alike.get("partition")) is not None:
        words.append(_value(partition))
    return ", ".join(words)
