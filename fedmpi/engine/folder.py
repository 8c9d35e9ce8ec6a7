"""A run's folder is one run's: it is made with a name that nobody has, and locked while the run lasts.

The lock is the system's, on the file ``.lock`` in the folder: it is gone when the process is, however it ended, and
holds between machines where their file system has locks (NFS does). The file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from fedmpi.comm.base import Comm
from fedmpi.engine.record import writing
from fedmpi.errors import ConfigError

_NAME = ".lock"
_PATIENCE = 2.0  # seconds: whoever was killed a moment ago may not be gone yet
_INHERITANCE = 10.0  # of a rank that is known to have ended
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def fresh(runs: Path, stem: str) -> Path:
    """Make a folder for a run of the configuration ``stem``, with a name that no other run got.

    Raises:
      ConfigError: it cannot be made.
    """
    name = runs / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = name, 1
    with writing(runs, "--out"):
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # of a run that began in the same second
                n += 1
                folder = name.with_name(f"{name.name}-{n}")


def last(runs: Path, stem: str) -> Path | None:
    """The newest folder that :func:`fresh` made for ``stem``; None where there is none."""
    name = re.compile(re.escape(stem) + r"-(\d{8}-\d{6})(?:-(\d{1,9}))?")
    with suppress(FileNotFoundError, NotADirectoryError):
        named = [(name.fullmatch(path.name), path) for path in runs.iterdir()]
        found = [(match[1], int(match[2] or 1), path) for match, path in named if match]
        return max(found)[2] if found else None
    return None


def drop_empty(folder: Path) -> None:
    """Remove a folder that :func:`fresh` made, if its run has left nothing in it."""
    with suppress(OSError):
        folder.rmdir()


class Claim:
    """One rank's end of the lock; a context that gives it back. Rank 0 holds it, and whoever becomes rank 0."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._path = Path()
        self._first = ""  # who held it when the run began

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, run: Path, comm: Comm) -> None:
        """Make the run's folder, and lock it, where this is rank 0 and has not done so yet.

        Raises:
          ConfigError: the folder cannot be written, or another run is in it: names its process.
        """
        if comm.rank or self._file is not None:
            return
        self._path = run / _NAME
        heir = bool(self._first)
        end = time.monotonic() + (_INHERITANCE if heir else _PATIENCE)
        with writing(run, "--out"):
            run.mkdir(parents=True, exist_ok=True)
            while not self._try():
                holder = _said(self._path)
                if time.monotonic() < end:
                    time.sleep(0.05)
                elif heir and holder == self._first:  # a machine that is gone cannot give it back
                    _say(f"{run} is still locked by the lost rank ({holder}); going on without the lock")
                    return
                else:
                    raise ConfigError(
                        f"--out: {run} is in use by another run ({holder or 'which does not say who it is'}); "
                        "expected a folder that no run is in: wait for that run, end it, or name another folder"
                    )

    def _try(self) -> bool:
        """Whether this process has the lock now."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(self._path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, f"{_NAME} is not a file")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _say(
                    f"{self._path.parent} is on a file system without locks ({error.strerror}): "
                    "a second run in it would not be noticed"
                )
            if not self._path.exists() or not os.path.samestat(self._path.stat(), os.fstat(file)):
                return False  # its last holder has removed it meanwhile
            os.ftruncate(file, 0)
            os.write(file, _me().encode())
            self._file, file = file, -1
            return True
        finally:
            if file >= 0:
                os.close(file)

    def note(self, run: Path) -> None:
        """Remember who holds the lock, for the day that this rank has to take it over."""
        self._first = _said(run / _NAME)

    def release(self) -> None:
        """Give it back; a run that failed before it wrote anything leaves nothing."""
        if self._file is None:
            return
        with suppress(OSError):  # the folder may be gone, or its disk full
            os.ftruncate(self._file, 0)
            if [path.name for path in self._path.parent.iterdir()] == [_NAME]:
                self._path.unlink()
        os.close(self._file)
        self._file = None


def _me() -> str:
    job = os.environ.get("SLURM_JOB_ID", "")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"{f'Slurm job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}, since {since}"
    )


def _said(path: Path) -> str:
    """What the holder has written of itself; others may write it, too."""
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = os.read(file, 200).decode(errors="replace")
        finally:
            os.close(file)
        return "".join(c if c.isprintable() else "?" for c in text)
    return ""


def _say(what: str) -> None:
    print(f"fedmpi: {what}", file=sys.stderr, flush=True)
