"""A user's own model or data set, named by an import path: ``mypackage.mymodule:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from fedmpi.errors import ConfigError


def is_path(name: str) -> bool:
    """Whether ``name`` is meant as an import path."""
    return ":" in name


def call(argument: str, path: str, *positional: Any, options: Mapping[str, Any], usage: str) -> Any:
    """What the function of ``path`` returns for ``positional`` and the keywords ``options``.

    The module is looked for in the current folder too.

    Raises:
      ConfigError: there is no such module or function, or it does not take these options (names ``argument``
        and shows ``usage``). What the function itself raises is passed on.
    """
    function = _function(argument, path, usage)
    try:
        inspect.signature(function).bind(*positional, **options)
    except TypeError as error:
        raise ConfigError(
            f"{argument}: {path} does not take what it is given ({error}); expected {usage}"
        ) from error
    except ValueError:
        pass  # a builtin that does not show its signature
    return function(*positional, **options)


def _function(argument: str, path: str, usage: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{argument}: cannot import {path!r} ({error}); expected an import path package.module:function "
            f"that can be imported from here, to a function {usage}"
        ) from error
    if not callable(found):
        raise ConfigError(f"{argument}: {path} is a {type(found).__name__}, expected a function {usage}")
    return cast(Callable[..., Any], found)
