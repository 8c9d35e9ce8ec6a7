"""The table of methods, and what is read and built by a row's name. Wrappers take their inner method from here, so the
rows are filled in by :mod:`fedmpi.methods`, which imports all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BeforeValidator

from fedmpi import own
from fedmpi.errors import ConfigError
from fedmpi.method import Method
from fedmpi.methods.base import Entry, Options, Setup
from fedmpi.spec import Spec
from fedmpi.validation import checked, choose, name_in

METHODS: dict[str, Entry] = {}


def entry(name: str, where: str = "method") -> Entry:
    """The row ``name``, or the one that an import path of your own names.

    Raises:
      ConfigError: there is none.
    """
    if not own.is_path(name):
        return METHODS[choose(where, {"name": name}, METHODS)]
    found = own.find(f"{where}.name", name, "to a fedmpi.methods.base.Entry")
    if not isinstance(found, Entry):
        raise ConfigError(
            f"{where}.name: {name} is a {type(found).__name__}, expected a fedmpi.methods.base.Entry"
        )
    return found


def parse(value: Any, where: str = "method") -> Options:
    """The options of ``{name: topk, ratio: 0.01}`` or of the bare name.

    Raises:
      ConfigError: an unknown method or option, or a value of the wrong type or range.
    """
    if isinstance(value, Options):
        return value
    if isinstance(value, str):
        value = {"name": value}
    return checked(entry(name_in(where, value, METHODS), where).options, value, where)


def parse_inner(value: Any, wrapper: str) -> Options:
    """The options of the method that ``wrapper`` is laid over.

    Raises:
      ConfigError: as :func:`parse`, or the wrapper cannot be laid over it.
    """
    options, allowed = parse(value, "method.inner"), entry(wrapper).wraps
    inner, names = entry(options.name), [name for name, row in METHODS.items() if _plain(row)]
    valid: Sequence[str] = names if allowed == "any" else allowed
    if not (_plain(inner) if allowed == "any" else options.name in valid):
        raise ConfigError(
            f"method.inner: {wrapper} does not go over {options.name}; valid: {', '.join(valid)}"
        )
    return options


def _plain(row: Entry) -> bool:
    """It wraps none and has one pass: any wrapper goes over it."""
    return not row.wraps and not row.two_passes


def build(options: Options | dict[str, Any] | str, spec: Spec, setup: Setup) -> Method:
    """The method for a parameter layout.

    Raises:
      ConfigError: the options are wrong, or do not fit a model of this size.
    """
    options = parse(options)
    return entry(options.name).build(options, spec, setup)


def inner_of(wrapper: str) -> BeforeValidator:
    """Reads the option ``inner`` of a wrapper (:func:`parse_inner`)."""
    return BeforeValidator(lambda value: parse_inner(value, wrapper))
