"""Turns what is wrong with a user's input into one sentence that names the key, the expected and the got."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fedmpi.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, argument: str) -> Any:
    """What a YAML file holds.

    Raises:
      ConfigError: it cannot be read, or is not YAML; names the command line's ``argument``.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{argument}: cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{argument}: {path} is not YAML: {error}") from None


def yaml_value(text: str, argument: str) -> Any:
    """The value of YAML on the command line.

    Raises:
      ConfigError: it is not YAML; names the command line's ``argument``.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"{argument}: expected YAML, got {text!r}; put what has {{…}} or […] into quotes"
        ) from None


def mapping(value: object, where: str) -> dict[str, Any]:
    """``value``, if it has keys.

    Raises:
      ConfigError: it has none.
    """
    if isinstance(value, dict):
        return value
    got = "nothing" if value is None else type(value).__name__
    raise ConfigError(f"{where}: expected a mapping of keys, got {got}")


def checked(model: type[Model], value: object, where: str = "") -> Model:
    """``value`` as a ``model``.

    Raises:
      ConfigError: all that is wrong with it, a line each, its keys below ``where``.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(describe(error, model, where)) from None


def suggest(got: object, valid: Iterable[str]) -> str:
    """`` did you mean 'topk'?`` where something is near, and the list of what is valid."""
    valid = list(valid)
    near = difflib.get_close_matches(str(got), valid, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(valid)}"


def name_in(where: str, value: Any, table: Mapping[str, object]) -> str:
    """The name in ``{name: …}``.

    Raises:
      ConfigError: there is none; it lists ``table``'s.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{where}: expected a name or {{name: …}}, got {value!r}; {suggest('', table)}")
    return str(value["name"])


def choose(where: str, value: Any, table: Mapping[str, object]) -> str:
    """The name in ``{name: …}``, when it is one of ``table``'s.

    Raises:
      ConfigError: there is no name, or no such row.
    """
    name = name_in(where, value, table)
    if name not in table:
        raise ConfigError(f"{where}.name: unknown {name!r}; {suggest(name, table)}")
    return name


def describe(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """All that a ValidationError of ``model`` says, a line each."""
    return "\n".join(_line(e, model, where) for e in error.errors())


def _line(problem: Any, model: type[BaseModel], where: str) -> str:
    keys = [str(part) for part in problem["loc"]]
    path = ".".join([where, *keys] if where else keys)
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key; {suggest(keys[-1], _fields(model, keys[:-1]))}"
    if problem["type"] == "missing":
        return f"{path}: required, not given"
    message = problem["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    # A check of several keys together names them itself; its input is the whole section.
    return f"{path}: {message}, got {problem['input']!r}" if path else message


def _fields(model: type[BaseModel], keys: list[str]) -> list[str]:
    for key in keys:
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
