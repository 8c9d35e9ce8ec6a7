"""What is trained: data, models, partitions and objectives, each one explicit table of names.

The tables' values say which options a name takes (an :class:`Options` model), so that a configuration
is checked before anything is loaded or built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from fedmpi.errors import ConfigError
from fedmpi.validation import suggest

T = TypeVar("T")


class Options(BaseModel):
    """Base of the options of one model or partition: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """The row ``name`` of ``table``; ConfigError with the valid names and the nearest one if it has none."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; {suggest(name, table)}")
    return table[name]
