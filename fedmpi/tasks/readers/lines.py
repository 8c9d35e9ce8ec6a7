"""Text files and JSON files, whose errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmpi.errors import DataError


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without blank ones at its end; DataError if it cannot be read."""
    try:
        # Not splitlines(): it also breaks at characters that stand inside sentences (U+0085, U+2028).
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected UTF-8 text, got {type(error).__name__}: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError that names the file and where it breaks off."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {type(error).__name__}: {error}") from error


def kind(value: Any) -> str:
    """What was got instead, in few words."""
    return f"keys {', '.join(list(value)[:5])}" if isinstance(value, dict) else type(value).__name__
