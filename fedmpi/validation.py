"""Turns what is wrong with a user's input into one sentence that names the key, the expected and the got."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator

from fedmpi import strict_yaml
from fedmpi.errors import ConfigError
from fedmpi.plain_file import NotPlainError, read_plain

_LARGEST = 1 << 20  # bytes of a YAML file
_LONGEST = 200  # characters of what was got, in a sentence
_ALL = 1_800  # characters of all that is wrong with a configuration
_GOT = reprlib.Repr()
_GOT.maxstring = _GOT.maxother = _GOT.maxlong = 100
_GOT.maxlevel, _GOT.maxdict, _GOT.maxlist, _GOT.maxtuple = 3, 6, 8, 8

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, argument: str) -> Any:
    """What a YAML file holds.

    Raises:
      ConfigError: it is no file, cannot be read, or is not YAML (:mod:`fedmpi.strict_yaml`); names the command
        line's ``argument``.
    """
    try:
        return strict_yaml.parse(read_plain(path, _LARGEST).decode("utf-8"))
    except NotPlainError as error:
        raise ConfigError(f"{argument}: expected a file of at most 1 MiB, got {path}, {error.what}") from None
    except strict_yaml.NotYaml as error:
        where = f"{path}, line {error.line}" if error.line else f"{path}"
        raise ConfigError(f"{argument}: {where}: {'not YAML: ' if error.syntax else ''}{error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{argument}: {path}: not YAML: expected text in UTF-8") from None
    except (OSError, ValueError) as error:  # a NUL in its name
        raise ConfigError(
            f"{argument}: cannot read {got(str(path))}: {getattr(error, 'strerror', error)}"
        ) from None


def yaml_value(text: str, argument: str) -> Any:
    """The value of YAML on the command line.

    Raises:
      ConfigError: it is not YAML (:mod:`fedmpi.strict_yaml`); names the command line's ``argument``.
    """
    try:
        return strict_yaml.parse(text)
    except strict_yaml.NotYaml as error:
        if not error.syntax:
            raise ConfigError(f"{argument}: {error}") from None
        raise ConfigError(
            f"{argument}: expected YAML, got {got(text)}; put what has {{…}} or […] into quotes"
        ) from None


def got(value: object) -> str:
    """``value`` as it is shown in a sentence: not longer than that."""
    text = _GOT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


class Strict(BaseModel):
    """Base of what a user's keys become: a boolean or a text is no number."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {int, float}:
            for one in value if isinstance(value, list | tuple) else [value]:
                if (
                    isinstance(one, bool | str)
                    and type(one) not in kinds
                    and not (isinstance(one, str) and str in kinds)
                ):
                    raise ValueError(f"expected a valid {'number' if float in kinds else 'integer'}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field's values may have."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _bounded(value: object, path: str, depth: int = 0) -> None:
    """Raises:
    ConfigError: a number in it is not finite or has no 64 bits, a key is no text, or it is nested without end.
    """
    if depth > strict_yaml.DEEPEST:
        raise ConfigError(
            f"{path[:_LONGEST]}…: expected at most {strict_yaml.DEEPEST} levels of keys, got more"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: expected a finite number, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: expected an integer of 64 bits, got one of {value.bit_length()}")
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path or 'keys'}: expected text as a key, got {got(key)}")
            _bounded(part, f"{path}.{_key(key)}" if path else _key(key), depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _bounded(part, path, depth + 1)


def no_words(value: object, where: str) -> None:
    """Raises:
    ConfigError: somewhere in it is a bare yes, no, on or off, which is text: nothing types what goes to own code.
    """
    if isinstance(value, strict_yaml.Word):
        raise ConfigError(
            f"{where}: {value} is text, no boolean; write true or false, or {value!r} in quotes"
        )
    if isinstance(value, Mapping):
        for key, part in value.items():
            no_words(part, f"{where}.{key}")
    elif isinstance(value, list):
        for part in value:
            no_words(part, where)


def _key(key: str) -> str:
    return key if len(key) <= 60 else f"{key[:60]}…"


def mapping(value: object, where: str) -> dict[str, Any]:
    """``value``, if it has keys.

    Raises:
      ConfigError: it has none.
    """
    if isinstance(value, dict):
        return value
    there = "nothing" if value is None else type(value).__name__
    raise ConfigError(f"{where}: expected a mapping of keys, got {there}")


def checked(model: type[Model], value: object, where: str = "") -> Model:
    """``value`` as a ``model``.

    Raises:
      ConfigError: all that is wrong with it, a line each, its keys below ``where``.
    """
    _bounded(value, where)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(describe(error, model, where)) from None


def suggest(given: object, valid: Iterable[str]) -> str:
    """`` did you mean 'topk'?`` where something is near, and the list of what is valid."""
    valid = list(valid)
    near = difflib.get_close_matches(str(given)[:60], valid, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(valid)}"


def name_in(where: str, value: Any, table: Mapping[str, object]) -> str:
    """The name in ``{name: …}``.

    Raises:
      ConfigError: there is none; it lists ``table``'s.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{where}: expected a name or {{name: …}}, got {got(value)}; {suggest('', table)}")
    return str(value["name"])


def choose(where: str, value: Any, table: Mapping[str, object]) -> str:
    """The name in ``{name: …}``, when it is one of ``table``'s.

    Raises:
      ConfigError: there is no name, or no such row.
    """
    name = name_in(where, value, table)
    if name not in table:
        raise ConfigError(f"{where}.name: unknown {got(name)}; {suggest(name, table)}")
    return name


def describe(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """What a ValidationError of ``model`` says, a line each, as far as one can read it."""
    lines = [_line(e, model, where) for e in error.errors()]
    shown = [line for n, line in enumerate(lines) if sum(map(len, lines[: n + 1])) <= _ALL] or [
        lines[0][:_ALL]
    ]
    more = len(lines) - len(shown)
    return "\n".join([*shown, f"and {more} more"] if more else shown)


def _line(problem: Any, model: type[BaseModel], where: str) -> str:
    keys = [_key(str(part)) for part in problem["loc"]]
    path = ".".join([where, *keys] if where else keys)
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key; {suggest(keys[-1], _fields(model, keys[:-1]))}"
    if problem["type"] == "missing":
        return f"{path}: required, not given"
    message = problem["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    message = message.replace("a valid tuple", "a list").replace("a valid list", "a list")
    # A check of several keys together names them itself; its input is the whole section.
    return f"{path}: {message}, got {got(problem['input'])}" if path else message


def _fields(model: type[BaseModel], keys: list[str]) -> list[str]:
    for key in keys:
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
