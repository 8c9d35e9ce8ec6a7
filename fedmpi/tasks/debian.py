"""Data sets in Debian's packages, which apt-get fetches and checks, and nobody need install: no root is needed.

The King James text lies compressed in one package, in a format of the program in another, which prints it. That
program comes out of a package whose signature apt-get has checked; what it prints is believed by its SHA-256 alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedmpi.errors import DataError
from fedmpi.tasks.readers.kjv import TEXT
from fedmpi.tasks.verify import Progress, Unpacked, fault, run_program


class Printed(NamedTuple):
    """A file that a program of the packages prints.

    Attributes:
      command: the program and its arguments, relative to where the packages are unpacked.
    """

    packages: tuple[str, ...]
    command: tuple[str, ...]
    file: str
    unpacked: Unpacked


PRINTED: dict[str, Printed] = {
    "kjv": Printed(
        packages=("bible-kjv", "bible-kjv-text"),
        command=("usr/bin/bible", "-f", "-p", "usr/lib", "gen1:1-rev22:21"),
        file=TEXT,
        unpacked=Unpacked(4_404_412, "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"),
    ),
}


def fetch_printed(name: str, printed: Printed, to: Path, progress: Progress) -> Path:
    """Puts the file into ``to/name``, verified, and returns that folder.

    Raises:
      DataError: there is no apt-get, a package cannot be had, its program does not run here or prints something else,
        or ``to`` cannot be written.
    """
    folder = to / name
    if not fault(folder / printed.file, printed.unpacked):
        progress(f"{name}: already in {folder}, checksum right")
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            aside = Path(scratch)
            progress(f"{name}: Debian's packages {' and '.join(printed.packages)}")
            try:
                _print(printed, aside)
            except (DataError, subprocess.SubprocessError) as error:
                by_hand = " ".join(("bible", *printed.command[1:2], *printed.command[4:]))
                raise DataError(
                    f"{name}: {error}. On a machine of Debian or Ubuntu, install {printed.packages[0]}, run: {by_hand} "
                    f"> {printed.file}, and put that into {folder}"
                ) from error
            (aside / printed.file).replace(folder / printed.file)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from error
    progress(f"{name}: in {folder}, checksum right")
    return folder


def _print(printed: Printed, aside: Path) -> None:
    """``aside`` has the file, verified."""
    unpacked = unpack(printed.packages, aside)
    program, *arguments = printed.command
    if not (unpacked / program).is_file():
        raise DataError(f"{printed.packages[0]}: expected {program} in it, got none")
    try:
        done = run_program((str(unpacked / program), *arguments), unpacked)
    except OSError as error:  # another processor's, or a folder that allows no programs
        raise DataError(f"{program} does not run here: {error}") from error
    if done.returncode:
        raise DataError(f"{program} does not run here: {said(done)}")
    (aside / printed.file).write_text(done.stdout, encoding="utf-8", newline="\n")
    if wrong := fault(aside / printed.file, printed.unpacked):
        raise DataError(f"{program} printed something else: {wrong}")


def unpack(packages: Sequence[str], aside: Path) -> Path:
    """Downloads and unpacks packages, and returns the folder in ``aside`` that has their files. Needs no root; as root
    it also mends missing package lists.

    Raises:
      DataError: it could not.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError("there is no apt-get on this machine")
    done = run_program(("apt-get", "download", *packages), aside)
    if done.returncode and os.geteuid() == 0:
        run_program(("apt-get", "update"), aside)
        done = run_program(("apt-get", "download", *packages), aside)
    if done.returncode:
        raise DataError(f"{said(done)} (try: sudo apt-get update)")
    unpacked = aside / "unpacked"
    for package in packages:
        archive = next(aside.glob(f"{package}_*.deb"))
        done = run_program(("dpkg-deb", "--extract", str(archive), str(unpacked)), aside)
        if done.returncode:
            raise DataError(said(done))
    return unpacked


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a program told before it failed, in one line."""
    return done.stderr.strip().replace("\n", "; ") or f"it ended with {done.returncode}"
