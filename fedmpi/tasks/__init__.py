"""What is trained: data, models, partitions and objectives, each one explicit table of names.

The tables' values say which options a name takes (an :class:`Options` model), so that a configuration
is checked before anything is loaded or built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmpi.errors import ConfigError
from fedmpi.validation import describe, suggest

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound="Options")


class Options(BaseModel):
    """Base of the options of one model or partition: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """The row ``name`` of ``table``; ConfigError with the valid names and the nearest one if it has none."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; {suggest(name, table)}")
    return table[name]


def parse_options(what: str, model: type[OptionsT], given: Mapping[str, object]) -> OptionsT:
    """``given`` as a checked ``model``; ConfigError that names every option at fault and the valid ones."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError(describe(error, model, what)) from None
