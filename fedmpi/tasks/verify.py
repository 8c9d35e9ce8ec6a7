"""What a fetched file must be, and how outside programs are run."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Progress = Callable[[str], None]  # takes a line of text for the user

CHUNK = 1 << 20
PACKING = 1 << 16  # bytes that gzip may add to what does not pack
_PATIENCE_S = 600.0


class Unpacked(NamedTuple):
    nbytes: int
    sha256: str


def fault(path: Path, expected: Unpacked) -> str | None:
    """What is wrong with a file (gzipped or not), or None; unpacks no more than the expected length."""
    digest, length = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if (
            there := path.stat().st_size
        ) > expected.nbytes + PACKING:  # gzip would go through it a byte a step
            return f"{path.name}: expected at most {expected.nbytes + PACKING} bytes, got {there}"
        with gzip.open(path) if packed else path.open("rb") as content:
            while length <= expected.nbytes and (chunk := content.read(CHUNK)):
                digest.update(chunk)
                length += len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        return f"{path.name}: {type(error).__name__}: {error}"
    if (length, digest.hexdigest()) == expected:
        return None
    more = "at least " if length > expected.nbytes else ""
    return (
        f"{path.name}: expected {expected.nbytes} bytes with SHA-256 {expected.sha256}, "
        f"got {more}{length} with {digest.hexdigest()}"
    )


def run_program(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
    )
