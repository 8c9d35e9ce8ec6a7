"""A user's own model, data set or method, named by an import path: ``mypackage.mymodule:name``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError, FedMPIError

_LIBRARY = (
    "site-packages",
    "dist-packages",
    str(Path(__file__).parent),
    str(Path(os.__file__).parent),
    "<frozen",
)

_LONGEST = 300  # characters of a foreign error


def is_path(name: str) -> bool:
    """Whether ``name`` is meant as an import path."""
    return ":" in name


def call(argument: str, path: str, *positional: Any, options: Mapping[str, Any], usage: str) -> Any:
    """What the function of ``path`` returns for ``positional`` and the keywords ``options``.

    Raises:
      ConfigError: there is no such module or function (see :func:`find`), it does not take these options (names
        ``argument`` and shows ``usage``), or it raised (says what and where).
    """
    function = _function(argument, path, positional, options, usage)
    try:
        return function(*positional, **options)
    except FedMPIError:
        raise
    except Exception as error:
        raise ConfigError(f"{argument}: {path} failed: {said(error)}") from error


def takes(argument: str, path: str, option: str, usage: str) -> bool:
    """Whether the function of ``path`` has a parameter of this name.

    Raises:
      ConfigError: there is no such function.
    """
    function = find(argument, path, f"to a function {usage}")
    try:
        return option in inspect.signature(function).parameters
    except (TypeError, ValueError):  # no function, or one that does not show its signature
        return False


def bound(argument: str, path: str, options: Mapping[str, Any], usage: str) -> Callable[[Any, Any], Any]:
    """The function of ``path`` with the keywords ``options``, to be called with two positional arguments.

    Raises:
      ConfigError: there is no such function, or it does not take these options (as :func:`call`).
    """
    return partial(_function(argument, path, (None, None), options, usage), **options)


def _function(
    argument: str, path: str, positional: Sequence[Any], options: Mapping[str, Any], usage: str
) -> Callable[..., Any]:
    function: Any = find(argument, path, f"to a function {usage}")
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
    return function  # type: ignore[no-any-return]


def said(error: Exception) -> str:
    """What a user's code raised, in one line, and the file and line of theirs that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not any(part in f.filename for part in _LIBRARY)]
    where = (theirs or frames)[-1:]
    words = " ".join(traceback.format_exception_only(error)[-1].split())
    if len(str(error).splitlines()) > 1:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
    return words + "".join(f" ({_short(f.filename)}:{f.lineno})" for f in where)


def _short(path: str) -> str:
    here = str(Path.cwd()) + os.sep
    return path.removeprefix(here)


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
    except FedMPIError:
        raise
    except Exception as error:
        raise ConfigError(f"{argument}: importing {module} failed: {said(error)}") from error
    return found
