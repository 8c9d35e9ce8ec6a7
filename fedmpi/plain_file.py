"""Reading files that may be anything: what lies in a run's folder, a checkpoint or beside a configuration."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NotPlainError(OSError):
    """It is no plain file, or is too long; the message says what it is."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.what = what


def read_plain(path: Path, most: int | None = None, links: bool = True) -> bytes:
    """The bytes of a plain file.

    A pipe without a writer is not waited for, and a device without an end is not read.

    Args:
      path: the file.
      most: bytes that it may have; None: as many as it says that it has.
      links: whether ``path`` may be a link to the file.

    Raises:
      NotPlainError: it is something else, or longer.
      OSError: it cannot be read.
      ValueError: the path has a zero byte.
    """
    # Opened without waiting and looked at when open: a look before may be at another file.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    file = os.open(path, flags)
    try:
        there = os.fstat(file)
        if not stat.S_ISREG(there.st_mode):
            raise NotPlainError(path, "a folder" if stat.S_ISDIR(there.st_mode) else "a device or pipe")
        if most is not None and there.st_size > most:
            raise NotPlainError(path, f"{there.st_size:,} bytes")
        data = bytearray()
        limit = there.st_size if most is None else most + 1  # files of the kernel say 0 bytes
        while len(data) < limit and (chunk := os.read(file, min(limit - len(data), 1 << 24))):
            data += chunk
        if most is not None and len(data) > most:
            raise NotPlainError(path, f"more than {most:,} bytes")
    finally:
        os.close(file)
    return bytes(data)
