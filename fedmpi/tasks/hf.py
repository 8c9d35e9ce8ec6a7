"""What needs the extra ``hf`` (transformers, datasets): found, imported late, and its errors named."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.tasks.dataset import Places, default_folder


def library(name: str) -> Any:
    """The module ``transformers`` or ``datasets``.

    Raises:
      ConfigError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} is needed and cannot be imported ({error}); pip install 'fedmpi[hf]'"
        ) from error


def local(name: str, places: Places = ()) -> str:
    """``name`` as a folder where it is one, itself or in a folder for data sets; else as it is, a hub name."""
    folders = (Path(name).expanduser(), *(place / name for place in (*places, default_folder())))
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), name)


def tokenizer(name: str, places: Places = ()) -> Any:
    """transformers' tokenizer of a local folder or hub name.

    Raises:
      ConfigError: there is none (says where it looked), or transformers is not installed.
    """
    return loaded("data.tokenizer", name, library("transformers").AutoTokenizer.from_pretrained, places)


def loaded(argument: str, name: str, load: Callable[..., Any], places: Places = (), **options: Any) -> Any:
    """``load`` of the folder or hub name ``name``; ConfigError that names ``argument`` when it fails."""
    library("transformers").utils.logging.disable_progress_bar()  # one a rank, among the rounds' lines
    try:
        return load(local(name, places), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{argument}: expected a folder as transformers saves it (also looked for in "
            f"{default_folder() / name}; fedmpi data fetch minilm puts one there) or a hub name that can be "
            f"reached, got {name!r}: {type(error).__name__}: {first}"
        ) from error
