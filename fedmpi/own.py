"""A user's own model, data set or method, named by an import path: ``mypackage.mymodule:name``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError


def is_path(name: str) -> bool:
    """Whether ``name`` is meant as an import path."""
    return ":" in name


def call(argument: str, path: str, *positional: Any, options: Mapping[str, Any], usage: str) -> Any:
    """What the function of ``path`` returns for ``positional`` and the keywords ``options``.

    Raises:
      ConfigError: there is no such module or function (see :func:`find`), or it does not take these options
        (names ``argument`` and shows ``usage``). What the function itself raises is passed on.
    """
    function = find(argument, path, f"to a function {usage}")
    if not callable(function):
        raise ConfigError(f"{argument}: {path} is a {type(function).__name__}, expected a function {usage}")
    try:
        inspect.signature(function).bind(*positional, **options)
    except TypeError as error:
        raise ConfigError(
            f"{argument}: {path} does not take what it is given ({error}); expected {usage}"
        ) from error
    except ValueError:
        pass  # a builtin that does not show its signature
    return function(*positional, **options)


def find(argument: str, path: str, usage: str) -> Any:
    """What ``path`` names. The module is looked for in the current folder too.

    Raises:
      ConfigError: there is no such module, or nothing of this name in it.
    """
    module, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{argument}: cannot import {path!r} ({error}); expected an import path package.module:name "
            f"that can be imported from {here}, {usage}"
        ) from error
    return found
