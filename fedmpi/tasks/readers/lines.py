"""Text files and JSON files, whose errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmpi.errors import DataError

# Bytes of a file that is read whole; the largest in use, COCO's annotations, have 0.5 billion.
_LARGEST = 4 << 30
_LONGEST = 1024  # characters of a file's name, with its folders


def regular(path: Path) -> Path:
    """``path``; DataError when it is a pipe or a device, which would never end, or a file that no memory holds."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: expected a plain file, got a pipe or a device")
    if path.is_file() and (length := path.stat().st_size) > _LARGEST:
        raise DataError(f"{path}: expected at most {_LARGEST} bytes, got {length}")
    return path


def inside(folder: Path, name: object, listed: Path) -> Path:
    """The path of the file ``name`` in ``folder``, as the file ``listed`` calls it.

    Raises:
      DataError: it is no name, or leads out of the folder (``..``, an absolute path, a link).
    """
    try:
        if (
            isinstance(name, str)
            and 0 < len(name) <= _LONGEST
            and not Path(name).is_absolute()
            and ".." not in Path(name).parts
        ):
            path = folder / name
            if path.resolve().is_relative_to(folder.resolve()):
                return path
    except (OSError, ValueError, RuntimeError):  # a zero byte, a name that is too long, links in a circle
        pass
    raise DataError(f"{listed}: expected the name of a file inside {folder}, got {str(name)[:200]!r}")


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without blank ones at its end; DataError if it cannot be read."""
    try:
        # Not splitlines() or read_text(): they also break at characters that stand inside sentences (U+0085, U+2028, a
        # carriage return alone).
        lines = regular(path).read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected UTF-8 text, got {type(error).__name__}: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError that names the file and where it breaks off."""
    try:
        return json.loads(regular(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {type(error).__name__}: {error}") from error


def kind(value: Any) -> str:
    """What was got instead, in few words."""
    return f"keys {', '.join(list(value)[:5])}" if isinstance(value, dict) else type(value).__name__
